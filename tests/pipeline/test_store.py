"""Artifacts are published whole or not at all, and a file that changed is never read as if it had not."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifacts import store as store_module
from pipeline.artifacts.artifact import FORMAT
from pipeline.artifacts.locks import Lock
from pipeline.artifacts.store import RECORD as RECORD_FILE
from pipeline.artifacts.store import Store
from pipeline.artifacts.work import Work
from pipeline.commands.store import collect_garbage
from pipeline.errors import Corrupt, UserError
from pipeline.plan.session import Session
from tests.conftest import Chatmill

RECORD: dict[str, Any] = {"module": "toy", "key": "a" * 16, "stages": ["one"], "run": "r", "finished": 1.0}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publish(store: Store, files: dict[str, bytes], **record: Any) -> Any:
    described = RECORD | record
    work = store.work(described["module"], described["key"])
    for name, content in files.items():
        path = work / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return store.publish(work, described)


def test_what_was_published_is_found_with_its_manifest(store: Store) -> None:
    publish(store, {"x.txt": b"1", "deep/y.bin": b"22"})
    found = store.find("toy", RECORD["key"])
    assert found is not None
    assert {n: e["bytes"] for n, e in found.record["files"].items()} == {"x.txt": 1, "deep/y.bin": 2}
    assert not store.work("toy", RECORD["key"]).exists()
    assert store.verify(found) == 0, "what was hashed while publishing is not hashed again"
    assert store.verify(found, everything=True) == 2


@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_hit_is_checked_by_names_and_sizes(store: Store, how: str) -> None:
    artifact = publish(store, {"x.txt": b"123"})
    path = artifact.folder / "x.txt"
    path.unlink() if how == "missing" else path.write_bytes(b"1")
    with pytest.raises(Corrupt, match=r"x\.txt"):
        store.find("toy", RECORD["key"])


@given(st.binary(min_size=1, max_size=64), st.data())
@settings(max_examples=20, deadline=None)
def test_any_flipped_bit_is_found_when_the_file_is_read(tmp_path_factory: Any, content: bytes, data: Any) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    artifact = publish(store, {"x": content})
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    (artifact.folder / "x").write_bytes(bytes(flipped))
    with pytest.raises(Corrupt, match="sha256"):
        store.verify(artifact)


def test_verified_files_are_hashed_again_after_their_time(tmp_path: Path) -> None:
    artifact = publish(Store(tmp_path), {"x": b"1"})
    assert Store(tmp_path, reverify_days=0).verify(artifact) == 1


def test_a_kill_at_any_step_of_publishing_leaves_nothing_or_the_whole(tmp_path: Path) -> None:
    """The process dies at its n-th change of the file system, for every n; publishing again then succeeds."""
    program = """
import os, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from pipeline.artifacts.artifact import FORMAT
from pipeline.artifacts.store import RECORD as RECORD_FILE
from pipeline.artifacts.store import Store
left = int(sys.argv[2])
def dying(call):
    def wrapped(*a, **k):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*a, **k)
    return wrapped
for name in ("replace", "rename", "fsync", "mkdir"):
    setattr(os, name, dying(getattr(os, name)))
