"""A hub, a mirror or a bundle decides neither where files are written, nor how much of them, nor who gets the token."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_hub import COMMIT, SmallHub

from data.errors import DataError
from data.sources import fetch, hub, url, web
from data.sources.fetch import Blobs, Wanted, describe_url, fetch_all
from pipeline.job import Job, Launch
from pipeline.stages import download
from pipeline.stages.download import Params
from tests.conftest import tries

REPO = "/api/datasets/org/text"
TREE = f"{REPO}/tree/{COMMIT}"


@pytest.fixture
def small_hub(tmp_path):
    with SmallHub(tmp_path / "hub").serving() as served:
        served.add("datasets/org/text/data/a.parquet", b"a" * 1000)
        yield served


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(web, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def dataset(**changes: Any) -> Params:
    settings = {
        "source": "data.sources.hub",
        "what": "dataset",
        "repo_id": "org/text",
        "files": ["data/*.parquet"],
    }
    return Params(**settings | changes)


def plan(small_hub: SmallHub, memory: dict[str, Any] | None = None, **changes: Any) -> Any:
    return hub.identity(dataset(**changes), {"endpoint": small_hub.url} | (memory or {}), online=True)


def answer(value: Any, **headers: str) -> tuple[int, dict[str, str], list[bytes]]:
    return 200, headers, [value if isinstance(value, bytes) else json.dumps(value).encode()]


def entry(path: Any = "data/a.parquet", oid: Any = "a" * 64, size: Any = 1000) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": size, "lfs": {"oid": oid, "size": size, "pointerSize": 130}}


def run_stage(tmp_path: Path, identity: Any, params: Params) -> Path:
    job = Job("dataset/x", "key", params, Launch(), {}, tmp_path / "work", tmp_path / "store", data_identity=identity)
    download.main(job)
    return job.out


@pytest.mark.parametrize(
    "lie",
    [
        entry(oid="/tmp/victim"),
        entry(oid="../../victim"),
        entry(oid="A" * 64),
        entry(oid=None),
        entry(oid=["a" * 64]),
        entry(size=-1),
        entry(size=1.5),
        entry(size="1000"),
        entry(size=None),
        entry(path="data/../../../../x.parquet"),
        entry(path="data//x.parquet"),
        entry(path="data/\\..\\x.parquet"),
        entry(path="data/\x1b[2Jx.parquet"),
        entry(path="data/\ud83d.parquet"),
        entry(path=None),
        entry(path=7),
        {"type": "file", "path": "data/x.parquet", "size": 3, "lfs": "yes"},
        "data/x.parquet",
        None,
    ],
)
def test_a_list_of_files_with_a_wrong_name_digest_or_size_is_refused_in_one_line(small_hub, lie):
    small_hub.answers[TREE] = answer([entry(), lie])
    with pytest.raises(DataError) as raised:
        plan(small_hub)
    said = str(raised.value)
    assert raised.value.cause == "data" and small_hub.url in said
    assert said.isprintable() and len(said) < 600


def test_what_a_store_remembers_is_checked_like_what_a_hub_answers(small_hub, tmp_path):
    good = plan(small_hub, memory := {})
    victim = tmp_path / "victim"
    victim.write_text("mine")
    place = f"{small_hub.url}/datasets/org/text@main"
    for bad in (
        None,
        [],
        {"files": {}},
        {"commit": "main", "files": good["files"]},
        {"commit": COMMIT, "files": {"data/a.parquet": {"sha256": str(victim), "bytes": 4}}},
        {"commit": COMMIT, "files": {"data/a.parquet": {"sha256": "a" * 64, "bytes": -4}}},
        {"commit": COMMIT, "files": {"data/a.parquet": None}},
    ):
        memory = {"endpoint": small_hub.url, "hub": {place: bad}}
        assert hub.identity(dataset(), memory, online=False) is None
        assert hub.identity(dataset(), memory, online=True) == good
        assert hub.identity(dataset(), memory | {"hub": bad}, online=True) == good
    for bad in (None, "x", {"sha256": "../x", "bytes": 1}):
        words = Params("data.sources.url", urls=["https://example.org/words.txt"])
        assert url.identity(words, {"url": {words.urls[0]: bad}}, online=False) is None


def test_a_bad_name_or_digest_that_reached_a_stage_writes_nothing(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    source = {"endpoint": "http://127.0.0.1:9", "repo_id": "org/text", "commit": COMMIT, "own_token": False}
    blobs = Blobs(tmp_path / "store" / "blobs")
    (tmp_path / "empty").write_bytes(b"")
    empty = {"sha256": blobs.add(tmp_path / "empty"), "bytes": 0}
    for files in (
        {"data/a.parquet": {"sha256": str(victim), "bytes": 4}},
        {"data/a.parquet": {"sha256": "../../victim", "bytes": 4}},
        {"../../../victim": empty},
        {str(victim): empty},
    ):
        with pytest.raises(DataError, match="Refused"):
            run_stage(tmp_path, {"files": files, "source": source}, dataset())
    for use in (blobs.path, blobs.partial, blobs.has, blobs.publish, lambda digest: blobs.lock(digest).__enter__()):
        with pytest.raises(DataError, match="Refused"):
            use("../../../victim")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", r"org/text at .* is gated. Accept its terms"),
        (404, "RevisionNotFound", r"data.revision: org/text at .* has no 'main'"),
        (404, "RepoNotFound", r"there is no data set org/text"),
        (401, "", r"there is no data set org/text .*or it is private"),
        (404, "", r"there is no data set org/text"),
        (418, "", r"cannot reach org/text at .*: it answers 418"),
    ],
)
def test_what_a_hub_refuses_is_said(small_hub, status, code, said):
    small_hub.answers[f"{REPO}/revision/main"] = (status, {"X-Error-Code": code} if code else {}, [b"[1]"])
    with pytest.raises(DataError, match=said):
        plan(small_hub)


# --- who gets the token


def test_the_token_goes_to_the_official_hub_and_to_endpoints_that_the_user_marked():
    assert hub.gets_token("https://huggingface.co", [])
    for other in ("http://huggingface.co", "https://huggingface.co:444", "https://huggingface.co.evil.org"):
        assert not hub.gets_token(other, ["https://hub.example.org/"])
    assert hub.gets_token("https://HUB.example.org:443", ["https://hub.example.org/"])
    assert not hub.gets_token("http://hub.example.org", ["https://hub.example.org/"])


@pytest.mark.parametrize("marked", [False, True])
def test_a_mirror_gets_the_token_only_if_it_is_marked(small_hub, tmp_path, marked):
    small_hub.add("datasets/org/text/data/b.json", b"{}")  # no LFS: described by a request of its own
    params = dataset(files=["data/*"])
    found = hub.identity(params, {"endpoint": small_hub.url, "send_token": [small_hub.url] * marked}, online=True)
    run_stage(tmp_path, found, params)
    assert len(small_hub.requests) >= 5
    assert small_hub.tokens == (["Bearer hf_secret"] * len(small_hub.requests) if marked else [])


def test_neither_a_redirect_nor_a_next_page_takes_the_token_to_another_host(small_hub, tmp_path):
    with SmallHub(small_hub.root).serving() as other:
        memory = {"send_token": [small_hub.url]}
        file = f"/datasets/org/text/resolve/{COMMIT}/data/a.parquet"
        small_hub.answers[file] = (302, {"Location": other.url + file}, [])
        run_stage(tmp_path, plan(small_hub, memory), dataset())
        assert other.gets("a.parquet") == 1 and other.tokens == [] and small_hub.tokens
        small_hub.answers[TREE] = answer([entry()], Link=f'<{other.url}{TREE}?cursor=1>; rel="next"')
        other.requests.clear()
        with pytest.raises(DataError, match=r"next page .* is on another host .*Refused"):
            plan(small_hub, memory)
        assert other.requests == []


# --- answers of any shape and size


def test_pages_are_followed_and_endless_ones_end(small_hub, monkeypatch):
    small_hub.answers[TREE] = answer([entry()], Link=f'<{TREE}/2>; rel="next"')
    small_hub.answers[f"{TREE}/2"] = answer([entry("data/b.parquet")])
    assert list(plan(small_hub)["files"]) == ["data/a.parquet", "data/b.parquet"]
    small_hub.answers[f"{TREE}/2"] = answer([entry("data/b.parquet")], Link=f'<{TREE}/2>; rel="next"')
    monkeypatch.setattr(hub, "MOST_PAGES", 20)
    with pytest.raises(DataError, match=r"the list of files has no end"):
        plan(small_hub)


@pytest.mark.parametrize("path", [f"{REPO}/revision/main", TREE])
@pytest.mark.parametrize(
    "value",
    [
        b"<html><title>Sign in</title></html>",
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"sha": "' + COMMIT.encode(),
        {"sha": None},
        {"sha": "main"},
        {"sha": ["c"]},
        {"id": "org/text"},
        [[]],
        [1, 2],
        {"error": "no"},
        "text",
        0,
        None,
    ],
)
def test_an_answer_that_is_not_json_or_of_another_shape_is_one_line(small_hub, path, value):
    small_hub.answers[path] = answer(value)
    with pytest.raises(DataError) as raised:
        plan(small_hub)
    assert raised.value.cause == "data" and small_hub.url in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("path", [f"{REPO}/revision/main", TREE])
def test_an_endless_answer_is_cut_off(small_hub, path, monkeypatch):
    monkeypatch.setattr(web, "LARGEST_ANSWER", 1 << 20)
    small_hub.answers[path] = (200, {}, itertools.repeat(b" " * 65536))
    with pytest.raises(DataError, match="exceeds 1 MB"):
        plan(small_hub)


def test_the_endless_body_of_an_error_is_not_read(small_hub):
    small_hub.answers[TREE] = (403, {}, itertools.repeat(b" " * 65536))
    with pytest.raises(DataError, match=r"it answers 403"):
        plan(small_hub)


plain = st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | st.text(max_size=8)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
lies = st.fixed_dictionaries(
    {},
    optional={
        "type": st.just("file") | anything,
        "path": st.sampled_from(["data/a.parquet", "/a.parquet", "data/../a.parquet"]) | anything,
        "size": st.integers() | anything,
        "lfs": st.fixed_dictionaries({}, optional={"oid": st.just("a" * 64) | anything}) | anything,
    },
)


@settings(max_examples=tries(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    about=st.just({"sha": COMMIT}) | anything,
    tree=st.lists(lies | st.builds(entry), max_size=3) | anything,
    link=st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=30),
)
def test_whatever_a_hub_answers_is_a_plan_or_one_line(small_hub, about, tree, link):
    small_hub.answers[f"{REPO}/revision/main"] = answer(about)
    small_hub.answers[TREE] = answer(tree, Link=f'{link}; rel="next"')
    try:
        found = plan(small_hub)
    except DataError as error:
        assert str(error).isprintable()
    else:
        assert list(found["files"]) == ["data/a.parquet"]


# --- bodies


def test_a_body_longer_than_announced_is_cut_off_at_once(small_hub, tmp_path):
    def endless():
        for part in itertools.repeat(os.urandom(65536)):
            sent.append(len(part))
            yield part

    sent: list[int] = []
    blobs = Blobs(tmp_path / "blobs")
    wanted = Wanted("a.parquet", f"{small_hub.url}/long", "a" * 64, 100_000)
    small_hub.answers["/long"] = (200, {}, endless())
    with pytest.raises(DataError, match="came 5 times with other bytes"):
        fetch_all([wanted], blobs, 1)
    assert sum(sent) < 5 * 8_000_000  # what the sockets between take, not what a disk does
    assert blobs.partial(wanted.sha256).stat().st_size == 0
    small_hub.answers["/long"] = (200, {"Content-Length": str(10**12)}, endless())
    with pytest.raises(DataError, match="came 5 times with other bytes"):
        fetch_all([wanted], blobs, 1)


@pytest.mark.parametrize("headers", [{}, {"Content-Length": str(10**12)}])
def test_reading_a_file_only_to_know_it_has_an_end(small_hub, monkeypatch, headers):
    monkeypatch.setattr(fetch, "LARGEST_HASHED", 1 << 20)
    small_hub.answers["/words.txt"] = (200, headers, itertools.repeat(b"x" * 65536))
    with pytest.raises(DataError, match=r"words.txt: (announces|sends) .*more than"):
        describe_url(f"{small_hub.url}/words.txt")


def test_a_web_page_in_place_of_a_file_is_not_taken_for_it(small_hub):
    small_hub.add("datasets/org/text/data/small.json", b"{}")
    page = (200, {"Content-Type": "text/html; charset=utf-8"}, [b"<html>Sign in</html>"])
    small_hub.answers["/words.txt"] = page
    with pytest.raises(DataError, match="is a web page, not the file"):
        describe_url(f"{small_hub.url}/words.txt")
    small_hub.answers[f"/datasets/org/text/resolve/{COMMIT}/data/small.json"] = (200, {}, [b"no JSON"])
    with pytest.raises(DataError, match=r"does not have the size that .* lists"):
        plan(small_hub, files=["data/*.json"])


def test_a_source_of_ones_own_cannot_list_files_outside_its_artifact(tmp_path, monkeypatch):
    (tmp_path / "my_source.py").write_text(
        "from data.sources.source import Made\n"
        "def identity(params, memory, online):\n    return {'files': {}, 'source': {}}\n"
        "def make(request):\n    return Made(['../outcome.json'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"lists a file named '\.\./outcome\.json'"):
        run_stage(tmp_path, None, Params("my_source", what="dataset"))
