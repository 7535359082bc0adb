"""Evaluation text in training data is found wherever it stands; what all questions share is not taken for it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import contamination
from evals.contamination import BASE, EvaluationText, Lookup, chunks, window_hashes

VOCAB, START, END = 1000, 998, 999


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(1, 17))
def test_a_window_hash_is_the_polynomial_of_its_numbers(numbers, n):
    expected = [
        sum(number * BASE ** (n - 1 - j) for j, number in enumerate(numbers[i : i + n])) % 2**64
        for i in range(len(numbers) - n + 1)
    ]
    if len(numbers) >= n:
        assert window_hashes(np.array(numbers, np.uint64), n).tolist() == expected


@settings(deadline=None)
@given(st.sets(st.integers(0, 2**64 - 1), min_size=1), st.lists(st.integers(0, 2**64 - 1)))
def test_a_lookup_finds_exactly_what_is_there(known, others):
    hashes = np.array(sorted(known), np.uint64)
    others = [*others, *sorted(known)[::2]]

    found = Lookup(hashes).find(np.array(others, np.uint64))

    assert hashes[found].tolist() == sorted(known & set(others))


def looked_up(text: EvaluationText, training: list[int], conversations: bool = True) -> dict[str, list[int]]:
    lookups = text.lookups(conversations)
    seen = {length: np.zeros(len(lookup.hashes), bool) for length, lookup in lookups.items()}
    for stretch in chunks([np.array(training, np.uint16)], max(lookups, default=1)):
        for length, places in text.scan(stretch, lookups).items():
            seen[length][places] = True
    return text.found({length: lookups[length].hashes[which] for length, which in seen.items()})


def noise(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, count).tolist()


@pytest.mark.parametrize("at", [0, 1, 55, 63, 64, 65, 200])
def test_an_item_is_found_wherever_it_stands(monkeypatch, at):
    monkeypatch.setattr(contamination, "CHUNK_TOKENS", 64)
    text = EvaluationText(13, VOCAB)
    text.add("task", [noise(1, 30), noise(2, 40)], None)
    training = noise(3, 200)

    assert looked_up(text, training) == {"task": []}
    assert looked_up(text, [*training[:at], *noise(2, 40), *training[at:]]) == {"task": [1]}


@pytest.mark.parametrize(("tokens", "enough"), [(32, 28), (16, 15), (13, 13)])
def test_four_fifths_of_an_item_must_be_there(tokens, enough):
    text, item = EvaluationText(13, VOCAB), noise(1, tokens)
    text.add("task", [item], None)

    assert looked_up(text, [*noise(3, 50), *item[: enough - 1], *noise(4, 50)]) == {"task": []}
    assert looked_up(text, [*noise(3, 50), *item[:enough], *noise(4, 50)]) == {"task": [0]}


def test_what_stands_around_a_text_may_change_its_first_and_last_token():
    text, item = EvaluationText(13, VOCAB), noise(1, 16)
    text.add("core", [item], None)
    text.add("chat", [item], (START, END))

    found = looked_up(text, [*noise(3, 50), 901, *item[1:-1], 902, *noise(4, 50)])

    assert found == {"core": [0], "chat": []}


def test_the_form_that_questions_share_does_not_count_as_contamination():
    form = noise(9, 30)
    text = EvaluationText(13, VOCAB)
    text.add("task", [[*form, *noise(n, 14)] for n in range(5)], None)

    assert looked_up(text, [*noise(30, 20), *form, *noise(31, 14)]) == {"task": []}
    assert looked_up(text, [*noise(30, 20), *form, *noise(3, 14)]) == {"task": [3]}
    assert text.checked("task") == 5


def test_a_short_question_is_found_where_a_conversation_asks_just_that():
    text = EvaluationText(13, VOCAB)
    text.add("chat", [noise(1, 5), noise(2, 3)], (START, END))
    text.add("core", [noise(1, 5)], None)
    asked = [*noise(3, 20), START, *noise(1, 5), END, *noise(4, 9)]

    assert looked_up(text, asked) == {"chat": [0], "core": []}
    assert looked_up(text, [*noise(3, 20), START, *noise(1, 5), 7, END]) == {"chat": [], "core": []}
    assert looked_up(text, asked, conversations=False) == {"chat": [], "core": []}
    assert (text.checked("chat"), text.checked("core")) == (2, 0)
