"""Text in parquet files, one document a row: reading, writing, and saying which file is damaged."""

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.characters import decode, whole
from data.durable import read_json
from data.errors import DataError, DataMistake
from data.text.parquet import explained, open_parquet, read_batches
from data.trust import check_name

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 1024  # documents; what is decoded at a time
SKIPPED = "rows without text skipped"


def documents(path: Path, column: str = "text", notes: Counter[str] | None = None) -> Iterator[list[str]]:
    """The texts of a shard in order, up to ROW_GROUP at a time; empty ones are left out and counted in `notes`.

    Raises DataError naming the file when it is no whole parquet file, or has no text in that column.
    """
    _open(path, column)
    for batch in read_batches(path, [column], ROW_GROUP):
        texts = [text for text in _texts(batch.column(0), path, notes) if text]
        if notes is not None and len(texts) < batch.num_rows:
            notes[SKIPPED] += batch.num_rows - len(texts)
        if texts:
            yield texts


def _texts(values: "pa.Array", path: Path, notes: Counter[str] | None) -> list[str | None]:
    import pyarrow as pa

    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        pass
    with explained(path):
        raw = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        encoded = raw.cast(pa.large_binary()).to_pylist()
        return [None if text is None else whole(decode(text), notes) for text in encoded]


def text_bytes(path: Path, column: str = "text") -> int:
    """Uncompressed bytes of the column as the file's own footer counts them: for progress, not for results."""
    metadata = _open(path, column).metadata
    at = metadata.schema.names.index(column)
    return sum(metadata.row_group(g).column(at).total_uncompressed_size for g in range(metadata.num_row_groups))


def check_shard(path: Path, column: str = "text") -> None:
    """Raise DataError if the file has no footer, as one cut off has not, or no text in that column."""
    _open(path, column)


def read_listing(folder: Path) -> tuple[list[str], str | None, str]:
    """(the training shards, the one held out or None, the column) that shards.json lists. Raises DataError."""
    path = folder / "shards.json"
    listing = read_json(path, dict) or {}
    train, val, column = listing.get("train"), listing.get("val"), listing.get("column")
    if not isinstance(train, list) or not train or not isinstance(column, str):
        raise DataError(f"{path}: is damaged. Remove its artifact and run again.")
    for name in [*train, *([] if val is None else [val])]:
        check_name(name, str(path))
    return train, val, column


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation shard: by its own text, so it stays there when others are added."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def write_shard(path: Path, texts: Iterable[str], column: str = "text") -> None:
    """One parquet file of documents; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(path.name + ".tmp")
    table = pa.table({column: pa.array(texts, pa.string())})
    pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd")
    os.replace(temporary, path)


def _open(path: Path, column: str) -> Any:
    import pyarrow as pa

    file = open_parquet(path)
    if column not in file.schema_arrow.names:
        near = difflib.get_close_matches(column, file.schema_arrow.names, n=1)
        hint = f"Did you mean data.column={near[0]}?" if near else f"It has {', '.join(file.schema_arrow.names)}."
        raise DataMistake(f"{path}: has no column {column!r}. {hint}")
    if file.schema_arrow.names.count(column) > 1:
        raise DataMistake(f"{path}: has more than one column {column!r}. Name another as data.column.")
    kind = file.schema_arrow.field(column).type
    if pa.types.is_dictionary(kind):  # texts kept once each, as pandas writes a category
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataMistake(f"{path}: the column {column!r} holds {kind}, not text. Name another as data.column.")
    return file
