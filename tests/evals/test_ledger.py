"""What an evaluation has measured survives whatever a crash or a full disk leaves in its file."""

import pytest

from evals.ledger import Ledger


@pytest.mark.parametrize(
    "garbage", ['{"group": "a", "it', "[]", "3", "null", "{}", '{"group": [], "item": {}}', "\x00"]
)
def test_a_line_that_is_none_is_measured_again_and_the_others_are_kept(tmp_path, garbage):
    ledger = Ledger(tmp_path)
    for item in range(3):
        ledger.record("a", item, right=1)
    path = tmp_path / "ledger.0.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], garbage, lines[2]]) + "\n")
    again = Ledger(tmp_path)
    assert again.share("a", 3) == [1]
    again.record("a", 1, right=0)
    assert [record["right"] for record in Ledger(tmp_path).wait("a", 3, lambda: None)] == [1, 0, 1]


def test_a_line_that_was_cut_off_at_the_end_is_dropped(tmp_path):
    Ledger(tmp_path).record("a", 0, right=1)
    with open(tmp_path / "ledger.0.jsonl", "a") as file:
        file.write('{"group": "a", "item": 1')
    again = Ledger(tmp_path)
    again.record("a", 1, right=1)
    assert Ledger(tmp_path).share("a", 2) == []
