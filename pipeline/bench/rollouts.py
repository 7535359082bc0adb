"""Rollouts of a step of rl: all answers to all problems in one pass of the engine, against one problem at a time.

tokens/s of model.decoding.engine.Engine.generate on random weights with ends that never come; `one_prompt_tok_s` gives
the engine a problem after the other with all of its answers, `one_answer_tok_s` a single answer after the other. A few
are enough for these: they are rates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.bench import decode
from pipeline.bench.registry import Result
from pipeline.bench.settings import Bench
from pipeline.bench.timing import in_turns, medians

if TYPE_CHECKING:
    from model.gpt import GPT


PROMPT_TOKENS = 16
FEW = 2  # problems, and answers, of the ways that take them one at a time


@dataclass(frozen=True)
class Step:
    """Problems and answers of a step, and the model that gives them."""

    case: decode.Case
    problems: int = 16
    samples: int = 16


STEPS = {
    "tiny": {"smallest": Step(decode.Case(2, 64, 64, (), 8, width=32, head_dim=16), 3, 2)},
    "cpu": {"tiny": Step(decode.Case(4, 2048, 256, (), 48, width=128, head_dim=32))},
    "cuda": {"d20": Step(decode.Case(20, 65_536, 2048, (), 256))},
}


def measure(bench: Bench) -> Result:
    """By model: that of recipe=tiny on CPUs, d20 on GPUs."""
    result: Result = {}
    for name, step in STEPS["tiny" if bench.settings.tiny else bench.device.type].items():
        model = decode.build(step.case, bench.device)  # as rl trains it: not laid out for decoding
        ways = {
            "all": (step.problems * step.samples, generate(model, step, step.problems, step.samples, together=True)),
            "one_prompt": (FEW * step.samples, generate(model, step, FEW, step.samples, together=False)),
            "one_answer": (FEW, generate(model, step, FEW, 1, together=False)),
        }
        seconds = medians(
            in_turns({way: call for way, (_, call) in ways.items()}, bench.settings.repeats, bench.device)
        )
        rate = {way: answers * step.case.new_tokens / seconds[way] for way, (answers, _) in ways.items()}
        result[name] = {
            "tok_s": rate["all"],
            "one_prompt_tok_s": rate["one_prompt"],
            "times_one_prompt": rate["all"] / rate["one_prompt"],
            "one_answer_tok_s": rate["one_answer"],
            "times_one_answer": rate["all"] / rate["one_answer"],
            "answers": step.problems * step.samples,
        }
    return result


def generate(model: "GPT", step: Step, problems: int, samples: int, together: bool) -> Callable[[], object]:
    from data.tokens.tokenizer import SPECIAL_TOKENS
    from model.decoding.engine import Engine
    from model.decoding.sampling import Sampling

    never = {name: -1 - place for place, name in enumerate(SPECIAL_TOKENS)}
    engine = Engine(model, never, lambda ids: b"", lambda text: [], rows=step.problems * step.samples)
    prompts = [[(row + at) % step.case.vocab_size for at in range(PROMPT_TOKENS)] for row in range(problems)]
    sampling = Sampling(top_k=decode.TOP_K, max_tokens=step.case.new_tokens)
    calls = [prompts] if together else [[prompt] for prompt in prompts]

    def call() -> None:
        for some in calls:
            engine.generate(some, sampling, samples)

    return call
