"""Your own text and Python's become shards: all of it once, the held-out part apart, mistakes by file and line."""

import gzip
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.sources import local, pydocs
from data.text import files as text_files
from data.text import resplit
from data.text.files import documents, held_out, read_listing, write_shard
from data.text.resplit import Resplit
from pipeline.job import Job, Launch, Stopped
from pipeline.stages import download
from pipeline.stages.download import Params


def read(path: Path, column: str = "text") -> list[str]:
    return [text for texts in documents(path, column) for text in texts]


def run_download(work: Path, memory: dict | None = None, **params) -> tuple[Path, dict]:
    """The artifact folder and its listing."""
    typed = Params(**params)
    found = download.data_identity(typed, memory if memory is not None else {}, online=False)
    job = Job("download", "key", typed, Launch(), {}, work, work.parent / "store", data_identity=found)
    download.main(job)
    return job.out, json.loads((job.out / ("shards.json" if typed.what == "text" else "dataset.json")).read_text())


def write_sources(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"text": f"line {i} " + "x" * 50} for i in range(40)]
    rows += [{"prompt": f"What is {i}?", "completion": f"A number, {i}."} for i in range(40)]
    (folder / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (folder / "c.txt").write_bytes("\ufeffA story.\r\n\r\nIt ends.\r\n".encode())
    write_shard(folder / "a.parquet", [f"document {i} {'y' * 60}" for i in range(60)])
    (folder / "ignored.csv").write_text("1,2")
    return folder


def test_files_of_three_kinds_become_even_shards_and_one_held_out(tmp_path):
    sources = write_sources(tmp_path / "mine")

    out, listing = run_download(
        tmp_path / "work", source="data.sources.local", paths=[str(sources)], shard_chars=2500, val_fraction=0.1
    )

    shards = [read(out / name) for name in listing["train"]]
    val = read(out / listing["val"])
    assert listing["train"] == [f"shard_{i:05d}.parquet" for i in range(len(shards))] and len(shards) > 2
    everything = [text for shard in shards for text in shard] + val
    assert len(everything) == len(set(everything)) == 60 + 40 + 40 + 1
    assert "What is 3?\nA number, 3." in everything and "A story.\n\nIt ends." in everything
    assert all(2500 <= sum(map(len, shard)) < 2700 for shard in shards[:-1])
    assert all(held_out(text, 0.1) for text in val[1:]) and val[0].startswith("document 0 ")


def test_what_is_held_out_stays_so_when_text_is_added(tmp_path):
    sources = write_sources(tmp_path / "mine")
    params = {"source": "data.sources.local", "paths": [str(sources)], "val_fraction": 0.2}
    before, _ = run_download(tmp_path / "before", **params)
    (sources / "d.txt").write_text("one more")
    after, listing = run_download(tmp_path / "after", **params)
    assert set(read(before / "val.parquet")) <= set(read(after / "val.parquet"))
    assert not set(read(after / "val.parquet")) & {text for name in listing["train"] for text in read(after / name)}


def test_with_a_named_validation_file_each_file_is_a_shard(tmp_path):
    sources = write_sources(tmp_path / "mine")
    params = {"source": "data.sources.local", "paths": [str(sources)], "val_shard": "c.txt"}

    out, listing = run_download(tmp_path / "work", **params)

    assert listing["train"] == ["a.parquet", "b.parquet"] and listing["val"] == "c.parquet"
    assert (out / "a.parquet").read_bytes() == (sources / "a.parquet").read_bytes()
    assert len(read(out / "b.parquet")) == 80
    _, without = run_download(tmp_path / "tokenizer_text", **params, train_shards=1, validation=False)
    assert without["train"] == ["a.parquet"] and without["val"] is None


def test_files_that_would_be_one_shard_are_refused(tmp_path):
    sources = write_sources(tmp_path / "mine")
    (sources / "b.txt").write_text("Neither of the two may be left out.")
    with pytest.raises(DataError, match=r"b\.txt and .*b\.jsonl: would both be b\.parquet"):
        run_download(tmp_path / "work", source="data.sources.local", paths=[str(sources)], val_shard="c.txt")


@pytest.mark.parametrize("before", [b"", b"\n" * 30_000])
def test_the_first_document_is_held_out_wherever_it_stands(tmp_path, before):
    sources = tmp_path / "mine"
    sources.mkdir()
    (sources / "a.txt").write_bytes(before)
    (sources / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("x", "y", "x", "z")))
    out, listing = run_download(tmp_path / "work", source="data.sources.local", paths=[str(sources)])
    assert read(out / listing["val"]) == ["x", "x"] and read(out / listing["train"][0]) == ["y", "z"]


