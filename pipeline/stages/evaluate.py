"""What a model can do: bits per byte, CORE, chat tasks and samples, as far as the configuration lists them.

Reads   model, tokenizer; tokens (tokenize) for bits per byte; the data sets of tasks and of the CORE bundle
Writes  results.json
"""

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from data.tasks.mixture import CoreSpec, TaskSpec
from model.checks import Amount, Count, CountOrOff, Dtype, Natural, Seed
from pipeline.job import Job, Stopped
from pipeline.stage import Inputs
from pipeline.stages.programs import Programs, open_sandbox, without_programs

if TYPE_CHECKING:
    from data.tokens.packing import ValidationRows
    from evals.chat import ChatEvaluation, ChatTask
    from evals.core import Core

RANKS = True
SCORES = True  # what main returns are measurements, for trackers to show


@dataclass
class Params:
    tasks: list[TaskSpec] = field(default_factory=list)  # chat tasks; their names are those in results
    programs: Programs = "run"  # skip: leave out tasks that run programs which the model wrote
    bpb_tokens: CountOrOff = None  # of the validation shard, from its start; null: no bits per byte
    core: CoreSpec | None = None  # null: no CORE
    prompts: list[str] = field(default_factory=list)  # texts to continue
    questions: list[str] = field(default_factory=list)  # messages to answer, for chat models
    sample_tokens: Count = 64  # of a continuation or an answer
    sample_temperature: Amount = 0.0
    keep: Natural = 4  # conversations of each task in results.json
    max_new_tokens: Count = 512  # of an answer to a task's question
    temperature: Amount = 0.0  # of these answers; 0: the likeliest token
    top_k: CountOrOff = 50
    samples: Count = 1  # answers to each question; with more than 1, pass@k is measured too
    seed: Seed = 0
    dtype: Dtype = "auto"  # auto: bfloat16 on GPUs that have it, else float32


def check(params: Params, inputs: Inputs) -> None:
    """Raises DataMistake for several answers that could not differ."""
    from data.errors import DataMistake

    if params.samples > 1 and params.temperature == 0:
        raise DataMistake(
            f"samples is {params.samples}, but at temperature 0 all of them are the same: set temperature=1, say"
        )


