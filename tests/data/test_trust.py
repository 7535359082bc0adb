"""What comes from outside is checked, and small files are whole or as if absent."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.durable import read_json, write_json
from data.errors import DataError
from data.trust import below, check_name, check_sha256, check_size, printable

BAD_NAMES = [
    "",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a//b",
    "a/",
    "./a",
    "a\\b",
    "a\nb",
    "a\x1b[2J",
    "\ud800",
    "x" * 2000,
]


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 7, ["a"]])
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(DataError, match="the hub"):
        check_name(name, "the hub")


@given(st.text(max_size=30))
def test_an_accepted_name_stays_below_its_folder(name):
    folder = Path("/store/artifact")
    try:
        path = below(folder, name, "a test")
    except DataError:
        return
    assert folder in path.resolve().parents


@pytest.mark.parametrize(
    "value", ["", "../x", "/abs", "g" * 64, "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", None, 3]
)
def test_only_64_hexadecimal_digits_are_a_sha256(value):
    with pytest.raises(DataError):
        check_sha256(value, "the hub")
    assert check_sha256("a" * 64, "the hub") == "a" * 64


@pytest.mark.parametrize("value", [-1, 1.5, "7", None, True, float("nan")])
def test_only_whole_numbers_are_sizes(value):
    with pytest.raises(DataError):
        check_size(value, "the hub")
    assert check_size(0, "the hub") == 0


@given(st.text())
def test_printed_text_holds_no_control_characters_but_newlines_and_tabs(text):
    shown = printable(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) <= 0x9F for c in shown)
    assert len(shown) == len(text)


def test_terminal_escapes_become_visible():
    assert printable("\x1b[31mred\x07\u202e") == "␛[31mred␇\ufffd"


def test_a_json_file_is_read_as_it_was_written(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, "ä"]})
    assert read_json(tmp_path / "a.json", dict) == {"b": [1, "ä"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", [b"", b'{"a": ', b"[1]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, "folder"])
def test_a_damaged_json_file_is_as_if_absent_and_reported_once(tmp_path, caplog, damage):
    path = tmp_path / "state.json"
    path.mkdir() if damage == "folder" else path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert read_json(path, dict) is None
        assert read_json(path, dict) is None
    assert len(caplog.records) == 1 and str(path) in caplog.text


def test_an_absent_json_file_is_not_reported(tmp_path, caplog):
    assert read_json(tmp_path / "none.json", dict) is None
    assert not caplog.records


def test_a_failed_write_leaves_the_old_content_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, object())
    path_folder = tmp_path / "folder.json"
    path_folder.mkdir()
    with pytest.raises(OSError):
        write_json(path_folder, [2])
    assert json.loads(path.read_text()) == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "folder.json"]