def test_text_that_is_kept_once_each_is_read_and_columns_of_one_name_are_refused(tmp_path):
    texts = pa.array(["one", "two", "", None, "one"])
    pq.write_table(pa.table({"text": texts.dictionary_encode()}), tmp_path / "once.parquet")
    pq.write_table(pa.table([texts, texts], names=["text", "text"]), tmp_path / "twice.parquet")
    assert read(tmp_path / "once.parquet") == ["one", "two", "one"]
    with pytest.raises(DataError, match=r"twice\.parquet: has more than one column 'text'"):
        read(tmp_path / "twice.parquet")


def test_another_folder_with_the_same_bytes_is_the_same_data(tmp_path):
    memory: dict = {}
    here = download.data_identity(
        Params("data.sources.local", paths=[str(write_sources(tmp_path / "one"))]), memory, False
    )
    there = download.data_identity(
        Params("data.sources.local", paths=[str(write_sources(tmp_path / "two"))]), memory, False
    )
    assert here and there and here["files"] == there["files"] and here["source"] != there["source"]
    (tmp_path / "two" / "c.txt").write_text("changed")
    changed = download.data_identity(Params("data.sources.local", paths=[str(tmp_path / "two")]), memory, False)
    assert changed and changed["files"] != here["files"]


def test_a_killed_conversion_goes_on_behind_its_last_shard(tmp_path, monkeypatch):
    sources = write_sources(tmp_path / "mine")
    params = {"source": "data.sources.local", "paths": [str(sources)], "shard_chars": 2000, "val_fraction": 0.1}
    straight, listing = run_download(tmp_path / "straight", **params)
    for kill_at in range(1, 8):  # each write in turn is the last one before the end
        with monkeypatch.context() as patched:
            _die_at_write(patched, kill_at)
            with pytest.raises(KeyboardInterrupt):
                run_download(tmp_path / f"killed{kill_at}", **params)
        with monkeypatch.context() as patched:
            written = _note_writes(patched)
            out, again = run_download(tmp_path / f"killed{kill_at}", **params)
        assert again == listing
        for name in [*listing["train"], "val.parquet"]:
            assert read(out / name) == read(straight / name)
        done_before = (kill_at - 1) // 2  # a validation part and a training shard each time
        assert len([name for name in written if name.startswith("shard_")]) == len(listing["train"]) - done_before


def _die_at_write(patched: pytest.MonkeyPatch, number: int) -> None:
    left = [number]

    def write(path, *rest):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        write_shard(path, *rest)

    patched.setattr(resplit, "write_shard", write)


