"""Every task: its conversations render, its right answers pass its own grading, its held-out items are held out."""

import string
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat.calculator import calculate
from data.chat.conversation import check, text_of
from data.errors import DataError
from data.tasks.arithmetic import Arithmetic, is_held_out
from data.tasks.gsm8k import final_number, with_calls
from data.tasks.identity import Identity
from data.tasks.mixture import TaskMixture, TaskSequence, TaskSpec, load_task, load_tasks
from data.tasks.simple_spelling import SimpleSpelling
from data.tasks.spelling_bee import SpellingBee
from data.tasks.task import Check, Task, TaskError

ROOT = Path(__file__).resolve().parent.parent.parent
CHOICE = "What melts?"


def write(folder: Path, name: str, rows: list[dict]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """One small data set of each kind, in the layout and schema of the public one."""
    folder = tmp_path_factory.mktemp("sets")
    choice = {"question": CHOICE, "subject": "physics", "choices": ["ice", "fire", "air", "sand"], "answer": 0}
    write(folder, "auxiliary_train/train-00000-of-00001.parquet", [{"train": choice}] * 3)
    write(folder, "all/test-00000-of-00001.parquet", [choice | {"answer": i} for i in range(4)])
    arc = {"id": "1", "question": CHOICE, "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    for split in ("train", "test"):
        write(folder, f"ARC-Easy/{split}-00000-of-00001.parquet", [arc] * 2)
        sums = [
            {"question": f"{i}+{i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(9)
        ]
        write(folder, f"main/{split}-00000-of-00001.parquet", sums)
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        write(folder, f"data/{split}-00000-of-00001.parquet", [{"messages": talk, "source": "x"}] * 2)
    problem = {
        "task_id": "0",
        "prompt": 'import math\n\ndef half(x):\n    return x / 2\n\ndef root(x):\n    """The root of x."""\n',
        "canonical_solution": "    return math.sqrt(x)\n",
        "test": "def check(candidate):\n    assert candidate(4) == 2\n",
        "entry_point": "root",
    }
    write(folder, "openai_humaneval/test-00000-of-00001.parquet", [problem])
    (folder / "words_alpha.txt").write_bytes("".join(f"{w}\r\n" for w in WORDS).encode())
    return folder


WORDS = [a + b + c for a in string.ascii_lowercase for b in "aeiou" for c in ("r", "mm", "rry")]
OWN = "data.tasks."
ALL = [
    (OWN + "smoltalk.SmolTalk", {}),
    (OWN + "mmlu.MMLU", {"subset": "auxiliary_train"}),
    (OWN + "mmlu.MMLU:test", {}),
    (OWN + "arc.ARC", {}),
    (OWN + "arc.ARC:test", {"subset": "ARC-Easy"}),
    (OWN + "gsm8k.GSM8K", {}),
    (OWN + "gsm8k.GSM8K:test", {}),
    (OWN + "humaneval.HumanEval:test", {}),
    (OWN + "simple_spelling.SimpleSpelling", {}),
    (OWN + "simple_spelling.SimpleSpelling:test", {}),
    (OWN + "spelling_bee.SpellingBee", {}),
    (OWN + "spelling_bee.SpellingBee:test", {}),
    (OWN + "arithmetic.Arithmetic", {}),
    (OWN + "arithmetic.Arithmetic:test", {"operations": {"remainder": 1, "times": 2}}),
    (OWN + "identity.Identity", {}),
    (OWN + "identity.Identity:test", {"name": "Ada"}),
    (OWN + "chitchat.Chitchat", {}),
]


def run(program: str, check: Check) -> bool:
    made, checking = {}, {}
    try:
        exec(program, made)
        exec(check.source, checking)
        checking["check"](made[check.function])
    except Exception:
        return False
    return True


@pytest.mark.parametrize(("named", "args"), ALL)
def test_right_answers_are_right_and_others_wrong(named, args, sets):
    path, _, split = named.partition(":")
    task = load_task(TaskSpec(path, dataset="any", split=split or "train", args=args), sets)
    assert 0 < len(task) <= 10_000
    for i in range(min(len(task), 40)):
        conversation = task.conversation(i)
        check(conversation)
        assert conversation == task.conversation(i)
        if path.endswith(("SmolTalk", "Chitchat")):
            with pytest.raises(TaskError, match="cannot be graded"):
                task.grade(i, "Hello")
            continue
        right = text_of(conversation["messages"][-1]["content"])
        assert task.grade(i, right, run) == 1.0
        assert task.grade(i, "", run) == 0.0
        assert task.grade(i, "I do not know", run) == 0.0
        if task.kind == "choice":
            assert task.answer(i) in task.letters(i)
            assert task.baseline == 0.25


@pytest.mark.parametrize(("named", "args"), ALL)
def test_size_takes_the_first_items_and_the_same_each_time(named, args, sets):
    path, _, split = named.partition(":")
    spec = TaskSpec(path, dataset="any", split=split or "train", args=args)
    whole = load_task(spec, sets)
    spec.size = 1
    assert len(load_task(spec, sets)) == 1
    assert load_task(spec, sets).conversation(0) == whole.conversation(0)


def test_multiple_choice_is_asked_in_one_form(sets):
    task = load_task(TaskSpec(OWN + "mmlu.MMLU", dataset="mmlu", split="test"), sets)
    question, answer = task.conversation(0)["messages"]
    assert question["content"] == (
        "Multiple Choice question: What melts?\n- ice=A\n- fire=B\n- air=C\n- sand=D\n"
        "\nRespond only with the letter of the correct answer."
    )
    assert answer["content"] == task.answer(0)
    assert sorted(task.answer(i) for i in range(4)) == list("ABCD")
    assert task.letters(0) == list("ABCD")


def test_gsm8k_notes_become_calls():
    assert with_calls("She has 48/2 = <<48/2=24>>24 left.\n#### 24") == [
        {"type": "text", "text": "She has 48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 left.\n#### 24"},
    ]
    assert with_calls("#### 3") == [{"type": "text", "text": "#### 3"}]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,000", 1000),
        ("a\n#### -3.50.", Decimal("-3.5")),
        ("#### 24.0 #### 7", 24),
        ("24", None),
        ("#### .,", None),
    ],
)
def test_gsm8k_answers_are_compared_as_numbers(text, number):
    assert final_number(text) == number


def test_humaneval_takes_a_whole_function_a_fenced_one_or_only_its_body(sets):
    task = load_task(TaskSpec(OWN + "humaneval.HumanEval", dataset="h", split="test"), sets)
    whole = "def root(x):\n    return half(2 * math.sqrt(x))\n"
    assert task.grade(0, whole, run) == 1.0
    assert task.grade(0, f"Here it is:\n```python\n{whole}```\nDone.", run) == 1.0
    for language in ("", "py", "Python", "python3"):
        assert task.grade(0, f"Here it is:\n```{language}\n{whole}```\nDone.\n", run) == 1.0
    assert task.grade(0, "    return math.sqrt(x)", run) == 1.0
    assert task.grade(0, "    return x", run) == 0.0
    with pytest.raises(TaskError, match="sandbox"):
        task.grade(0, whole)


# Held out means held out.


@given(st.sampled_from(["plus", "minus", "times", "remainder"]), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_sum_is_held_out_whichever_operand_comes_first(operation, a, b):
    if operation in ("plus", "times"):
        assert is_held_out(operation, a, b) == is_held_out(operation, b, a)


def test_no_generated_evaluation_item_is_in_training(sets):
    weights = {"plus": 1, "minus": 1, "times": 1, "remainder": 1}
    for maximum in (20, 999):
        kept, out = (
            {
                Arithmetic(split, 3000, operations=weights, max_value=maximum, seed=seed).problem(i)[:3]
                for i in range(3000)
            }
            for split, seed in (("train", 0), ("test", 1))
        )
        mirrored = {(operation, b, a) for operation, a, b in kept if operation in ("plus", "times")}
        assert out and not out & (kept | mirrored)
    for task in (SimpleSpelling, SpellingBee):
        assert not set(task("train", folder=sets).words) & set(task("test", folder=sets).words)
    assert not set(SimpleSpelling("train", folder=sets).words) & set(SpellingBee("test", folder=sets).words)

    def asked(task):
        said = (task.conversation(i)["messages"][0]["content"] for i in range(len(task)))
        return {"".join(c for c in text.casefold() if c.isalnum()) for text in said}

    trained = asked(Identity("train"))
    assert len(asked(Identity("test"))) == 20
    assert not any(question in other for question in asked(Identity("test")) for other in trained)


def test_some_wordings_are_new_in_evaluation():
    def openings(split):
        task = Arithmetic(split, 2000)
        return {
            task.conversation(i)["messages"][0]["content"].rstrip(string.digits + " ?.*+-=")[:6] for i in range(2000)
        }

    assert openings("test") - openings("train")


def test_arithmetic_is_answered_through_the_calculator():
    task = Arithmetic("train", 200, operations={"plus": 1, "minus": 1, "times": 1, "remainder": 1})
    for i in range(200):
        _, a, b, _ = task.problem(i)
        call, output, text = task.conversation(i)["messages"][1]["content"]
        assert {str(a), str(b)} == set(
            call["text"].replace("%", " ").replace("*", " ").replace("+", " ").replace("-", " ").split()
        )
        assert output["text"] == calculate(call["text"])
        assert text["text"] == f"The answer is {output['text']}."
    spoken = f"<|python_start|>1+1<|python_end|><|output_start|>7<|output_end|>The answer is {output['text']}."
    assert task.grade(i, spoken) == 1.0
    assert task.grade(i, spoken.replace("The answer is", "It is not")[:-2]) == 0.0


def test_weights_decide_how_often_an_operation_is_asked():
    task = Arithmetic("train", 2000, operations={"plus": 1, "remainder": 0.05})
    rare = sum(task.problem(i)[0] == "remainder" for i in range(2000))
    assert 50 < rare < 150


# Data sets that are not what they should be.


def test_half_characters_in_a_data_set_are_replaced_too(tmp_path):
    (tmp_path / "data").mkdir()
    talk = [{"role": b"user", "content": b"hi \xed\xa0\xbd"}, {"role": b"assistant", "content": b"yo"}]
    raw = pa.array([talk, talk])
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    pq.write_table(pa.table({"messages": raw.view(pa.list_(message))}), tmp_path / "data" / "train-0.parquet")
    task = load_task(TaskSpec(OWN + "smoltalk.SmolTalk", dataset="own"), tmp_path)
    said = [[(m["role"], m["content"]) for m in task.conversation(i)["messages"]] for i in range(len(task))]
    assert said == [[("user", "hi \ufffd"), ("assistant", "yo")]] * 2


def test_damaged_missing_and_other_files_are_named(tmp_path, sets):
    spec = TaskSpec(OWN + "gsm8k.GSM8K", dataset="gsm8k")
    with pytest.raises(DataError, match=r"there is no main/train-\*\.parquet"):
        load_task(spec, tmp_path)
    path = tmp_path / "main" / "train-0.parquet"
    path.parent.mkdir()
    whole = (sets / "main" / "train-00000-of-00001.parquet").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-0\.parquet: is a truncated or damaged parquet file"):
        load_task(spec, tmp_path)
    write(tmp_path, "main/train-0.parquet", [{"question": "a"}])
    with pytest.raises(DataError, match="no column answer"):
        load_task(spec, tmp_path)
    with pytest.raises(TaskError, match="dataset: NAME"):
        load_task(TaskSpec(OWN + "gsm8k.GSM8K"), None)


# What a mixture names.


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"task": "data.tasks.arithmetics.Arithmetic"}, "No module named"),
        ({"task": "Arithmetic"}, "import path"),
        ({"task": "data.tasks.arithmetic.Arithmetics"}, "no task of that name"),
        ({"task": "data.tasks.arithmetic.Draw"}, "no task of that name"),
        ({"args": {"max_valu": 3}}, "no argument 'max_valu'. Did you mean max_value"),
        ({"args": {"split": "test"}}, "no argument 'split'"),
        ({"split": "tset"}, "no split 'tset'. Did you mean test"),
        ({"split": "all"}, "no split 'all'. It has: train, test"),
        ({"task": OWN + "humaneval.HumanEval"}, "no split 'train'. It has: test"),
        ({"size": 0}, "must be at least 1"),
        ({"repeat": 0}, "must be at least 1"),
    ],
)
def test_a_wrong_line_is_refused_when_it_is_read(changed, complaint):
    with pytest.raises(TaskError, match=complaint):
        TaskSpec(**{"task": OWN + "arithmetic.Arithmetic", **changed})


