"""Text in parquet files, one document a row: reading, writing, and saying which file is damaged."""

import difflib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError, DataMistake

ROW_GROUP = 1024  # documents; what is decoded at a time


def documents(path: Path, column: str = "text") -> Iterator[list[str]]:
    """The texts of a shard in order, up to ROW_GROUP at a time; empty ones are left out.

    Raises DataError naming the file when it is no whole parquet file, or has no text in that column.
    """
    import pyarrow as pa

    file = _open(path, column)
    try:
        for batch in file.iter_batches(batch_size=ROW_GROUP, columns=[column]):
            texts = [text for text in batch.column(0).to_pylist() if text]
            if texts:
                yield texts
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def text_bytes(path: Path, column: str = "text") -> int:
    """Uncompressed bytes of the column as the file's own footer counts them: for progress, not for results."""
    metadata = _open(path, column).metadata
    at = metadata.schema.names.index(column)
    return sum(metadata.row_group(g).column(at).total_uncompressed_size for g in range(metadata.num_row_groups))


def check_shard(path: Path, column: str = "text") -> None:
    """Raise DataError if the file has no footer, as one cut off has not, or no text in that column."""
    _open(path, column)


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
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
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


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0].rstrip(".")
    return DataError(f"{path}: is a truncated or damaged parquet file ({reason}). Fetch or write it again.")
