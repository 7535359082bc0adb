"""A parquet file decides neither how much memory its reader takes nor how the reader ends."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.tasks.task import Table
from data.text import parquet
from data.text.files import documents
from data.text.parquet import open_parquet, page_headers, read_batches
from tests.conftest import tries


def write(path: Path, texts: list[str | None], **options) -> Path:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, **options)
    return path


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"compression": "none"}, {"data_page_size": 100}])
def test_page_headers_say_what_the_footer_says(tmp_path, version, options):
    texts = [f"text {i % 50} " * 20 for i in range(2000)]
    path = write(
        tmp_path / "a.parquet", texts, row_group_size=700, data_page_version=version, write_statistics=False, **options
    )
    metadata = open_parquet(path).metadata
    with open(path, "rb") as raw:
        for number in range(metadata.num_row_groups):
            leaf = metadata.row_group(number).column(0)
            pages = list(page_headers(raw, leaf))
            assert sum(page["values"] for page in pages) == leaf.num_values
            sizes = sum(page["bytes"] for page in pages)
            assert sizes < leaf.total_uncompressed_size <= sizes + 100 * len(pages)  # which counts the headers, too
    assert [text for some in documents(path) for text in some] == texts


def test_a_page_that_unpacks_to_more_than_its_bytes_can_mean_is_refused_undecoded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "SMALL_PAGE", 1_000_000)
    path = write(tmp_path / "bomb.parquet", ["a" * 100_000] * 100, use_dictionary=False, compression="zstd")
    assert path.stat().st_size < 50_000
    before = pa.default_memory_pool().bytes_allocated()
    with pytest.raises(DataError, match=r"bomb\.parquet: has a page of .* that unpacks to .*Refused"):
        next(documents(path))
    assert pa.default_memory_pool().bytes_allocated() - before < 1_000_000
    with pytest.raises(DataError, match="unpacks to"):
        Table(tmp_path, "*.parquet", ["text"], None)


@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY"])
def test_a_text_that_is_kept_once_is_repeated_a_few_rows_at_a_time_and_not_for_ever(tmp_path, encoding, monkeypatch):
    options = {"dictionary_pagesize_limit": 1 << 30}
    if encoding != "dictionary":
        options = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    path = write(tmp_path / "repeated.parquet", ["b" * 100_000] * 500, compression="zstd", **options)
    monkeypatch.setattr(parquet, "LARGEST_BATCH", 1_000_000)
    monkeypatch.setattr(parquet, "SMALL_FILE", 10_000_000)
    sizes = []
    with pytest.raises(DataError, match=r"repeated\.parquet: unpacks to more than 100 times its size"):
        sizes += [batch.nbytes for batch in read_batches(path, ["text"], 1024)]
    for batch in itertools.islice(read_batches(path, ["text"], 1024), 5):
        assert batch.nbytes < 1_100_000


CHAT = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
NESTED = {
    "list": (pa.list_(pa.string()), lambda texts: texts),
    "struct of lists": (pa.struct({"text": pa.list_(pa.string())}), lambda texts: {"text": texts}),
    "list of structs": (CHAT, lambda texts: [{"role": "user", "content": text} for text in texts]),
    "list of lists": (pa.list_(pa.list_(pa.string())), lambda texts: [texts]),
    "map": (pa.map_(pa.string(), pa.string()), lambda texts: [("a", text) for text in texts]),
}


def write_nested(path: Path, kind: str, rows: list[list[str]], **options) -> Path:
    of, value = NESTED[kind]
    pq.write_table(pa.table({"text": pa.array([value(texts) for texts in rows], of)}), path, **options)
    return path


@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY"])
@pytest.mark.parametrize("kind", NESTED)
def test_a_row_whose_lists_repeat_a_text_for_ever_is_refused_undecoded(tmp_path, kind, encoding, monkeypatch):
    options = {} if encoding == "dictionary" else {"use_dictionary": False}
    if options:
        leaves = pq.ParquetFile(write_nested(tmp_path / "leaves", kind, [["a"]])).schema
        options["column_encoding"] = {leaves.column(i).path: encoding for i in range(len(leaves))}
    path = write_nested(tmp_path / "lists.parquet", kind, [["a"], ["b" * 1_000_000] * 200], **options)
    monkeypatch.setattr(parquet, "LARGEST_BATCH", 20_000_000)
    own, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)
    try:
        with pytest.raises(DataError, match=r"lists\.parquet: has .*Refused"):
            list(read_batches(path, ["text"], 1024))
    finally:
        pa.set_memory_pool(own)
    assert counted.max_memory() < 20_000_000


@pytest.mark.parametrize("kind", NESTED)
def test_lists_that_repeat_texts_are_read_a_few_rows_at_a_time(tmp_path, kind, monkeypatch):
    rows = [["b" * 10_000] * (i % 7) for i in range(300)]
    path = write_nested(tmp_path / "lists.parquet", kind, rows)
    monkeypatch.setattr(parquet, "LARGEST_BATCH", 200_000)
    batches = list(read_batches(path, ["text"], 1024))
    assert max(batch.nbytes for batch in batches) < 210_000
    assert [text for batch in batches for text in batch.column(0).to_pylist()] == [NESTED[kind][1](row) for row in rows]


def test_large_row_groups_of_ordinary_text_are_read(tmp_path, monkeypatch):
    texts = [f"{i} " * 100 for i in range(5000)]
    path = write(tmp_path / "a.parquet", texts, data_page_size=10_000)
    monkeypatch.setattr(parquet, "LARGEST_BATCH", 100_000)
    batches = list(read_batches(path, ["text"], 1024))
    assert len(batches) > 10
    assert [text for batch in batches for text in batch.column(0).to_pylist()] == texts


@settings(max_examples=tries(300))
@given(st.data())
def test_a_damaged_file_is_read_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    path = write(folder / "damaged.parquet", [json.dumps(i) * 9 for i in range(200)], row_group_size=80)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        for some in documents(path):
            assert all(isinstance(text, str) for text in some)
    except DataError as error:
        assert str(error).isprintable()
