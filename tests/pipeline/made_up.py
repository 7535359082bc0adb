"""Artifact folders as a whole run would leave them, without anything having been trained."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

from evals.metrics import wilson

CALL = "<|python_start|>37 + 58<|python_end|><|output_start|>95<|output_end|>"
MACHINE = {
    "host": "mill",
    "system": "Linux 6.1",
    "python": "3.11.7",
    "cpu": "Example CPU @ 2.40GHz",
    "cores": 2,
    "gpus": 0,
}


def artifact(root: Path, stage: str, module: str, inputs: dict[str, str], **more: Any) -> Path:
    """One published folder; `files` (name -> content, JSON unless text) and `lines` (metrics) go beside its record."""
    key = key_of(stage)
    folder = root / module / key
    folder.mkdir(parents=True)
    files = more.pop("files", {})
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if lines := more.pop("lines", None):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "run": "20261122-184000-ab12",
        "recipe": "tiny",
        "machine": MACHINE,
        "git": "0123456789abcdef0123",
        "dirty_diff": "",
        "module": module,
        "stages": [stage],
        "key": key,
        "inputs": {name: key_of(made) for name, made in inputs.items()},
        "params": {},
        "metrics": {},
        "finished": 1_795_300_000.0 + len(list(root.glob("*/*"))),
        "seconds": 42.0,
        "attempts": 1,
        "device": "cpu",
        "nproc": 1,
        "usd": 0.0,
        "versions": {"torch": "2.13.0"},
        "launch": {"usd_per_hour": 0.0, "sandbox": "strict"},
        "files": {},
    }
    (folder / "artifact.json").write_text(json.dumps(record | more))
    return folder


def key_of(stage: str) -> str:
    return hashlib.sha256(stage.encode()).hexdigest()[:16]


def task(accuracy: float, items: int, baseline: float = 0.0) -> dict[str, Any]:
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / items) + 1 / items
    interval = [max(0.0, accuracy - half), min(1.0, accuracy + half)]
    return {
        "accuracy": accuracy,
        "correct": accuracy * items,
        "items": items,
        "baseline": baseline,
        "centered": (accuracy - baseline) / (1 - baseline),
        "ci": interval,
        "seconds": 3.0,
        "cropped": 0,
    }


def results(stage: str, **more: Any) -> dict[str, Any]:
    empty = {"bpb": None, "core": None, "chat": {}, "chatcore": None, "chatcore_tasks": 0, "samples": []}
    return {"stage": stage, **empty, "conversations": [], "sandbox": "strict", **more}


def training_lines(steps: int, start: float, end: float, every: int = 10, bpb: bool = True) -> list[dict[str, Any]]:
    noise = random.Random(steps)
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        loss = end + (start - end) * math.exp(-6 * step / steps) + noise.gauss(0, 0.03)
        lines.append({"step": step, "loss": loss, "tok_s": 21_000 + noise.gauss(0, 400), "mfu": 0.41, "lr": 0.02})
        if bpb and step % (10 * every) == 0:
            lines.append({"step": step, "val_bpb": 1.1 + math.exp(-5 * step / steps)})
    return lines


def practice_lines(steps: int) -> list[dict[str, Any]]:
    noise = random.Random(steps)
    lines: list[dict[str, Any]] = [{"step": 0, **held_out(0.31, 0.97)}]
    for step in range(1, steps + 1):
        reward = 0.9 - 0.55 * math.exp(-3 * step / steps) + noise.gauss(0, 0.02)
        record = {"reward": reward, "pass@1": reward, "pass@16": min(1.0, reward + 0.15), "response_tokens": 31.0}
        lines.append({"step": step, **record, "entropy": 0.3 * math.exp(-step / steps), "signal": 0.4})
        lines[-1] |= {"kl": 0.01 * step / steps}
        if step % 20 == 0:
            lines.append({"step": step, **held_out(reward, 0.975)})
    return lines


def held_out(remainders: float, arithmetic: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, accuracy in (("Remainders", remainders), ("Arithmetic", arithmetic)):
        low, high = wilson(accuracy, 300)
        found |= {f"eval/{name}": accuracy, f"eval_low/{name}": low, f"eval_high/{name}": high}
    return found


def chat_results(stage: str, arithmetic: float, remainders: float, spelling: float) -> dict[str, Any]:
    talk = {"task": "Arithmetic", "prompt": "What is 37 + 58?", "completion": f"37 + 58 = {CALL}95.", "correct": 1.0}
    wrong = {"task": "SimpleSpelling", "prompt": "Spell mill.", "completion": "m-i-l", "correct": 0.0}
    return results(
        stage,
        bpb={"val": 1.13},
        chat={
            "Arithmetic": task(arithmetic, 1000),
            "Remainders": task(remainders, 200),
            "SimpleSpelling": task(spelling, 200),
            "ARC-Easy": task(0.27, 400, 0.25),
        },
        samples=[{"prompt": "Who are you?", "text": f"I am Chatmill, the model after {stage}."}],
        conversations=[talk, wrong],
    )


def whole_run(root: Path) -> dict[str, Path]:
    """Every stage of a run, by name, in no helpful order."""
    made: dict[str, Path] = {}

    def make(stage: str, module: str, inputs: dict[str, str], **more: Any) -> None:
        made[stage] = artifact(root, stage, module, inputs, **more)

    model = {"model.json": {"depth": 4}}
    evaluation = {
        "held_out": {"documents": 412, "bytes": 998_311},
        "bytes_per_token": {"this": 3.71, "GPT-2": 3.12, "GPT-4": {"skipped": "the vocabulary is not on disk"}},
    }
    make(
        "tokenizer",
        "tokenizer",
        {"text": "tokenizer_text"},
        files={"evaluation.json": evaluation},
        metrics={"vocab_size": 4096},
    )
    trained = {"steps": 1200, "tokens": 9_830_400, "tok_s": 21_040.0, "mfu": 0.412, "train_seconds": 201.0}
    trained |= {"loss": 3.41, "dtype": "float32", "params": 1_835_008}
    text = {"tokens": "tokenize", "pack": "pack", "tokenizer": "tokenizer"}
    make(
        "pretrain", "pretrain", text, files=model, lines=training_lines(1200, 8.3, 3.4), metrics=trained, seconds=214.0
    )
    labels = [f"task_{i}" for i in range(14)]
    core = {"centered": dict.fromkeys(labels, 0.0213), "accuracy": dict.fromkeys(labels, 0.266)}
    core |= {"counts": dict.fromkeys(labels, 16), "baseline": dict.fromkeys(labels, 0.25)}
    core |= {"ci": {label: [0.1, 0.5123] for label in labels}, "seconds_by_task": dict.fromkeys(labels, 1.5)}
    core |= {"score": 0.0213, "tasks": 14, "of": 22, "items": 224, "cropped": 31}
    base = results(
        "evaluate_base",
        bpb={"val": 1.1234},
        core=core,
        samples=[{"prompt": "The capital of France is", "text": " the name of a function"}],
    )
    reads = {"tokenizer": "tokenizer", "tokens": "tokenize"}
    quick = {"core": {"dataset": "core", "max_per_task": 16}}
    make("evaluate_base", "evaluate", {"model": "pretrain", **reads}, files={"results.json": base}, params=quick)
    rows = {"rows.json": {"conversations": 24_800, "dropped": 12, "cut": 3}}
    datasets = {"dataset/gsm8k": "gsm8k", "dataset/words": "words"}
    make("midtrain_data", "render", {"tokenizer": "tokenizer", **datasets}, files=rows)
    mid = {"model": "pretrain", "rows": "midtrain_data", **reads}
    make(
        "midtrain", "finetune", mid, files=model, lines=training_lines(300, 3.0, 0.9), metrics=trained | {"steps": 300}
    )
    make(
        "evaluate_mid",
        "evaluate",
        {"model": "midtrain", **reads},
        files={"results.json": chat_results("mid", 0.91, 0.22, 0.71)},
    )
    make("sft_data", "render", {"tokenizer": "tokenizer", **datasets}, files={"rows.json": {"conversations": 12_000}})
    sft = {"model": "midtrain", "rows": "sft_data", **reads}
    make(
        "sft",
        "finetune",
        sft,
        files=model,
        lines=training_lines(150, 0.9, 0.5),
        metrics=trained | {"steps": 150},
        attempts=2,
    )
    make(
        "evaluate_sft",
        "evaluate",
        {"model": "sft", **reads},
        files={"results.json": chat_results("sft", 0.972, 0.31, 0.82)},
    )
    rollout = {"step": 1, "task": "Remainders", "prompt": "What is 17 % 5?", "completion": CALL, "reward": 1.0}
    kept = "".join(json.dumps(rollout | {"step": step}) + "\n" for step in range(1, 121))
    answer = {"task": "Remainders", "prompt": "What is 38 % 7?", "completion": "3.", "held_out": True}
    kept += "".join(json.dumps(answer | {"step": n, "reward": float(n > 0)}) + "\n" for n in (0, 60, 120))
    practised = {"steps": 120, "tokens": 182_000, "reward": 0.88, "train_seconds": 74.0}
    learnt = {"model": "sft", "tokenizer": "tokenizer"}
    make("rl", "rl", learnt, files=model | {"rollouts.jsonl": kept}, lines=practice_lines(120), metrics=practised)
    make(
        "evaluate_rl",
        "evaluate",
        {"model": "rl", **reads},
        files={"results.json": chat_results("rl", 0.975, 0.87, 0.82)},
    )
    names = sorted(made)
    return {name: made[name] for name in names}
