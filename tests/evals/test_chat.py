"""Chat tasks: answered in batches as one at a time, graded by the task, put together from any number of ranks."""

import copy
import math
from pathlib import Path

import pytest
import torch

from data.chat.calculator import calculate
from data.chat.conversation import render_prompt
from data.errors import DataError, DataMistake
from data.tasks.task import Check, ChoiceTask, Task, dialogue
from data.tokens import bpe
from evals.chat import CHATCORE, ChatEvaluation, ChatSettings, ChatTask, chatcore
from evals.ledger import Ledger
from evals.metrics import summary, wilson
from evals.sandbox.box import Execution
from model.config import GPTConfig
from model.decoding.engine import Engine
from model.gpt import GPT


class Letters(ChoiceTask):
    def __len__(self) -> int:
        return 23

    def question(self, i):
        letters = ["A", "B", "C", "D"][: 2 + i % 3]
        return (
            f"Which one{' really' * (i % 4)}, number {i}?",
            [f"choice {c}{i}" for c in letters],
            letters,
            letters[i % 2],
        )


class Echo(Task):
    """Right when the answer holds an e."""

    def __len__(self) -> int:
        return 17

    def conversation(self, i):
        return dialogue(f"Say {i}{' again' * (i % 5)}", f"{i}")

    def grade(self, i, completion, execute=None):
        return float("e" in completion)


class Programs(Echo):
    def grade(self, i, completion, execute=None):
        return float(bool(execute(f"print({i})")))


