"""Artifacts that training stages read, and jobs that run on them in processes of their own."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from pipeline import typed
from pipeline.job import Job, Launch

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 67
LENGTH = 32
TINY_MODEL = {"depth": 2, "width": 32, "head_dim": 16, "sequence_len": LENGTH}


def write_inputs(folder: Path, tokens: int = 40_000) -> dict[str, str]:
    """Text in which the next token follows from the last one three times out of four, packed; as artifact folders."""
    random = np.random.default_rng(0)
    text = {name: folder / name for name in ("tokens", "pack", "tokenizer", "rows")}
    for path in text.values():
        path.mkdir(parents=True)
    shards = []
    for name, split, count in (("a", "train", tokens), ("v", "val", 3000)):
        stream = np.zeros(count, np.uint16)
        guess = random.integers(1, VOCAB, count)
        for i in range(1, count):
            stream[i] = (stream[i - 1] * 7 + 3) % VOCAB if guess[i] % 4 else guess[i]
        np.save(text["tokens"] / f"{name}.tokens.npy", stream)
        shards.append({"name": name, "split": split, "tokens": count, "documents": 1, "sha256": ""})
    described = {"dtype": "uint16", "bos": 0, "vocab_size": VOCAB, "shards": shards}
    (text["tokens"] / "tokens.json").write_text(json.dumps(described))
    packed = {"method": "stream", "sequence_len": LENGTH, "rows": (tokens - 1) // LENGTH, "source_tokens": tokens}
    (text["pack"] / "pack.json").write_text(json.dumps(packed))
    np.save(text["tokenizer"] / "token_bytes.npy", np.r_[0, np.full(VOCAB - 1, 2)].astype(np.int32))
    write_rows(text["rows"], random)
    return {name: str(path) for name, path in text.items()}


def write_rows(folder: Path, random: np.random.Generator, rows: int = 40) -> None:
    """Conversation rows of which the second half is trained on."""
    np.save(folder / "rows.tokens.npy", random.integers(1, VOCAB, (rows, LENGTH + 1)).astype(np.uint16))
    mask = np.zeros((rows, LENGTH + 1), np.uint8)
    mask[:, LENGTH // 2 :] = 1
    np.save(folder / "rows.mask.npy", mask)
    (folder / "rows.json").write_text(json.dumps({"sequence_len": LENGTH, "rows": rows, "order": "mixture"}))


@dataclass
class StageRun:
    """A stage's work folder; start() runs it again where it is, as a launcher would."""

    module: str
    work: Path
    inputs: dict[str, str]
    params: dict[str, Any]
    launch: dict[str, Any]
    key: str = "0123456789abcdef"

    def start(self, nproc: int = 1, **launch: Any) -> "subprocess.Popen[str]":
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "outcome.json").unlink(missing_ok=True)
        described = {
            "module": f"pipeline.stages.{self.module}",
            "stage": self.module,
            "key": self.key,
            "params": self.params,
            "launch": {"device": "cpu", "threads": 1, "nproc": nproc, **self.launch, **launch},
            "inputs": self.inputs,
            "work": str(self.work),
            "store": str(self.work.parent / "store"),
        }
        (self.work / "job.json").write_text(json.dumps(described))
        runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
        return subprocess.Popen(
            [sys.executable, *runner, "-m", "pipeline.stages", str(self.work / "job.json")],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def run(self, nproc: int = 1, **launch: Any) -> dict[str, Any]:
        """To the end; the outcome, with what was printed under "output"."""
        output = self.start(nproc, **launch).communicate(timeout=300)[0]
        return {**json.loads((self.work / "outcome.json").read_text()), "output": output}

    def inside(self, **launch: Any) -> dict[str, Any]:
        """The same in this very process: the metrics that main returns; its errors are raised."""
        module = importlib.import_module(f"pipeline.stages.{self.module}")
        job = Job(
            stage=self.module,
            key=self.key,
            params=typed.build(module.Params, self.params),
            launch=typed.build(Launch, {"device": "cpu", "threads": 1, **self.launch, **launch}),
            inputs={name: Path(path) for name, path in self.inputs.items()},
            work=self.work,
            store=self.work.parent / "store",
        )
        try:
            return module.main(job)
        finally:
            torch.use_deterministic_algorithms(False)  # as launch.deterministic has set it for the whole process

    def weights(self) -> dict[str, Any]:
        return load_file(self.work / "out" / "model.safetensors")

    def said(self) -> str:
        path = self.work / "said.txt"
        return path.read_text() if path.exists() else ""

    def metrics(self, *names: str) -> list[tuple[float, ...]]:
        """(step, *names) of every line that has the names."""
        lines = [json.loads(line) for line in (self.work / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], *(line[name] for name in names)) for line in lines if all(n in line for n in names)]