@pytest.mark.parametrize("args", [{"operations": {"pluss": 1}}, {"max_value": 3}, {"operations": {"plus": 0}}])
def test_wrong_arguments_of_a_task_are_refused(args):
    with pytest.raises(TaskError, match="Arithmetic"):
        load_task(TaskSpec(OWN + "arithmetic.Arithmetic", args=args), None)


class Numbers(Task):
    def __len__(self):
        return self.size or 0

    def conversation(self, i):
        return {"messages": [{"role": "user", "content": f"{self.split} {i}"}]}


def contents(mixture):
    return [mixture[i]["messages"][0]["content"] for i in range(len(mixture))]


def test_a_mixture_has_every_item_as_often_as_its_task_repeats():
    tasks = [Numbers("a", 30), Numbers("b", 5)]
    expected = [f"a {i}" for i in range(30)] + [f"b {i}" for i in range(5)] * 3
    assert contents(TaskSequence(tasks, [1, 3])) == expected
    mixed = contents(TaskMixture(tasks, [1, 3]))
    assert mixed != expected and sorted(mixed) == sorted(expected)
    assert contents(TaskMixture(tasks, [1, 3])) == mixed != contents(TaskMixture(tasks, [1, 3], seed=1))


def test_data_sets_are_looked_up_by_name(sets):
    specs = [TaskSpec(OWN + "gsm8k.GSM8K", dataset="gsm8k"), TaskSpec(OWN + "chitchat.Chitchat", name="talk")]
    tasks = load_tasks(specs, {"gsm8k": sets}.__getitem__)
    assert len(tasks[0]) == 9
    assert [spec.label for spec in specs] == ["GSM8K", "talk"]


