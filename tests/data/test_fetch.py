"""Files come whole from a bad line, once each, and what is not available is reported in one line."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_hub import SmallHub

from data.durable import file_sha256
from data.errors import DataError, DiskFull
from data.sources import hub, url, web
from data.sources.fetch import Blobs, Wanted, fetch_all
from pipeline.stages.download import Params

CONTENT = {name: os.urandom(200_000) for name in ("a.parquet", "b.parquet", "c.parquet")}


@pytest.fixture
def small_hub(tmp_path):
    with SmallHub(tmp_path / "hub").serving() as served:
        yield served


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(web, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(web, "LONGEST_WAIT_SECONDS", 1.0)


def wanted_files(small_hub: SmallHub) -> list[Wanted]:
    return [
        Wanted(name, f"{small_hub.url}/files/{name}", small_hub.add(f"files/{name}", content), len(content))
        for name, content in CONTENT.items()
    ]


def test_files_come_whole_through_drops_errors_and_flipped_bytes(small_hub, tmp_path):
    wanted = wanted_files(small_hub)
    small_hub.faults["a.parquet"] = ["drop", "drop", "error", "ok"]
    small_hub.faults["b.parquet"] = ["corrupt", "drop", "corrupt"]
    small_hub.faults["c.parquet"] = ["error"] * 5
    blobs = Blobs(tmp_path / "blobs")
    seen = []

    assert fetch_all(wanted, blobs, workers=3, on_progress=lambda done, total: seen.append((done, total)))

    for item in wanted:
        assert blobs.path(item.sha256).read_bytes() == CONTENT[item.name]
    assert seen[-1] == (600_000, 600_000) and seen == sorted(seen)
    ranges = [r for _, path, r in small_hub.requests if path.endswith("a.parquet")]
    assert ranges[1] == "bytes=100000-" and ranges[2] == "bytes=150000-"  # goes on where it was
    assert not [p for p in (blobs.root / "tmp").iterdir() if p.suffix != ".lock"]


def test_what_is_there_is_not_fetched_again_unless_it_is_damaged(small_hub, tmp_path):
    wanted = wanted_files(small_hub)
    blobs = Blobs(tmp_path / "blobs")
    fetch_all(wanted, blobs, 2)
    damaged = blobs.path(wanted[0].sha256)
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    small_hub.requests.clear()

    fetch_all(wanted, blobs, 2)

    assert [small_hub.gets(item.name) for item in wanted] == [1, 0, 0]
    assert file_sha256(damaged) == wanted[0].sha256


def test_two_runs_at_once_fetch_each_file_once(small_hub, tmp_path):
    wanted = wanted_files(small_hub)
    threads = [threading.Thread(target=fetch_all, args=(wanted, Blobs(tmp_path / "blobs"), 3)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [small_hub.gets(item.name) for item in wanted] == [1, 1, 1]


def test_a_killed_fetch_goes_on_where_it_was(small_hub, tmp_path):
    wanted = wanted_files(small_hub)
    small_hub.faults["c.parquet"] = ["drop"]
    code = f"""
import os, sys
from pathlib import Path
from data.sources import fetch, web
from data.sources.fetch import Blobs
web.LONGEST_PAUSE_SECONDS = 0.01
write = fetch._Sink.write
def die_halfway(sink, chunk):
    write(sink, chunk)
    sink.file.flush()
    if sink.file.name.endswith({wanted[2].sha256!r}) and sink.size >= 100_000:
        os.kill(os.getpid(), 9)
