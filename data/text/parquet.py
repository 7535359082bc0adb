"""Parquet files from others, decoded batch by batch within bounds on memory.

A page's header announces its unpacked size, and the decoder enforces it. The headers are therefore read before anything
is decoded: a few kilobytes of pages, or one text that a dictionary repeats, could otherwise fill the memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data.errors import DataError
from data.trust import is_size

if TYPE_CHECKING:
    import pyarrow as pa

MOST_EXPANSION = 100  # times the compressed bytes; text shrinks to a third, repeated text to a twentieth
SMALL_PAGE = 64 << 20  # bytes that a page may have whatever its compressed bytes
SMALL_FILE = 1 << 30  # the same for a file's columns
LARGEST_BATCH = 256 << 20  # bytes of values decoded at a time, unless a single value is larger
LARGEST_HEADER = 16 << 20
MOST_LISTED = 1 << 26  # values in the lists of a column chunk: a single row may have all of them
EXPANDING = {"PLAIN_DICTIONARY", "RLE_DICTIONARY", "DELTA_BYTE_ARRAY"}  # values may be longer than their bytes


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors into DataErrors that name the file."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{path}: is a truncated or damaged parquet file ({reason}). Fetch or write it again."
        ) from None


def open_parquet(path: Path) -> Any:
    """The file as a pyarrow ParquetFile, its footer read. Raises DataError."""
    import pyarrow.parquet as pq

    with explained(path):
        return pq.ParquetFile(path, pre_buffer=False)


def read_batches(path: Path, columns: list[str], rows: int) -> Iterator["pa.RecordBatch"]:
    """The values of `columns`, up to `rows` rows at a time, fewer where they could exceed LARGEST_BATCH.

    Raises DataError for a damaged file, a page that unpacks to more than SMALL_PAGE and MOST_EXPANSION times its size,
    a row whose lists repeat texts to more than LARGEST_BATCH, and for a file whose columns unpack to more than
    SMALL_FILE and MOST_EXPANSION times its size.
    """
    file = open_parquet(path)
    most = max(SMALL_FILE, MOST_EXPANSION * path.stat().st_size)
    with explained(path), open(path, "rb") as raw:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            leaves = [group.column(i) for i in range(group.num_columns)]
            chosen = [leaf for leaf in leaves if leaf.path_in_schema.partition(".")[0] in columns]
            at_once = rows
            for leaf in chosen:
                fitting = _rows_at_once(raw, leaf, path)
                if fitting < leaf.num_values and _is_listed(file, leaf):
                    fitting = _rows_of_lists(path, number, leaf, min(fitting, at_once))
                at_once = min(at_once, fitting)
            for batch in file.iter_batches(at_once, [number], columns, use_threads=False):
                most -= batch.nbytes
                if most < 0:
                    raise DataError(f"{path}: unpacks to more than {MOST_EXPANSION} times its size. Refused.")
                yield batch


def _rows_at_once(raw: BinaryIO, leaf: Any, path: Path) -> int:
    """Number of values of a column chunk to decode at once. Raises DataError for a page that expands too much."""
    total = longest = 0
    for page in page_headers(raw, leaf):
        if page["bytes"] > max(SMALL_PAGE, MOST_EXPANSION * page["compressed"]):
            raise DataError(
                f"{path}: has a page of {page['compressed']:,} bytes that unpacks to {page['bytes']:,}. Refused."
            )
        total += page["bytes"]
        longest = max(longest, page["bytes"])
    if EXPANDING & set(leaf.encodings):
        total = leaf.num_values * longest
    return leaf.num_values or 1 if total <= LARGEST_BATCH else max(1, LARGEST_BATCH // longest)


def _is_listed(file: Any, leaf: Any) -> bool:
    """Return True for a column chunk in which one row can have many values."""
    columns = (file.schema.column(i) for i in range(len(file.schema)))
    return any(column.path == leaf.path_in_schema and column.max_repetition_level for column in columns)


def _rows_of_lists(path: Path, group: int, leaf: Any, rows: int) -> int:
    """Number of rows, at most `rows`, of a column chunk of lists to decode at once. Raises DataError.

    No page header announces how many values a row has, so they are counted, with each text in memory only once.
    """
    if leaf.num_values > MOST_LISTED or "DELTA_BYTE_ARRAY" in leaf.encodings:  # which has no dictionary
        raise DataError(f"{path}: has lists in {leaf.path_in_schema} whose size cannot be known in advance. Refused.")
    while (largest := max(_list_bytes(path, group, leaf.path_in_schema, rows), default=0)) > LARGEST_BATCH:
        if rows == 1:
            raise DataError(f"{path}: has a row that unpacks to {largest:,} bytes of {leaf.path_in_schema}. Refused.")
        rows = max(1, min(rows - 1, rows * LARGEST_BATCH // largest))
    return rows


def _list_bytes(path: Path, group: int, leaf: str, rows: int) -> Iterator[int]:
    """Bytes of the texts in each `rows` rows of a column of lists, repetitions included."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, pre_buffer=False, read_dictionary=[leaf])
    for batch in file.iter_batches(rows, [group], [leaf], use_threads=False):
        values: Any = batch.column(0)
        while pa.types.is_nested(values.type):
            values = values.flatten()[0] if pa.types.is_struct(values.type) else values.flatten()
        if pa.types.is_dictionary(values.type):
            yield pc.sum(pc.take(pc.binary_length(values.dictionary), values.indices)).as_py() or 0
        else:
            yield values.nbytes  # numbers