def _note_writes(patched: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []

    def write(path, *rest):
        written.append(path.name)
        write_shard(path, *rest)

    patched.setattr(resplit, "write_shard", write)
    return written


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=30, unique=True),
    shard_chars=st.integers(1, 100),
    fraction=st.floats(0, 0.5),
)
def test_no_document_is_lost_or_in_two_shards(tmp_path_factory, texts, shard_chars, fraction):
    folder = tmp_path_factory.mktemp("resplit")
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    work = Resplit([folder / "in.jsonl"], "text", shard_chars, fraction, None, folder / "out", folder)
    (folder / "out").mkdir()
    if all(held_out(text, fraction) for text in texts[1:]):
        return
    assert work.run(lambda done: None, lambda: False)
    found = [text for path in (folder / "out").iterdir() for text in read(path)]
    assert sorted(found) == sorted(texts)


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"text": ', "is not JSON"),
        (b"[1]", "is not an object"),
        (b'{"body": "x"}', "has neither 'text' nor both 'prompt' and 'completion', but body"),
        (b'{"text": 3}', "a value that is not text"),
        (b'\xff{"text": "x"}', "is not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, said):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"mine.jsonl:3: .*{said}"):
        run_download(tmp_path / "work", source="data.sources.local", paths=[str(path)])


HALF_PAIRS = b"""{"text": "one \\ud83d"}
{"text": null}
{"text": "\xed\xa0\xbd two \\ud83d\\ude00"}
{"text": ""}
{"text": "three"}
"""
WHOLE = {"one \ufffd", "\ufffd two \U0001f600", "three"}


def half_pairs_as_parquet(path: Path) -> None:
    raw = pa.array([b"one \xed\xa0\xbd", None, b"\xed\xa0\xbd two \xf0\x9f\x98\x80", b"", b"three"])
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())}), path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
@pytest.mark.parametrize("val_shard", [None, "z.txt"])
def test_rows_without_text_are_skipped_and_half_characters_replaced_by_all_readers(tmp_path, name, val_shard):
    (folder := tmp_path / "mine").mkdir()
    (folder / "z.txt").write_text("the end")
    if name == "a.jsonl":
        (folder / name).write_bytes(HALF_PAIRS)
    elif name == "a.txt":
        (folder / name).write_bytes(b"one \xed\xa0\xbd\n\xed\xa0\xbd two \xf0\x9f\x98\x80\nthree\n")
    else:
        half_pairs_as_parquet(folder / name)
    out, listing = run_download(
        tmp_path / "work", source="data.sources.local", paths=[str(folder)], val_shard=val_shard
    )
    found = {text for shard in [*listing["train"], listing["val"]] for text in read(out / shard)}
    assert found == WHOLE | {"the end"}
    said = (tmp_path / "work" / "said.txt").read_text() if name != "a.parquet" or val_shard is None else ""
    if said:
        assert "halves of surrogate pairs replaced by U+FFFD: 2" in said
        assert ("rows without text skipped: 2" in said) == (name != "a.txt")


def compressed(text: bytes, how: str) -> bytes:
    return gzip.compress(text) if how == "gz" else pa.compress(text, "zstd", asbytes=True)


@pytest.mark.parametrize("how", ["gz", "zst", "GZ"])
def test_compressed_files_and_upper_case_names_are_read(tmp_path, how):
    (folder := tmp_path / "mine").mkdir()
    lines = b"".join(b'{"text": "document %d"}\n' % i for i in range(100))
    (folder / f"a.jsonl.{how}").write_bytes(compressed(lines[:999], how.lower()) + compressed(lines[999:], how.lower()))
    (folder / f"b.TXT.{how}").write_bytes(compressed(b"a story\n\nends", how.lower()))
    write_shard(folder / "C.PARQUET", ["from parquet"])
    out, listing = run_download(tmp_path / "work", source="data.sources.local", paths=[str(folder)])
    found = {text for shard in [*listing["train"], listing["val"]] for text in read(out / shard)}
    assert found == {f"document {i}" for i in range(100)} | {"a story\n\nends", "from parquet"}


def test_damaged_and_endless_files_are_named(tmp_path, monkeypatch):
    def said(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as raised:
            list(text_files.read_text(tmp_path / name, "text"))
        return str(raised.value)

    whole = gzip.compress(b'{"text": "a"}\n' * 5000)
    assert "a.jsonl.gz: is damaged after line" in said("a.jsonl.gz", whole[:-20])
    assert "a.txt.gz: is damaged after line 0" in said("a.txt.gz", b"no gzip")
    assert "a.txt.zst: is damaged after line 0" in said("a.txt.zst", whole)
    monkeypatch.setattr(text_files, "SMALL_UNPACKED", 1 << 20)
    assert "unpacks to more than 100 times its size" in said("b.txt.gz", gzip.compress(b"line\n" * 1_000_000))
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1 << 16)
    assert "c.txt:2: is longer than" in said("c.txt", b"a\n" + b"b" * 100_000)


