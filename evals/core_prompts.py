"""CORE's tasks and prompts as DCLM defines them (Li et al., 2024): the bundle's files, few-shot picks, token spans."""

import csv
import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml

from data.errors import DataError
from data.text.files import numbered_lines
from data.tokens.tokenizer import Tokenizer
from data.trust import below, shown

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Item = dict[str, Any]

SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234

# An example is the text before the delimiter and the text after it; a blank line ends it.
_EXAMPLES = "{% for shown in examples %}{{ shown.before }}{{ delimiter }}{{ shown.after }}\n\n{% endfor %}"
_PROMPT = _EXAMPLES + "{{ before }}{{ delimiter }}{{ after }}"


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle. baseline: the accuracy of guessing, 0 to 1."""

    label: str
    kind: Kind
    path: Path
    shots: int
    delimiter: str
    baseline: float


@dataclass(frozen=True)
class Option:
    """One text to be scored: the loss, or the prediction, of ids[start:end] counts."""

    ids: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class Question:
    """An item ready to be scored. gold: the right option; language modelling has only one, to be predicted exactly."""

    options: list[Option]
    gold: int
    cropped: bool


def read_bundle(folder: Path) -> list[CoreTask]:
    """The tasks of core.yaml in a bundle's folder (or its eval_bundle/), with baselines of eval_meta_data.csv.

    Raises DataError naming the file that is missing or not as expected.
    """
    root = folder / "eval_bundle" if (folder / "eval_bundle").is_dir() else folder
    try:
        described = yaml.safe_load((root / "core.yaml").read_text())["icl_tasks"]
        with open(root / "eval_meta_data.csv", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        tasks = [_read_task(root, entry, baselines) for entry in described]
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{root}: is not a CORE bundle ({type(error).__name__}: {error})") from error
    if missing := [str(task.path) for task in tasks if not task.path.is_file()]:
        raise DataError(f"{root}: core.yaml names {', '.join(missing)}, which the bundle does not contain")
    return tasks


def _read_task(root: Path, entry: dict[str, Any], baselines: dict[str, float]) -> CoreTask:
    if entry["icl_task_type"] not in SHAPES:
        raise ValueError(f"{shown(entry['icl_task_type'])} is not a kind of task")
    return CoreTask(
        label=entry["label"],
        kind=entry["icl_task_type"],
        path=below(root / "eval_data", entry["dataset_uri"], str(root / "core.yaml")),
        shots=int(entry["num_fewshot"][0]),
        delimiter=entry.get("continuation_delimiter", " "),
        baseline=baselines[entry["label"]],
    )


SHAPES: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


def _check_item(kind: Kind, item: Any, where: str) -> None:
    shape = SHAPES[kind]
    if not isinstance(item, dict) or not all(isinstance(item.get(name), of) for name, of in shape.items()):
        raise DataError(f"{where}: is not a {kind} item, which has {', '.join(shape)}.")
    options = item["choices" if kind == "multiple_choice" else "context_options"] if "gold" in shape else []
    if not all(isinstance(option, str) for option in options) or (
        "gold" in shape and item["gold"] not in range(len(options))
    ):
        raise DataError(f"{where}: its gold is not the number of an option, or an option is not text.")


@dataclass(frozen=True)
class TaskItems:
    """The shuffled items of a task: the first `count` are evaluated, examples are picked among all."""

    task: CoreTask
    pool: Sequence[Item]
    count: int

    @classmethod
    def load(cls, task: CoreTask, max_per_task: int | None = None) -> "TaskItems":
        items = []
        for number, line in numbered_lines(task.path):
            try:
                item = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{task.path}:{number}: is not JSON ({error}).") from None
            if item is not None:
                _check_item(task.kind, item, f"{task.path}:{number}")
                items.append(item)
        random.Random(SHUFFLE_SEED).shuffle(items)
        count = min(len(items), max_per_task or len(items))
        # Examples come from the items that are evaluated, or from a few more where these are too few to choose from.
        return cls(task, items[: max(count, task.shots + 1)], count)

    def examples(self, index: int) -> list[Item]:
        """The few-shot examples of item `index`, which is never one of them."""
        if self.task.shots == 0:
            return []
        picks = random.Random(FEWSHOT_SEED + index).sample(range(len(self.pool) - 1), self.task.shots)
        return [self.pool[place + (place >= index)] for place in picks]

    def prompts(self, index: int) -> list[str]:
        """The texts of item `index`: one per option; for language modelling without and with the continuation."""
        task, item = self.task, self.pool[index]
        examples = [_solved(task.kind, example) for example in self.examples(index)]
        shown = {"examples": examples, "delimiter": task.delimiter}
        render = _template().render
        if task.kind == "multiple_choice":
            return [render(shown, before=item["query"], after=choice) for choice in item["choices"]]
        if task.kind == "schema":
            return [render(shown, before=context, after=item["continuation"]) for context in item["context_options"]]
        before = item["context"].strip()
        # Without its trailing space, so that the prompt's tokens begin those of the whole text.
        bare = render(shown, before=before, after="").strip()
        return [bare, render(shown, before=before, after=item["continuation"])]

    def text(self, index: int) -> str:
        """The text of item `index` itself, without examples: the question, or a text with its right end."""
        item = self.pool[index]
        if self.task.kind == "multiple_choice":
            return str(item["query"])
        solved = _solved(self.task.kind, item)
        return f"{solved['before']} {solved['after']}".strip()

    def characters(self, index: int) -> int:
        """Approximate length of all texts of item `index`, a shared beginning counted once; without rendering."""
        items = [*self.examples(index), self.pool[index]]
        return sum(len(str(value)) for item in items for value in item.values())


@functools.cache
def _template() -> jinja2.Template:
    return jinja2.Environment(autoescape=False, keep_trailing_newline=True).from_string(_PROMPT)


def _solved(kind: Kind, item: Item) -> dict[str, str]:
    if kind == "multiple_choice":
        return {"before": item["query"], "after": item["choices"][item["gold"]]}
    if kind == "schema":
        return {"before": item["context_options"][item["gold"]], "after": item["continuation"]}
    return {"before": item["context"].strip(), "after": item["continuation"]}


def encode(
    items: TaskItems, indices: Sequence[int], tokenizer: Tokenizer, context: int, threads: int = 1
) -> list[Question]:
    """Questions of the given items, each text cut on the left to `context` tokens, all texts encoded in one call."""
    texts = [items.prompts(index) for index in indices]
    encoded = iter(tokenizer.encode_batch([text for prompts in texts for text in prompts], threads))
    questions = []
    for index, prompts in zip(indices, texts):
        ids = [[tokenizer.bos, *next(encoded)] for _ in prompts]
        options = [_crop(option, context) for option in _options(items.task.kind, ids)]
        gold = 0 if items.task.kind == "language_modeling" else items.pool[index]["gold"]
        questions.append(Question([o for o, _ in options], gold, any(cut for _, cut in options)))
    return questions


def _options(kind: Kind, ids: list[list[int]]) -> list[Option]:
    """The span to score: after the common beginning (choices), the common end (schema), or the continuation."""
    if kind == "language_modeling":
        without, whole = ids
        return [Option(whole, min(common_prefix([without, whole]), len(whole) - 1), len(whole))]
    if kind == "multiple_choice":
        start = common_prefix(ids)
        return [Option(option, min(start, len(option) - 1), len(option)) for option in ids]
    shared = common_prefix([option[::-1] for option in ids])
    return [Option(option, max(1, len(option) - shared), len(option)) for option in ids]


def _crop(option: Option, context: int) -> tuple[Option, bool]:
    cut = len(option.ids) - context
    if cut <= 0:
        return option, False
    return Option(option.ids[cut:], max(1, option.start - cut), option.end - cut), True


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Number of tokens that all sequences begin with."""
    # Everything between the first and the last in order has their common prefix; slices compare faster than loops.
    first, last = min(sequences), max(sequences)
    low, high = 0, min(len(first), len(last))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == last[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