store = Store(Path(sys.argv[1]))
record = {"module": "toy", "key": "k", "stages": ["s"], "run": "r", "finished": 1.0}
store.publish(store.work("toy", "k"), record)
"""
    root = Path(store_module.__file__).resolve().parents[2]
    for n in itertools.count():
        store = Store(tmp_path / str(n))
        out = store.work("toy", "k") / "out"
        out.mkdir(parents=True)
        (out / "x").write_bytes(b"content")
        (out.parent / "log.txt").write_text("log\n")
        died = subprocess.run([sys.executable, "-c", program, str(store.root), str(n), str(root)]).returncode == 9
        found = store.find("toy", "k")
        if found is not None:
            assert store.verify(found, everything=True) == 2
        else:
            assert died
            assert (out / "x").read_bytes() == b"content"
            store.publish(out.parent, RECORD | {"key": "k"})
            assert store.find("toy", "k") is not None
        if not died:
            break
    assert n > 5, "the process never died"


def test_removing_takes_the_marker_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = publish(store, {"x": b"1"})

    def refuse(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="power cut"):
        store.discard(artifact.folder)
    assert store.find("toy", RECORD["key"]) is None


def test_names_find_artifacts(store: Store) -> None:
    publish(store, {"x": b"1"}, key="a" * 16, finished=1.0)
    publish(store, {"x": b"2"}, key="b" * 16, finished=2.0)
    store.memory.remember("names", {"mine": {"one": ["toy", "a" * 16]}})
    assert store.find_by_name("one").key == "b" * 16
    assert store.find_by_name("aaaa").key == "a" * 16
    assert store.find_by_name("mine").key == "a" * 16
    assert store.find_by_name("mine/one").key == "a" * 16
    with pytest.raises(UserError, match="nothing called 'two'"):
        store.find_by_name("two")


def test_a_local_file_is_known_by_content_and_hashed_again_when_it_changes(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("one")
    first = store.memory.file_digest(str(path))
    path.write_text("two!")
    assert store.memory.file_digest(str(path)) != first
    with pytest.raises(UserError, match="no such file"):
        store.memory.file_digest(str(tmp_path / "none"))


def test_an_unreadable_record_is_damage_not_absence(store: Store) -> None:
    artifact = publish(store, {"x": b"1"})
    (artifact.folder / "artifact.json").write_text(json.dumps({"key": 1})[:5])
    with pytest.raises(Corrupt, match=r"artifact\.json"):
        store.find("toy", RECORD["key"])
    target = store.quarantine(artifact.folder, "because")
    assert (target / "reason.txt").read_text() == "because\n"
    assert store.find("toy", RECORD["key"]) is None


def test_opening_a_damaged_artifact_names_the_file_moves_it_away_and_says_what_makes_it_again(store: Store) -> None:
    artifact = publish(store, {"x": b"1", "y": b"2"}, recipe="tiny", stages=["sft", "other"])
    assert store.open(artifact) == artifact.folder
    (artifact.folder / "y").write_bytes(b"3")
    assert store.open(artifact, "x") == artifact.folder, "y is not read"
    with pytest.raises(Corrupt, match=r"/y is not what .*moved to quarantine\. Run `.* recipe=tiny until=sft`"):
        store.open(artifact)
    assert not artifact.folder.exists() and store.find("toy", artifact.key) is None


@pytest.mark.parametrize("with_what", ["missing", "directory", "link"])
def test_whatever_stands_in_a_files_place_is_damage(store: Store, tmp_path: Path, with_what: str) -> None:
    artifact = publish(store, {"x": b"1"})
    path = artifact.folder / "x"
    path.unlink()
    if with_what == "directory":
        path.mkdir()
    elif with_what == "link":
        (tmp_path / "other").write_bytes(b"2")
        path.symlink_to(tmp_path / "other")
    with pytest.raises(Corrupt, match="/x "):
        store.open(artifact)


def test_an_artifact_of_no_store_is_verified_and_left_where_it_is(store: Store, tmp_path: Path) -> None:
    shutil.copytree(publish(store, {"x": b"1"}).folder, tmp_path / "copy")
    copy = Store.read(tmp_path / "copy")
    assert copy is not None
    (copy.folder / "x").write_bytes(b"2")
    with pytest.raises(Corrupt, match="sha256 differs") as raised:
        store.open(copy)
    assert "quarantine" not in str(raised.value) and copy.folder.exists()


GOOD_FILE = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"files": {name: GOOD_FILE}} for name in ("../x", "/etc/passwd", "a//b", "", "a\\b", "a\nb", ".", "a/../b")),
        *({"files": {"x": GOOD_FILE | {"bytes": size}}} for size in (-1, 1.0, "1", None, True)),
        *({"files": {"x": GOOD_FILE | {"sha256": sha}}} for sha in ("../../x", "A" * 64, "0" * 63, 0, None)),
        *({"files": files} for files in ([], None, {"x": 1})),
        *({name: value} for name in ("module", "key") for value in ("../x", "a/b", "..", "", 1, None)),
        {"key": "b" * 16},
        {"inputs": {"tokenizer": "../../../x"}},
        {"inputs": ["a" * 16]},
        *({name: value} for name in ("finished", "seconds", "usd") for value in ("1", [], True, 1e300, float("nan"))),
        *({"stages": value} for value in ([], "one", [1], ["\x1b[2J"])),
        {"run": 1},
        {"metrics": []},
        {"code": {"model": "x"}},
    ],
    ids=str,
)
def test_a_manifest_from_elsewhere_is_checked_before_anything_of_it_is_used(
    store: Store, wrong: dict[str, Any]
) -> None:
    artifact = publish(store, {"x.txt": b"1"})
    (artifact.folder / RECORD_FILE).write_text(json.dumps(artifact.record | wrong))
    with pytest.raises(Corrupt):
        store.find("toy", artifact.key)
    assert list(store.all()) == []
    assert [folder for folder, _ in store.unreadable()] == [artifact.folder]


@pytest.mark.parametrize(("module", "key"), [("toy", "../../x"), ("a/../../b", "k"), ("toy", ".."), ("..", "k")])
def test_names_that_lead_out_of_the_store_are_refused(store: Store, module: str, key: str) -> None:
    with pytest.raises(Corrupt, match="is not the name of an artifact"):
        store.folder(module, key)


def test_a_file_in_an_artifacts_place_is_damage_and_can_be_moved_away(store: Store) -> None:
    artifact = publish(store, {"x": b"1"})
    shutil.rmtree(artifact.folder)
    artifact.folder.write_text("not a folder")
    with pytest.raises(Corrupt, match="is a file"):
        store.find("toy", artifact.key)
    assert [folder for folder, _ in store.unreadable()] == [artifact.folder]
    store.quarantine(artifact.folder, "because")
    publish(store, {"x": b"1"})
    assert store.find("toy", artifact.key) is not None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "[" * 100_000, '{"files": {}}', '{"files": {"x.txt": 1}}']
)
def test_a_manifest_that_cannot_be_used_is_damage(store: Store, text: str) -> None:
    artifact = publish(store, {"x.txt": b"1"})
    (artifact.folder / RECORD_FILE).write_text(text)
    with pytest.raises(Corrupt):
        store.find("toy", artifact.key)
    assert list(store.all()) == []
    assert [folder for folder, _ in store.unreadable()] == [artifact.folder]


def test_what_is_remembered_by_several_at_once_is_not_lost(store: Store) -> None:
    code = "import sys; from pathlib import Path; from pipeline.artifacts.store import Store\n"
    code += "m = Store(Path(sys.argv[1])).memory\n"
    code += "for i in range(50):\n  with m.changing('names') as names: names[f'{sys.argv[2]}{i}'] = {}"
    ran = [subprocess.Popen([sys.executable, "-c", code, str(store.root), name]) for name in "abc"]
    assert [process.wait() for process in ran] == [0, 0, 0]
    assert len(store.memory.recall("names")) == 150


def test_gc_keeps_what_unfinished_work_has_fetched_and_tokenised(store: Store) -> None:
    fetched, half, tokenised, other = (letter * 64 for letter in "abcd")
    shards = publish(store, {"shard": b"1"}, module="download", key="d" * 16, identity={"shard": tokenised})
    download, tokenize = store.work("download", "e" * 16), store.work("tokenize", "f" * 16)
    identity = {"files": {"0": {"sha256": fetched}, "1": {"sha256": half}}}
    for work, job in (download, {"data_identity": identity}), (tokenize, {"inputs": {"shards": str(shards.folder)}}):
        work.mkdir(parents=True)
        (work / "job.json").write_text(json.dumps(job))
    blobs, tokens = store.root / "blobs", store.root / "tokens" / "t"
    needed = [blobs / fetched, blobs / "tmp" / half, tokens / tokenised]
    unneeded = [blobs / other, blobs / "tmp" / other, tokens / other]
    for path in (*needed, *unneeded):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if path.parent == tokens else path.write_bytes(b"1")
    with Lock(store.lock_path("download", "e" * 16), {}):
        assert collect_garbage(store, dry_run=False) == []
    told = (tokenize / "job.json").read_text()
    (tokenize / "job.json").write_text(told[: len(told) // 2])
    assert collect_garbage(store, dry_run=False) == [], "nobody knows what it needs"
    (tokenize / "job.json").write_text(told)
    assert sorted(path for path, _ in collect_garbage(store, dry_run=False)) == sorted(unneeded)
    assert all(path.exists() for path in needed)


def test_gc_deletes_what_nothing_refers_to_and_nothing_else(store: Store) -> None:
    blobs, shard = store.root / "blobs", store.root / "tokens" / "t" / "s"
    shard.mkdir(parents=True)
    blobs.mkdir()
    for path in (blobs / "used", blobs / "unused", shard / "tokens.npy", shard / "shard.json"):
        path.write_bytes(b"12")
    artifact = publish(store, {"own": b"1"})
    os.link(blobs / "used", artifact.folder / "used")
    os.link(shard / "tokens.npy", artifact.folder / "tokens.npy")
    store.work("toy", RECORD["key"]).mkdir(parents=True)  # as a crash after publishing leaves it
    unfinished = store.work("toy", "b" * 16)
    unfinished.mkdir()
    killed = store.root / "work" / "verify-resume-x1"
    killed.mkdir()
    once_more = publish(store, {"own": b"1"}, key="c" * 16)  # and is being made again
    (store.work("toy", once_more.key) / "out").mkdir(parents=True)
    planned = [path for path, _ in collect_garbage(store, dry_run=True)]
    assert sorted(planned) == sorted([blobs / "unused", killed, store.work("toy", RECORD["key"])])
    assert [path for path, _ in collect_garbage(store, dry_run=False)] == planned
    assert unfinished.exists() and store.work("toy", once_more.key).exists()
    store.discard(artifact.folder)
    assert {path for path, _ in collect_garbage(store, dry_run=False)} == {blobs / "used", shard}


def test_work_that_is_published_while_it_is_looked_at_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "work" / "source-bbbb").mkdir(parents=True)
    (tmp_path / "work" / "source-aaaa").symlink_to(tmp_path / "gone")  # listed, and not there when asked for its age
    found = Work.find(Store(tmp_path), "source", by_stage=True)
    assert found is not None and found.folder == tmp_path / "work" / "source-bbbb"


def test_a_store_of_an_earlier_version_is_named_as_such_until_something_is_published_in_it(store: Store) -> None:
    assert not store.format_note(), "nothing is in it yet"
    publish(store, {"weights": b"1"})
    (store.root / "format.json").unlink()
    old = store.find("toy", "a" * 16)
    assert "An earlier version of Chatmill made the artifacts" in store.format_note()
    publish(store, {"weights": b"2"}, key="b" * 16)
    assert json.loads((store.root / "format.json").read_text()) == {"format": FORMAT}
    assert not store.format_note() and old and old.folder.is_dir()


@pytest.mark.parametrize("content", ['{"format": "new"}', "[]", "{"])
def test_a_damaged_format_counts_as_that_of_an_earlier_version(store: Store, content: str) -> None:
    publish(store, {"weights": b"1"})
    (store.root / "format.json").write_text(content)
    store.check_format()
    assert store.format_note()


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "format.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"is of format {FORMAT + 1}, and this version reads {FORMAT}"):
        Session.open([f"store.root={tmp_path}"])


def test_what_an_earlier_version_made_is_made_again_and_plan_says_so(chatmill: Chatmill) -> None:
    folder = chatmill.store / "artifacts" / "download" / ("a" * 16)
    folder.mkdir(parents=True)
    facts = {"module": "download", "key": "a" * 16, "stages": ["download"], "finished": 1.0, "files": {}}
    (folder / "artifact.json").write_text(json.dumps(facts))
    assert "An earlier version of Chatmill made the artifacts" in chatmill.run("plan")
    assert (folder / "artifact.json").exists() and not (chatmill.store / "format.json").exists()