fetch._Sink.write = die_halfway
fetch.fetch_all({wanted!r}, Blobs(Path({str(tmp_path / "blobs")!r})), 1)
""".replace("[Wanted", "[fetch.Wanted").replace(" Wanted", " fetch.Wanted")
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()

    assert fetch_all(wanted, Blobs(tmp_path / "blobs"), 1)

    assert [small_hub.gets(item.name) for item in wanted] == [1, 1, 2]
    assert small_hub.requests[-1][2] == "bytes=100000-"


def test_stopping_keeps_what_has_come(small_hub, tmp_path):
    assert not fetch_all(wanted_files(small_hub), Blobs(tmp_path / "blobs"), 1, should_stop=lambda: True)


def test_a_file_that_always_comes_wrong_is_given_up_with_its_name(small_hub, tmp_path):
    wanted = wanted_files(small_hub)[:1]
    small_hub.faults["a.parquet"] = ["corrupt"] * 20
    with pytest.raises(DataError, match=r"a.parquet .* came 5 times with other bytes than its sha256"):
        fetch_all(wanted, Blobs(tmp_path / "blobs"), 2)


def test_a_hub_that_stays_down_is_given_up(small_hub, tmp_path):
    wanted = wanted_files(small_hub)[:1]
    small_hub.faults["a.parquet"] = ["error"] * 20
    with pytest.raises(DataError, match=r"cannot reach .*503.*HF_ENDPOINT"):
        fetch_all(wanted, Blobs(tmp_path / "blobs"), 2)
    assert small_hub.gets("a.parquet") == 8


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(small_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "SLOW_SECONDS", 0.0)
    wanted = wanted_files(small_hub)[:1]
    small_hub.answers["/files/a.parquet"] = (206, {}, [b"x"])
    with pytest.raises(DataError, match=r"cannot reach .*a\.parquet: it sent only 1 bytes in 0 s\. Check the network"):
        fetch_all(wanted, Blobs(tmp_path / "blobs"), 1)
    assert small_hub.gets("a.parquet") == 8


def test_what_came_slowly_is_kept_when_the_line_is_better_again(small_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(web, "SLOW_BYTES", 2)
    wanted = wanted_files(small_hub)[:1]

    def once():
        del small_hub.answers["/files/a.parquet"]
        yield CONTENT["a.parquet"][:1]

    small_hub.answers["/files/a.parquet"] = (200, {"Content-Length": "200000"}, once())

    assert fetch_all(wanted, Blobs(tmp_path / "blobs"), 1)
    assert [kept for _, path, kept in small_hub.requests if path.endswith("a.parquet")] == [None, "bytes=1-"]


def test_a_hub_that_has_had_too_many_requests_is_left_alone_as_it_asks(small_hub, tmp_path):
    wanted = wanted_files(small_hub)
    small_hub.faults["a.parquet"] = ["drop", "limit 1", "limit 9999", "limit"]
    said = []
    started = time.monotonic()

    assert fetch_all(wanted, Blobs(tmp_path / "blobs"), 1, say=said.append)

    assert time.monotonic() - started >= 1.0
    ranges = [r for _, path, r in small_hub.requests if path.endswith("a.parquet")]
    assert ranges == [None, *["bytes=100000-"] * 4]  # what had come is kept
    assert len(said) == 3 and all("too many requests. Retrying in" in line for line in said)
    assert "in 1 s (as it asks)" in said[0]
    assert "it asks for 9999" in said[1]
    assert "does not say" in said[2]


def test_all_connections_wait_together_and_it_is_said_once(small_hub):
    said = []
    limiter = web.RateLimiter(said.append)
    error = OSError()
    error.response = SimpleNamespace(status_code=429, headers={"Retry-After": "1000"})
    for _ in range(5):
        assert limiter.refused(error, 0, small_hub.url)
    limiter.stop.set()
    limiter.wait()  # somebody who stops does not wait
    assert len(said) == 1


def test_a_hub_that_stays_at_its_limit_is_given_up(small_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "LONGEST_WAIT_SECONDS", 0.01)
    small_hub.faults["a.parquet"] = ["limit"] * 100
    with pytest.raises(DataError, match=r"too many requests \(429\).*Run the same again later"):
        fetch_all(wanted_files(small_hub)[:1], Blobs(tmp_path / "blobs"), 1)
    assert small_hub.gets("a.parquet") == 9


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7),
        (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        (429, {"RateLimit": '"api";r=0;t=55'}, 55),
        (429, {}, 0),
        (503, {"Retry-After": "30"}, 30),
        (503, {}, None),
        (404, {"Retry-After": "30"}, None),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(status, headers, seconds):
    error = OSError()
    error.response = SimpleNamespace(status_code=status, headers=headers)
    assert web.asked_seconds(error) == seconds


def test_a_disk_too_small_is_said_before_anything_is_fetched(small_hub, tmp_path):
    too_large = Wanted("x", small_hub.url, "0" * 64, 10**15)
    with pytest.raises(DiskFull, match=r"1,000,000,000 MB are still to be fetched") as raised:
        fetch_all([too_large], Blobs(tmp_path / "blobs"), 1)
    assert raised.value.cause == "disk" and small_hub.requests == []


def text_params(**changes) -> Params:
    settings = {
        "source": "data.sources.hub",
        "repo_id": "org/text",
        "train_shards": 2,
        "val_shard": "shard_00002.parquet",
    }
    return Params(**settings | changes)


@pytest.fixture
def repository(small_hub):
    for i in range(3):
        small_hub.add(f"datasets/org/text/shard_0000{i}.parquet", os.urandom(1000))
    small_hub.add("datasets/org/text/notes.json", b"{}")
    return small_hub


def test_a_branch_is_resolved_once_and_remembered(repository):
    memory = {"endpoint": repository.url}
    assert hub.identity(text_params(), memory, online=False) is None
    found = hub.identity(text_params(), memory, online=True)
    assert list(found["files"]) == ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet"]
    assert found["source"]["commit"] == repository.commit
    repository.commit = "d" * 40
    repository.add("datasets/org/text/shard_00000.parquet", b"moved on")
    repository.requests.clear()

    assert hub.identity(text_params(), memory, online=True) == found
    assert hub.identity(text_params(train_shards=1), memory, online=False)["files"].items() < found["files"].items()
    assert repository.requests == []
    fresh = hub.identity(text_params(), {"endpoint": repository.url}, online=True)
    assert fresh["files"] != found["files"]


def test_another_endpoint_with_the_same_bytes_is_the_same_data(repository, tmp_path):
    here = hub.identity(text_params(), {"endpoint": repository.url}, online=True)
    with SmallHub(repository.root).serving() as mirror:
        mirror.commit = "e" * 40
        there = hub.identity(text_params(), {"endpoint": mirror.url + "/"}, online=True)
    assert here["files"] == there["files"] and here["source"] != there["source"]


def test_globs_take_files_in_name_order_and_small_files_are_known_by_content(repository):
    params = text_params(what="dataset", files=["*.json", "shard_*1.parquet"])
    found = hub.identity(params, {"endpoint": repository.url}, online=True)
    assert list(found["files"]) == ["notes.json", "shard_00001.parquet"]
    assert found["files"]["notes.json"]["sha256"].startswith("44136fa355b3678a")  # of {}


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"train_shards": 4, "val_shard": "shard_00009.parquet"},
            r"has no file shard_00003.parquet. Did you mean shard_0000\d.parquet",
        ),
        ({"val_shard": "shard_00001.parquet"}, "is one of the 2 training shards"),
        ({"repo_id": "org/absent"}, "there is no data set org/absent"),
        ({"repo_id": "absent"}, "expected ORG/NAME"),
        ({"val_shard": None}, "name the validation shard"),
        ({"train_shards": None}, "Set the number of shards"),
        ({"what": "dataset", "files": ["shard*", "nothing*"]}, r"has no file nothing\*"),
        ({"what": "dataset"}, "name files of org/text"),
    ],
)
def test_what_a_hub_lacks_is_named(repository, changes, said):
    with pytest.raises(DataError, match=said):
        hub.identity(text_params(**changes), {"endpoint": repository.url}, online=True)


def test_a_hub_that_stumbles_is_asked_again(repository):
    repository.faults["api"] = ["error", "ok", "error", "error"]
    assert hub.identity(text_params(), {"endpoint": repository.url}, online=True)
    repository.faults["api"] = ["error"] * 100
    with pytest.raises(DataError, match=r"cannot reach org/text .*503"):
        hub.identity(text_params(), {"endpoint": repository.url}, online=True)


def test_a_hub_at_its_limit_is_asked_again_after_the_wait_and_that_is_said(repository, caplog):
    repository.faults["api"] = ["limit 1", "limit"]
    assert hub.identity(text_params(), {"endpoint": repository.url}, online=True)
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "too many requests. Retrying in 1 s (as it asks).",
        "too many requests. Retrying in 1 s (it does not say more).",
    ]


def test_an_unreachable_hub_is_named():
    with pytest.raises(DataError, match=r"cannot reach org/text at http://127.0.0.1:9: .*HF_ENDPOINT"):
        hub.identity(text_params(), {"endpoint": "http://127.0.0.1:9"}, online=True)


@pytest.mark.parametrize("sha256_etags", [True, False])
def test_a_url_is_known_by_its_etag_or_by_reading_it(small_hub, sha256_etags):
    small_hub.sha256_etags = sha256_etags
    digest = small_hub.add("files/words.txt", b"one\ntwo\n" * 1000)
    small_hub.faults["words.txt"] = ["drop", "error"]
    params = Params("data.sources.url", urls=["http://127.0.0.1:9/words.txt"])
    memory = {"endpoint": small_hub.url}

    assert url.identity(params, memory, online=False) is None
    found = url.identity(params, memory, online=True)

    assert found["files"] == {"words.txt": {"sha256": digest, "bytes": 8000}}
    assert found["source"] == {"url": f"{small_hub.url}/files/words.txt"}
    assert small_hub.gets("words.txt") == (0 if sha256_etags else 3)
    assert url.identity(params, memory, online=False) == found


def test_a_url_that_no_place_has_says_what_each_answered(small_hub):
    params = Params("data.sources.url", urls=["http://127.0.0.1:9/words.txt"])
    with pytest.raises(DataError, match=r"words.txt is not available.*no such file \(404\).*cannot reach"):
        url.identity(params, {"endpoint": small_hub.url}, online=True)