def test_what_is_ignored_in_a_folder_is_named_and_counted(tmp_path):
    (folder := tmp_path / "mine").mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / ".git").mkdir()
    for name in ("LICENSE.txt", "readme.txt", "README-fr.txt", ".hidden.txt", ".git/x.txt", "a.csv", "b.parquet.gz"):
        (folder / name).write_text("not training text")
    out, listing = run_download(tmp_path / "work", source="data.sources.local", paths=[str(folder)])
    assert {text for shard in [*listing["train"], listing["val"]] for text in read(out / shard)} == {"one", "two"}
    said = (tmp_path / "work" / "said.txt").read_text()
    assert "files ignored: 7 (x.txt, .hidden.txt, LICENSE.txt" in said and "README" in said
    assert local.find_sources([str(folder / "readme.txt")])[0]  # named, it is taken


def test_a_txt_without_blank_lines_is_a_document_each_line(tmp_path):
    lines = [f"Line {i}: a short document." for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n\n")
    out, listing = run_download(tmp_path / "work", source="data.sources.local", paths=[str(tmp_path / "a.txt")])
    assert {text for shard in [*listing["train"], listing["val"]] for text in read(out / shard)} == set(lines)
    assert (
        "a.txt: lines read as one document each, as no blank line separates them: 50"
        in (tmp_path / "work" / "said.txt").read_text()
    )
    (tmp_path / "b.txt").write_text("A title\n\n" + "one line after another\n" * 100_000)
    pages = list(text_files.read_text(tmp_path / "b.txt", "text"))
    assert "\n".join(pages) == (tmp_path / "b.txt").read_text().strip("\n")
    assert max(map(len, pages)) < text_files.LONGEST_PAGE_CHARS + 100


def test_a_wrong_line_is_known_while_planning_once_a_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"body": "two"}\n')
    memory: dict = {}
    params = Params("data.sources.local", paths=[str(path)])
    with pytest.raises(DataError, match=r"a\.jsonl:2: has neither 'text'"):
        download.data_identity(params, memory, online=False)
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    found = download.data_identity(params, memory, online=False)
    monkeypatch.setattr(local, "read_text", None)  # what is remembered is not read again
    assert download.data_identity(params, memory, online=False) == found
    as_files = Params("data.sources.local", what="dataset", paths=[str(path)])
    assert download.data_identity(as_files, {}, online=False)["files"] == found["files"]


def test_a_damaged_position_starts_again(tmp_path):
    sources = write_sources(tmp_path / "mine")
    params = {"source": "data.sources.local", "paths": [str(sources)], "shard_chars": 2000}
    _, listing = run_download(tmp_path / "work", **params)
    for damage in ("", "[]", "{}", '{"source": "x", "document": 0, "shards": 1, "val_parts": [], "notes": {}}'):
        (tmp_path / "work" / "scratch" / "position.json").write_text(damage)
        assert run_download(tmp_path / "work", **params)[1] == listing


@pytest.mark.parametrize(
    "listing",
    ["", "[]", "{}", '{"train": ["../x"], "val": null, "column": "text"}', '{"train": [3], "column": "text"}'],
)
def test_a_list_of_shards_that_is_damaged_or_leaves_its_folder_is_refused(tmp_path, listing):
    (tmp_path / "shards.json").write_text(listing)
    with pytest.raises(DataError, match=r"is damaged|Refused"):
        read_listing(tmp_path)


