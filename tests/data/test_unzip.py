"""An archive decides neither where its files are written nor how much of the disk they take."""

import io
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.sources import url
from tests.conftest import tries


def archive(*members: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        for info, content in members:
            file.writestr(info, content)
    return made.getvalue()


def special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (mode | 0o777) << 16
    return info


def unpack(tmp_path: Path, content: bytes) -> Path:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / "bundle.zip").write_bytes(content)
    url.unzip(out / "bundle.zip", out, "https://example.org/bundle.zip")
    return out


def test_a_bundle_is_unpacked_with_its_folders_and_again_after_a_crash(tmp_path):
    content = archive((special("eval_bundle/", stat.S_IFDIR), b""), ("eval_bundle/a/core.yaml", b"tasks: []"))
    for _ in range(2):
        out = unpack(tmp_path, content)
        assert (out / "eval_bundle/a/core.yaml").read_bytes() == b"tasks: []"
    assert sorted(path.name for path in out.rglob("*")) == ["a", "bundle.zip", "core.yaml", "eval_bundle"]


def test_no_member_is_lost_to_the_temporary_file_of_another(tmp_path):
    out = unpack(tmp_path, archive((".x.tmp", b"1"), ("x.tmp", b"2"), ("x", b"3")))
    assert sorted(path.name for path in out.iterdir()) == [".x.tmp", "bundle.zip", "x", "x.tmp"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("../x", b"")], "not a plain relative path"),
        ([("/x", b"")], "not a plain relative path"),
        ([("a/../../x", b"")], "not a plain relative path"),
        ([("a\\..\\x", b"")], "not a plain relative path"),
        ([("a\x1b[2J", b"")], "not a plain relative path"),
        ([(special("x", stat.S_IFLNK), b"/etc/passwd")], "is a link or a device"),
        ([(special("x", stat.S_IFCHR), b"")], "is a link or a device"),
        ([("x", b"1"), ("x", b"2")], "more than one member named x"),
        ([("x", b"1"), ("X", b"2")], "more than one member named X"),
        ([("bundle.zip", b"1")], "more than one member named bundle.zip"),
        ([("x", b"1"), ("x/y", b"2")], "is both a file and a folder"),
    ],
)
def test_an_archive_whose_members_are_not_plain_files_is_refused_unwritten(tmp_path, members, said):
    with pytest.raises(DataError, match=said) as raised:
        unpack(tmp_path, archive(("fine.txt", b"fine"), *members))
    assert str(raised.value).isprintable() and raised.value.cause == "data"
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["bundle.zip"]


def test_a_bomb_is_refused_by_what_it_declares_and_by_what_it_writes(tmp_path, monkeypatch):
    bomb = archive(("zeros", bytes(50_000_000)))
    assert len(bomb) < 100_000
    with pytest.raises(DataError, match=r"unpacks to more than the 17 MB allowed"):
        unpack(tmp_path, bomb)
    assert not (tmp_path / "out" / "zeros").exists()
    # One that declares less: the central directory's size of the member is made small.
    at = bomb.rindex(b"PK\x01\x02") + 24
    unpack_lie = bomb[:at] + (1000).to_bytes(4, "little") + bomb[at + 4 :]
    with pytest.raises(DataError, match=r"is not a complete zip file"):
        unpack(tmp_path, unpack_lie)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle.zip"]
    monkeypatch.setattr(url, "MOST_MEMBERS", 3)
    with pytest.raises(DataError, match=r"has 4 members"):
        unpack(tmp_path, archive(*[(str(i), b"") for i in range(4)]))


def test_a_list_of_members_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    many = archive(*[("a" * 900 + str(i), b"") for i in range(1200)])
    monkeypatch.setattr(url, "LARGEST_DIRECTORY", 1 << 20)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # not even opened
    with pytest.raises(DataError, match="its list of members exceeds 1 MB"):
        unpack(tmp_path, many)


@settings(max_examples=tries(150))
@given(st.data())
def test_a_damaged_archive_is_one_line(tmp_path_factory, data):
    content = bytearray(archive(("a.txt", b"one " * 50), ("b/c.txt", b"two")))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("zip")
    try:
        out = unpack(folder, bytes(content))
    except DataError as error:
        assert str(error).isprintable()
    else:
        assert all(path.resolve().is_relative_to(out.resolve()) for path in out.rglob("*"))