def page_headers(raw: BinaryIO, leaf: Any) -> Iterator[dict[str, int]]:
    """{"bytes": unpacked, "compressed", "values"} of each page of a column chunk, dictionaries included.

    Raises ValueError for anything but page headers.
    """
    at = leaf.data_page_offset
    if leaf.has_dictionary_page and 0 < leaf.dictionary_page_offset < at:
        at = leaf.dictionary_page_offset
    end, values = at + leaf.total_compressed_size, 0
    while at < end and values < leaf.num_values:
        header, length = _header_at(raw, at)
        # Fields of PageHeader in the format's parquet.thrift; 5 and 8 describe a data page of version 1 and 2.
        data = header.get(5) or header.get(8)
        counted = data.get(1) if isinstance(data, dict) else 0
        page: dict[str, Any] = {"bytes": header.get(2), "compressed": header.get(3), "values": counted}
        if not all(map(is_size, page.values())):
            raise ValueError("a page header without sizes")
        yield page
        at += length + page["compressed"]
        values += page["values"]


def _header_at(raw: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """The Thrift struct at an offset, and its length."""
    window = 4096  # usually some 50 bytes; statistics in it may hold whole values
    while True:
        raw.seek(at)
        content = raw.read(window)
        try:
            return _struct(content, 0, 0)
        except IndexError:
            if len(content) < window or window >= LARGEST_HEADER:
                raise ValueError("a page header without an end") from None
        window *= 4


def _struct(content: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol: its values by field number, and its end."""
    found: dict[int, Any] = {}
    field = 0
    while True:
        delta, kind = divmod(content[at], 16)
        at += 1
        if kind == 0:
            return found, at
        if delta:
            field += delta
        else:
            number, at = _varint(content, at)
            field = number >> 1 ^ -(number & 1)
        found[field], at = _value(kind, content, at, depth)


def _value(kind: int, content: bytes, at: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # a boolean, its value in the kind
        return kind == 1, at
    if kind == 3:
        return content[at], at + 1
    if kind in (4, 5, 6):  # zigzag
        number, at = _varint(content, at)
        return number >> 1 ^ -(number & 1), at
    if kind == 8:
        length, at = _varint(content, at)
        content[at + length - 1] if length else None  # IndexError where it is not all here
        return None, at + length
    if kind == 12 and depth < 8:
        return _struct(content, at, depth + 1)
    raise ValueError("a page header of another kind")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        number |= (content[at] & 0x7F) << shift
        at += 1
        if content[at - 1] < 0x80:
            return number, at
    raise ValueError("a number without an end")