def test_sources_that_cannot_be_read_are_named(tmp_path):
    def said(**params) -> str:
        work = Path(tempfile.mkdtemp(dir=tmp_path))
        with pytest.raises(DataError) as raised:
            run_download(work, source="data.sources.local", **params)
        return str(raised.value)

    whole = write_sources(tmp_path / "mine")
    assert "absent: there is no such file" in said(paths=[str(tmp_path / "absent")])
    assert "names no file" in said(paths=[])
    assert "ignored.csv: is not a" in said(paths=[str(whole / "ignored.csv")])
    assert "have one name" in said(paths=[str(whole), str(whole / "c.txt")])
    assert "has no column 'txt'. Did you mean data.column=text?" in said(paths=[str(whole / "a.parquet")], column="txt")
    assert "x.parquet is none of a.parquet, b.jsonl" in said(paths=[str(whole)], val_shard="x.parquet")
    assert "no document is left to train on" in said(paths=[str(whole / "c.txt")])
    (whole / "c.txt").write_bytes(b"fine\n\xff\n")
    assert "c.txt:2: is not UTF-8" in said(paths=[str(whole / "c.txt")])
    cut = (whole / "a.parquet").read_bytes()[:-100]
    (whole / "a.parquet").write_bytes(cut)
    assert "a.parquet: is a truncated or damaged parquet file" in said(paths=[str(whole)])
    assert "a.parquet: is a truncated or damaged parquet file" in said(paths=[str(whole)], val_shard="b.jsonl")


def test_a_file_that_changes_after_planning_is_not_taken_for_the_old_one(tmp_path):
    sources = write_sources(tmp_path / "mine")
    params = Params("data.sources.local", paths=[str(sources)])
    planned = local.identity(params, {}, False)
    (sources / "c.txt").write_text("something else")
    job = Job("download", "key", params, Launch(), {}, tmp_path / "work", tmp_path / "store", data_identity=planned)
    with pytest.raises(DataError, match=r"c.txt: has changed since"):
        download.main(job)


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 300 for i in range(60)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    out, listing = run_download(tmp_path / "w", source="data.sources.local", paths=[str(tmp_path / "book.txt")])
    found = read(out / "val.parquet") + [text for name in listing["train"] for text in read(out / name)]
    assert len(found) == 5 and sum(text.count("paragraph") for text in found) == 60


@pytest.fixture(scope="module")
def python_text(tmp_path_factory) -> tuple[Path, dict]:
    return run_download(tmp_path_factory.mktemp("pydocs") / "work", source="data.sources.pydocs")


def test_python_carries_megabytes_of_text_of_which_a_part_is_held_out(python_text):
    out, listing = python_text
    train = [text for name in listing["train"] for text in read(out / name)]
    val = read(out / listing["val"])
    assert len(listing["train"]) == pydocs.SHARDS
    assert 4e6 < sum(map(len, train)) < 20e6
    assert 0.01 < sum(map(len, val)) / sum(map(len, train)) < 0.1
    assert not set(val) & set(train)
    assert max(map(len, train)) < 2 * pydocs.PAGE_CHARS


def test_python_text_is_the_same_each_time(python_text, tmp_path):
    out, listing = python_text
    again, _ = run_download(tmp_path / "work", source="data.sources.pydocs")
    for name in [*listing["train"], listing["val"]]:
        assert (again / name).read_bytes() == (out / name).read_bytes()
    memory: dict = {}
    params = Params("data.sources.pydocs")
    assert pydocs.identity(params, memory, False) == pydocs.identity(params, memory, False)


def test_prose_and_code_of_a_module_are_apart_and_nothing_is_told_twice():
    import ast

    text = (
        '"""About."""\n# one\nx = 1\n\ndef f():\n    """Does it."""\n    # a\n    # b\n    # c\n    # d\n    return x\n'
    )
    prose, code = pydocs.split_module("m", ast.parse(text), text)
    assert prose == "m\n\nAbout.\n\nm.f\n\nDoes it.\n\na\nb\nc\nd\n"
    assert code == "# one\nx = 1\n\ndef f():\n    return x\n"


def test_a_stage_that_is_asked_to_stop_says_so(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "stop").touch()
    with pytest.raises(Stopped):
        run_download(tmp_path / "work", source="data.sources.pydocs")