def main(job: Job[Params]) -> dict[str, Any]:
    """Raises UserError where the programs of a task cannot be confined, DataError for inputs that do not fit, Stopped
    when asked to: what is measured is kept for a resume."""
    evaluation = Evaluation(job)
    evaluation.measure()
    if job.rank != 0:
        return {}
    results = evaluation.collect()
    (job.out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    metrics, lines = summary(results)
    for line in lines:
        job.say(line)
    return metrics


class Evaluation:
    """A model and everything that is measured of it.

    Ranks share the work through a ledger and never wait for each other, so that results are the same for any number.
    """

    def __init__(self, job: Job[Params]) -> None:
        import torch

        from data.chat.calculator import calculate
        from data.tokens.tokenizer import Tokenizer
        from evals.ledger import Ledger
        from model.decoding.engine import Engine, rows_that_fit
        from model.device import choose_device, keep_freed_memory
        from model.kernels.decoder import decoder_of
        from model.precision import resolve_dtype
        from model.saved import load_model

        self.job, params = job, job.params
        self.specs, self.left_out = without_programs(params.tasks, params.programs)
        self.sandbox = open_sandbox(job, self.specs)
        self.device = choose_device(job.launch.device, job.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # the one that graphs are captured on
        keep_freed_memory()
        self.model = load_model(job.inputs["model"], self.device, resolve_dtype(params.dtype, self.device))
        decoder = decoder_of(self.model, in_place=True)
        self.tokenizer = tok = Tokenizer.load(job.inputs["tokenizer"])
        rows = job.launch.device_batch_size
        rows = rows_that_fit(self.model) if rows == "auto" else int(rows)
        self.engine = Engine(self.model, tok.special, tok.decode_bytes, tok.encode, calculate, rows, decoder)
        self.batch_tokens = 2_048 if self.device.type == "cpu" else 65_536
        # Results say in which sandbox all programs ran.
        folder = job.scratch / f"ledger-{self.batch_tokens}-{job.launch.sandbox}"
        self.ledger = Ledger(folder, job.rank, job.world_size)
        self.rows = self._validation_rows()
        self.row_batches = -(-len(self.rows) // self.batch_rows) if self.rows is not None else 0
        self.core = self._open_core()
        self.tasks = self._open_tasks()
        self.chat = self._chat_evaluation()
        self.samples = [(text, False) for text in params.prompts] + [(text, True) for text in params.questions]
        counts = [self.row_batches, self.core.items if self.core else 0, len(self.samples)]
        self.total = sum(counts) + sum(len(chat.task) for chat in self.tasks)
        self.done = 0

    def _validation_rows(self) -> "ValidationRows | None":
        from data.errors import DataError
        from data.tokens.packing import ValidationRows

        if self.job.params.bpb_tokens is None:
            return None
        if "tokens" not in self.job.inputs:
            raise DataError(f"{self.job.stage}: bpb_tokens needs the input tokens; add it, or set bpb_tokens to null")
        return ValidationRows(self.job.inputs["tokens"], self.engine.context, self.job.params.bpb_tokens)

    def _open_core(self) -> "Core | None":
        from evals.core import Core, CoreSettings

        wanted = self.job.params.core
        if wanted is None:
            return None
        settings = CoreSettings(wanted.max_per_task, self.batch_tokens, self.job.launch.threads or 1)
        return Core(self.job.inputs[f"dataset/{wanted.dataset}"], settings)

    def _open_tasks(self) -> "list[ChatTask]":
        from data.errors import DataError
        from data.tasks.mixture import load_tasks
        from evals.chat import ChatTask

        names = [spec.label for spec in self.specs]
        if len(set(names)) < len(names):
            raise DataError(f"{self.job.stage}: two tasks have the same name ({', '.join(names)}); give them names")
        loaded = load_tasks(self.specs, lambda name: self.job.inputs[f"dataset/{name}"])
        return [ChatTask(name, task) for name, task in zip(names, loaded)]

    def _chat_evaluation(self) -> "ChatEvaluation":
        from evals.chat import ChatEvaluation, ChatSettings

        params = self.job.params
        settings = ChatSettings(
            temperature=params.temperature,
            top_k=params.top_k,
            max_tokens=params.max_new_tokens,
            samples=params.samples,
            seed=params.seed,
            keep=params.keep,
            batch_tokens=self.batch_tokens,
        )
        return ChatEvaluation(self.model, self.engine, self.tokenizer, self.sandbox, settings, self.ledger, self.check)

    @property
    def batch_rows(self) -> int:
        return max(1, self.batch_tokens // self.engine.context)

    def check(self) -> None:
        if self.job.should_stop:
            raise Stopped(f"about {self.done} of {self.total} items are measured")

    def progress(self, count: int, what: str) -> None:
        self.done += count * self.job.world_size
        self.job.progress(min(self.done, self.total), self.total, "items", now=what)

    def measure(self) -> None:
        """This rank's share of everything that is not recorded yet."""
        self._measure_bpb()
        if self.core is not None:
            self.core.measure(self.model, self.tokenizer, self.ledger, self.check, self.progress)
        for chat in self.tasks:
            self.chat.measure(chat, self.progress)
        self._draw_samples()

    def _measure_bpb(self) -> None:
        import numpy as np
        import torch

        from evals.metrics import nats_and_bytes

        token_bytes = torch.from_numpy(self.tokenizer.token_bytes).to(self.device)
        if self.rows is None:
            return
        for number in self.ledger.share("bpb/val", self.row_batches):
            self.check()
            indices = np.arange(number * self.batch_rows, min((number + 1) * self.batch_rows, len(self.rows)))
            tokens, targets = (torch.from_numpy(array).to(self.device) for array in self.rows.gather(indices))
            nats, total_bytes = nats_and_bytes(self.model, [(tokens, targets)], token_bytes)
            self.ledger.record("bpb/val", number, nats=nats, bytes=total_bytes)
            self.progress(1, "bpb")

    def _draw_samples(self) -> None:
        from data.chat.conversation import render_prompt
        from evals.chat import item_seed
        from model.decoding.sampling import Sampling

        params, tok = self.job.params, self.tokenizer
        prompts, sampling, places = [], [], self.ledger.share("samples", len(self.samples))
        for place in places:
            text, asked = self.samples[place]
            question = {"messages": [{"role": "user", "content": text}]}
            prompts.append(render_prompt(question, tok) if asked else [tok.bos, *tok.encode(text)])
            seed = item_seed(params.seed, "samples", place)
            sampling.append(
                Sampling(params.sample_temperature, params.top_k, seed=seed, max_tokens=params.sample_tokens)
            )
        self.check()
        for place, completion in zip(places, self.engine.generate(prompts, sampling)):
            self.ledger.record("samples", place, text=tok.decode(completion.written))
            self.progress(1, "samples")

    def collect(self) -> dict[str, Any]:
        """results.json, from the records of all ranks."""
        from evals.chat import chatcore
        from evals.metrics import bits_per_byte

        chat, conversations = {}, []
        for task in self.tasks:
            chat[task.name], kept = self.chat.collect(task)
            conversations += kept
        parts = self.ledger.wait("bpb/val", self.row_batches, self.check)
        bpb = bits_per_byte(sum(part["nats"] for part in parts), sum(part["bytes"] for part in parts))
        drawn = self.ledger.wait("samples", len(self.samples), self.check)
        mean, measured = chatcore(chat)
        ran_weakly = self.sandbox.mode == "weak" and any("programs" in result for result in chat.values())
        return {
            "stage": self.job.stage,
            "bpb": {"val": bpb} if parts else None,
            "core": self.core.collect(self.ledger, self.check) if self.core is not None else None,
            "chat": chat,
            "chatcore": mean,
            "chatcore_tasks": measured,
            "samples": [{"prompt": text, "text": made["text"]} for (text, _), made in zip(self.samples, drawn)],
            "conversations": conversations,
            "left_out": self.left_out,
            "sandbox": self.sandbox.mode,
            "sandbox_weakness": self.sandbox.weakness if ran_weakly else "",
            "data": {spec.label: asdict(spec) for spec in self.specs},
        }


def summary(results: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The numbers alone, for the artifact's metrics, and one line for each thing measured."""
    from evals.chat import CHATCORE
    from evals.core import score_name

    metrics: dict[str, Any] = {}
    lines = []
    if results["bpb"]:
        metrics["bpb"] = results["bpb"]["val"]
        lines.append(f"bpb {metrics['bpb']:.4f}")
    if core := results["core"]:
        metrics[score_name(core)] = core["score"]
        lines.append(f"{score_name(core)} {core['score']:.4f} ({core['items']} items, {core['cropped']} cropped)")
    for name, result in results["chat"].items():
        metrics |= {name: result["accuracy"], f"{name} items": result["items"]}
        low, high = result["ci"]
        of = f"{result['correct']:g} of {result['items']}, 95% interval {low:.1%} to {high:.1%}"
        lines.append(f"{name} {result['accuracy']:.1%} ({of})")
        for measure in (key for key in result if key.startswith("pass@")):
            low, high = result["pass_ci"]
            lines.append(f"{name} {measure} {result[measure]:.1%} (95% interval {low:.1%} to {high:.1%})")
    lines += [f"{name}: left out, because programs=skip" for name in results.get("left_out", [])]
    if results["chatcore_tasks"] == len(CHATCORE):
        metrics["ChatCORE"] = results["chatcore"]
        lines.append(f"ChatCORE {results['chatcore']:.4f}")
    return metrics, lines
