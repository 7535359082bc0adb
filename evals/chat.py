"""Chat tasks: questions asked as a user would, graded by the task; and ChatCORE over six of them."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from data.chat.conversation import render_prompt, text_of
from data.errors import DataError, DataMistake
from data.tasks.task import Check, Task, keyed
from data.tokens.tokenizer import Tokenizer
from evals.ledger import Ledger
from evals.metrics import summary, wilson
from evals.sandbox.box import Execution, Sandbox
from model.decoding.engine import Completion, Engine, drop_oldest_turns
from model.decoding.sampling import Sampling
from model.gpt import GPT

CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
_GRADERS = 2  # threads: grading may run a program, and the next token need not wait for it


@dataclass(frozen=True)
class ChatSettings:
    """Settings of answers. samples: answers to each question; the accuracy is their mean, pass@k counts any right one.

    keep: conversations of each task that are kept for reading. batch_tokens: of one pass over multiple choice.
    """

    temperature: float = 0.0
    top_k: int | None = 50
    max_tokens: int = 256
    samples: int = 1
    seed: int = 0
    keep: int = 4
    batch_tokens: int = 16_384


@dataclass
class ChatTask:
    """A task and its name in results."""

    name: str
    task: Task

    @property
    def group(self) -> str:
        return f"chat/{self.name}"


class ChatEvaluation:
    """Measures tasks with one model. check() may raise to stop; recorded items are not measured again."""

    def __init__(
        self,
        model: GPT,
        engine: Engine,
        tokenizer: Tokenizer,
        sandbox: Sandbox,
        settings: ChatSettings,
        ledger: Ledger,
        check: Callable[[], None],
    ) -> None:
        self.model, self.engine, self.tokenizer, self.sandbox = model, engine, tokenizer, sandbox
        self.settings, self.ledger, self.check = settings, ledger, check

    def measure(self, chat: ChatTask, progress: Callable[[int, str], None]) -> None:
        """Answer and grade this rank's share. progress(items done, name) follows each batch or item.

        Raises DataMistake for a task whose programs the sandbox refuses to run.
        """
        items = self.ledger.share(chat.group, len(chat.task))
        if chat.task.kind == "choice":
            self._choose(chat, items, progress)
        else:
            self._generate(chat, items, progress)

    def prompt(self, chat: ChatTask, item: int) -> list[int]:
        return render_prompt(chat.task.conversation(item), self.tokenizer)

    def _choose(self, chat: ChatTask, items: list[int], progress: Callable[[int, str], None]) -> None:
        """The letter with the highest logit after the prompt is the answer."""
        context, special = self.model.config.sequence_len, self.tokenizer.special
        prompts = {item: drop_oldest_turns(self.prompt(chat, item), context, special) for item in items}
        while items:
            self.check()
            batch = _next_batch(items, {i: len(p) for i, (p, _) in prompts.items()}, self.settings.batch_tokens)
            logits = self._last_logits([prompts[item][0] for item in batch])
            for item, row in zip(batch, logits):
                letters = chat.task.letters(item)
                tokens = torch.tensor([self._letter_token(chat, letter) for letter in letters])
                letter = letters[int(row[tokens].argmax())]
                right = letter == chat.task.answer(item)
                cropped = int(prompts[item][1] > 0)
                self.ledger.record(chat.group, item, grades=[float(right)], texts=[letter], cropped=cropped)
            progress(len(batch), chat.name)

    def _letter_token(self, chat: ChatTask, letter: str) -> int:
        tokens = self.tokenizer.encode(letter)
        if len(tokens) != 1:
            raise DataError(f"task {chat.name}: the letter {letter!r} is {len(tokens)} tokens, expected one")
        return tokens[0]

    @torch.inference_mode()
    def _last_logits(self, prompts: list[list[int]]) -> torch.Tensor:
        """(rows, vocab) float32 on the CPU: the logits after each prompt."""
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts]).to(self.engine.device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        return self.model.head(self.model.hidden(tokens)[torch.arange(len(prompts)), last]).cpu()

    def _generate(self, chat: ChatTask, items: list[int], progress: Callable[[int, str], None]) -> None:
        settings, samples = self.settings, self.settings.samples
        sampling = [
            Sampling(
                temperature=settings.temperature,
                top_k=settings.top_k,
                seed=item_seed(settings.seed, chat.name, item),
                max_tokens=settings.max_tokens,
            )
            for item in items
        ]
        answers: dict[int, dict[int, Completion]] = {}  # by item and sample; they end in any order
        grading: deque[Future[None]] = deque()

        def finished(place: int, completion: Completion) -> None:
            item = items[place // samples]
            answers.setdefault(item, {})[place % samples] = completion
            if len(answers[item]) == samples:
                made = answers.pop(item)
                grading.append(pool.submit(self._grade, chat, item, [made[sample] for sample in range(samples)]))

        def should_stop() -> bool:
            while grading and grading[0].done():
                grading.popleft().result()
                progress(1, chat.name)
            self.check()
            return False

        with ThreadPoolExecutor(_GRADERS) as pool:
            prompts = [self.prompt(chat, item) for item in items]
            self.engine.generate(prompts, sampling, samples, should_stop=should_stop, finished=finished)
            for future in grading:
                future.result()
                progress(1, chat.name)

    def _grade(self, chat: ChatTask, item: int, completions: list[Completion]) -> None:
        executions: list[Execution] = []

        def execute(program: str, check: Check | None = None) -> Execution:
            execution = self.sandbox(program, check)
            if execution.status == "refused":
                raise DataMistake(f"task {chat.name}: {execution.detail}")
            executions.append(execution)
            return execution

        texts = [self.tokenizer.decode(completion.written) for completion in completions]
        grades = [float(chat.task.grade(item, text, execute)) for text in texts]
        cropped = int(completions[0].dropped_turns > 0)
        unfinished = sum(completion.finish == "length" for completion in completions)
        record = {"grades": grades, "texts": texts, "cropped": cropped, "unfinished": unfinished}
        if executions:
            record |= {"programs": 1, "advisory": int(any(execution.advisory for execution in executions))}
        self.ledger.record(chat.group, item, **record)

    def collect(self, chat: ChatTask) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The result of all ranks for one task, and the conversations that are kept."""
        records = self.ledger.wait(chat.group, len(chat.task), self.check)
        samples = self.settings.samples if chat.task.kind == "generate" else 1
        correct = sum(sum(record["grades"]) / len(record["grades"]) for record in records)
        result = summary(correct, len(records), chat.task.baseline)
        result["cropped"] = sum(record["cropped"] for record in records)
        result["seconds"] = round(self.ledger.seconds(records), 3)
        if chat.task.kind == "generate":
            result["unfinished"] = sum(record["unfinished"] for record in records)
        for name in ("programs", "advisory"):  # items graded by programs, and by programs without a check
            if found := sum(record.get(name, 0) for record in records):
                result[name] = found
        if samples > 1:
            solved = sum(max(record["grades"]) > 0 for record in records) / len(records)
            result |= {f"pass@{samples}": solved, "pass_ci": list(wilson(solved, len(records)))}
        kept = []
        for item, record in enumerate(records[: self.settings.keep]):
            question = chat.task.conversation(item)["messages"]
            asked = [text_of(message["content"]) for message in question if message["role"] == "user"]
            answer = {"completion": record["texts"][0], "correct": record["grades"][0]}
            kept.append({"task": chat.name, "prompt": asked[-1]} | answer)
        return result, kept


def _next_batch(items: list[int], lengths: dict[int, int], batch_tokens: int) -> list[int]:
    """Remove a batch from `items`: neighbours in length within batch_tokens, the longest first."""
    items.sort(key=lambda item: (lengths[item], item))
    count = max(1, min(len(items), batch_tokens // lengths[items[-1]]))
    batch = items[-count:]
    del items[-count:]
    return batch


def item_seed(seed: int, name: str, item: int) -> int:
    """The seed of one item's answers, which do not depend on the other items or on the rank."""
    return keyed(f"{seed}/{name}/{item}")


def chatcore(results: dict[str, dict[str, Any]]) -> tuple[float | None, int]:
    """The mean centred accuracy over those of the six tasks that were measured, and their number."""
    found = [results[name]["centered"] for name in CHATCORE if "centered" in results.get(name, {})]
    return (sum(found) / len(found) if found else None), len(found)