# The public data itself, where it is at hand.


def test_the_public_files_are_read_as_they_are(shared_hub):
    def load(name, dataset, split="train", **args):
        return load_task(
            TaskSpec(OWN + name, dataset=dataset, split=split, args=args), shared_hub / "datasets" / dataset
        )

    counts = {
        ("gsm8k.GSM8K", "openai/gsm8k", "train"): 7473,
        ("gsm8k.GSM8K", "openai/gsm8k", "test"): 1319,
        ("smoltalk.SmolTalk", "HuggingFaceTB/smol-smoltalk", "train"): 7804,
        ("mmlu.MMLU", "cais/mmlu", "test"): 1866,
        ("arc.ARC", "allenai/ai2_arc", "test"): 951,
        ("humaneval.HumanEval", "openai/openai_humaneval", "test"): 164,
    }
    for (name, dataset, split), items in counts.items():
        task = load(name, dataset, split)
        assert len(task) == items
        for i in range(0, items, 50):
            check(task.conversation(i))
    assert len(load("mmlu.MMLU", "cais/mmlu", subset="auxiliary_train")) == 1867
    assert len(load("arc.ARC", "allenai/ai2_arc", subset="ARC-Challenge")) == 703


def test_every_gsm8k_note_becomes_a_call_and_every_solution_grades_itself(shared_hub):
    task = load_task(TaskSpec(OWN + "gsm8k.GSM8K", dataset="gsm8k", split="test"), shared_hub / "datasets/openai/gsm8k")
    for i in range(len(task)):
        parts = task.conversation(i)["messages"][1]["content"]
        assert all("<<" not in part["text"] and ">>" not in part["text"] for part in parts)
        assert task.grade(i, text_of(parts)) == 1.0


def test_humaneval_solutions_pass_and_unfinished_ones_fail(shared_hub):
    folder = shared_hub / "datasets/openai/openai_humaneval"
    task = load_task(TaskSpec(OWN + "humaneval.HumanEval", dataset="humaneval", split="test", size=20), folder)
    for i in range(len(task)):
        solution = text_of(task.conversation(i)["messages"][1]["content"])
        assert task.grade(i, solution, run) == 1.0
        assert task.grade(i, "    pass", run) == 0.0