class Box:
    """Stands in for the sandbox where only what becomes of its answer matters."""

    def __init__(self, status):
        self.status, self.asked = status, 0

    def __call__(self, program, check=None):
        self.asked += 1
        return Execution(self.status, "no namespaces here", advisory=check is None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path_factory.mktemp("tokenizer")
    return bpe.save(bpe.train([path.read_text() for path in (root / "data").rglob("*.py")], 400), folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GPTConfig(depth=2, width=32, head_dim=16, sequence_len=192).resolved(tokenizer.vocab_size)
    model = GPT(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def evaluation(model, tok, ledger, sandbox=None, rows=8, check=lambda: None, **changes) -> ChatEvaluation:
    engine = Engine(model, tok.special, tok.decode_bytes, tok.encode, calculate, rows)
    settings = ChatSettings(**{"max_tokens": 12, "batch_tokens": 300} | changes)
    return ChatEvaluation(model, engine, tok, sandbox or Box("passed"), settings, ledger, check)


def measured(model, tok, folder, task, ranks=1, **changes):
    chat = ChatTask("toy", task)
    for rank in range(ranks):
        evaluation(model, tok, Ledger(folder, rank, ranks), **changes).measure(chat, lambda *a: None)
    result, kept = evaluation(model, tok, Ledger(folder, 0, ranks), **changes).collect(chat)
    result.pop("seconds", None)
    return result, kept


def test_letters_are_scored_by_the_logits_after_the_prompt(model, tokenizer, tmp_path):
    task = Letters()
    right = 0
    for item in range(len(task)):
        prompt = torch.tensor([render_prompt(task.conversation(item), tokenizer)])
        with torch.inference_mode():
            logits = model(prompt)[0, -1]
        letters = task.letters(item)
        best = max(letters, key=lambda letter: float(logits[tokenizer.encode(letter)[0]]))
        right += best == task.answer(item)

    result, kept = measured(model, tokenizer, tmp_path, task)

    assert result["correct"] == right and result["items"] == 23
    assert math.isclose(result["centered"], (right / 23 - 0.25) / 0.75)
    assert len(kept) == 4 and kept[0]["prompt"].startswith("Multiple Choice question: Which one")


def test_answers_do_not_depend_on_batches_or_ranks(model, tokenizer, tmp_path):
    one = measured(model, tokenizer, tmp_path / "one", Echo(), rows=1)
    many = measured(model, tokenizer, tmp_path / "many", Echo(), rows=8)
    ranks = measured(model, tokenizer, tmp_path / "ranks", Echo(), ranks=3, rows=4)

    assert one == many == ranks
    assert one[0]["items"] == 17 and 0 < one[0]["correct"] < 17
    assert measured(model, tokenizer, tmp_path / "a", Letters()) == measured(
        model, tokenizer, tmp_path / "b", Letters(), 2
    )


def test_several_answers_give_pass_at_k(model, tokenizer, tmp_path):
    result, _ = measured(model, tokenizer, tmp_path, Echo(), samples=4, temperature=1.0)

    assert result["pass@4"] >= result["accuracy"] and result["items"] == 17
    assert result["pass_ci"] == list(wilson(result["pass@4"], 17)) and result["ci"] == list(
        wilson(result["accuracy"], 17)
    )
    assert result == measured(model, tokenizer, tmp_path / "again", Echo(), samples=4, temperature=1.0, rows=3)[0]


def test_several_answers_are_kept_in_order_whichever_ends_first(model, tokenizer, tmp_path):
    ending = copy.deepcopy(model).double()
    ending.compute_dtype = torch.float64
    with torch.no_grad():
        ending.lm_head.weight[tokenizer.special["<|assistant_end|>"]] *= 3
    one, many = (
        measured(ending, tokenizer, tmp_path / str(rows), Echo(), samples=4, temperature=1.0, rows=rows, keep=17)
        for rows in (1, 8)
    )
    assert one == many


def test_a_stopped_task_goes_on_with_the_items_that_are_missing(model, tokenizer, tmp_path):
    class Stop(Exception):
        pass

    checks = 0

    def check():
        nonlocal checks
        checks += 1
        if checks > 30:
            raise Stop

    chat = ChatTask("toy", Echo())
    ledger = Ledger(tmp_path)
    with pytest.raises(Stop):
        evaluation(model, tokenizer, ledger, rows=2, check=check).measure(chat, lambda *a: None)
    before = len(ledger.records["chat/toy"])
    done = []
    evaluation(model, tokenizer, Ledger(tmp_path)).measure(chat, lambda count, name: done.append(count))

    assert 0 < before < 17 and sum(done) == 17 - before
    fresh = measured(model, tokenizer, tmp_path / "fresh", Echo())
    assert measured(model, tokenizer, tmp_path, Echo()) == fresh


def test_programs_run_in_the_sandbox_and_a_refusal_ends_the_evaluation(model, tokenizer, tmp_path):
    assert measured(model, tokenizer, tmp_path / "ok", Programs())[0]["correct"] == 17
    assert measured(model, tokenizer, tmp_path / "bad", Programs(), sandbox=Box("failed"))[0]["correct"] == 0

    box = Box("refused")
    with pytest.raises(DataMistake, match="toy: no namespaces here"):
        measured(model, tokenizer, tmp_path / "no", Programs(), sandbox=box)
    assert box.asked < 17


def test_results_say_that_programs_judged_themselves(model, tokenizer, tmp_path):
    class Checked(Echo):
        def grade(self, i, completion, execute=None):
            return float(bool(execute(f"print({i})", Check("def check(candidate): pass", "print"))))

    own, checked, other = (
        measured(model, tokenizer, tmp_path / type(task).__name__, task)[0] for task in (Programs(), Checked(), Echo())
    )
    assert own["programs"] == own["advisory"] == 17
    assert checked["programs"] == 17 and "advisory" not in checked
    assert "programs" not in other


def test_a_letter_of_several_tokens_is_an_error_that_names_it(model, tokenizer, tmp_path):
    class Words(Letters):
        def question(self, i):
            return "q", ["x", "y"], ["option one", "option two"], "option one"

    with pytest.raises(DataError, match="toy: the letter 'option one'"):
        measured(model, tokenizer, tmp_path, Words())


def test_chatcore_is_the_mean_centred_accuracy_of_the_six():
    results = {name: summary(30, 100, 0.25 if place < 3 else 0.0) for place, name in enumerate(CHATCORE)}

    mean, measured_ = chatcore(results | {"Arithmetic": summary(1, 1, 0)})
    assert measured_ == 6 and math.isclose(mean, (3 * (0.05 / 0.75) + 3 * 0.3) / 6)
    assert chatcore({}) == (None, 0)
