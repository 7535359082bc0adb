"""What a store remembers is forgotten rather than trusted when it is damaged, and never stops anybody."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts.memory import Memory

DAMAGED = [
    '{"a',
    "[]",
    "3",
    "null",
    '{"mine": 3}',
    '{"mine": {"one": "x"}}',
    '{"mine": {"one": ["../x", "y"]}}',
    "[" * 9**5,
]


@pytest.mark.parametrize("text", [*DAMAGED, '{"mine": {"one": [1, 2]}}', '{"mine": {"one": ["a", "b", "c"]}}'])
def test_names_that_cannot_be_places_are_forgotten_and_can_be_given_again(tmp_path: Path, text: str) -> None:
    memory = Memory(tmp_path)
    memory.name("mine", {"one": ("toy", "k1")})
    assert memory.named() == {"mine": {"one": ("toy", "k1")}}
    (tmp_path / "memory" / "names.json").write_text(text)
    assert memory.named().get("mine", {}) == {}
    memory.name("mine", {"one": ("toy", "k2")})
    assert memory.named()["mine"] == {"one": ("toy", "k2")}


@pytest.mark.parametrize("entry", [None, 3, {}, {"state": [1]}, {"sha256": "x"}, "stale", {"sha256": ["0" * 64]}])
def test_a_remembered_digest_is_used_only_if_it_can_be_one(tmp_path: Path, entry: Any) -> None:
    memory, path = Memory(tmp_path / "store"), tmp_path / "mine.txt"
    path.write_text("text")
    right = memory.file_digest(str(path))
    kept = tmp_path / "store" / "memory" / "files.json"
    remembered = json.loads(kept.read_text())[str(path)]
    wrong = remembered | entry if isinstance(entry, dict) else entry
    kept.write_text(json.dumps({str(path): wrong}))
    assert memory.file_digest(str(path)) == right


@pytest.mark.parametrize("text", [*DAMAGED, '{"key": "../../x"}', '{"key": 5}', '{"key": ""}'])
def test_an_accepted_key_that_cannot_be_one_is_forgotten(tmp_path: Path, text: str) -> None:
    memory = Memory(tmp_path)
    memory.accept("pipeline.stages.rl", "new", "old", "the same")
    assert memory.accepted("pipeline.stages.rl", "new") == "old"
    (tmp_path / "accepted" / "rl-new.json").write_text(text)
    assert memory.accepted("pipeline.stages.rl", "new") == "new"


@pytest.mark.parametrize("text", ["", "[]", '{"hub": 3}', '{"hub": {"x": 1}, "url": []}'])
def test_data_is_looked_up_again_where_the_memory_of_it_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "identity.json").write_text(text)

    def look(known: dict[str, Any]) -> str:
        assert known["endpoint"] == "here"
        known.setdefault("hub", {})["new"] = {"commit": "c"}
        return "found"

    assert Memory(tmp_path).data_identity(look, {"endpoint": "here"}, fresh=False) == "found"
    remembered = json.loads((tmp_path / "memory" / "identity.json").read_text())
    assert remembered["hub"]["new"] == {"commit": "c"} and "endpoint" not in remembered


def test_nothing_is_written_where_nothing_may_be(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    memory = Memory(tmp_path / "store").unwritten()
    memory.file_digest(str(tmp_path / "text"))
    memory.data_identity(lambda known: known.update(hub={"a": 1}), {}, fresh=False)
    assert not (tmp_path / "store").exists()
