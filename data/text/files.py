"""Documents in files: parquet (also written: "shards"), jsonl or txt, the latter two also compressed (.gz, .zst).

Text may contain half of a surrogate pair, which is not a character: all readers replace it by U+FFFD.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.durable import read_json
from data.errors import DataError, DataMistake, did_you_mean
from data.text.parquet import explained, open_parquet, read_batches
from data.trust import HALF, check_name

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = (".parquet", ".jsonl", ".txt")
COMPRESSIONS = {"": None, ".gz": "gzip", ".zst": "zstd"}
READ = "parquet, jsonl, txt, jsonl.gz, jsonl.zst, txt.gz or txt.zst"
ABOUT = re.compile(r"(licen[cs]e|readme|copying|notice)\b", re.IGNORECASE)  # files about a data set, not of it
ROW_GROUP = 1024  # documents of a shard that are decoded at a time
PAGE_CHARS = 20_000  # a longer txt file is cut at blank lines into documents of about this size
LONGEST_PAGE_CHARS = 200_000  # without blank lines, it is cut at a line end
LONGEST_LINE = 256 << 20  # bytes
MOST_EXPANSION = 100  # of a compressed file, past SMALL_UNPACKED
SMALL_UNPACKED = 1 << 30
# What readers count in their notes:
SKIPPED = "rows without text skipped"
LINES = "lines read as one document each, as no blank line separates them"
HALVES = "halves of surrogate pairs replaced by U+FFFD"


# --- characters


def whole(text: str, notes: Counter[str] | None = None) -> str:
    """`text` with U+FFFD in place of each half of a surrogate pair, counted in `notes`."""
    text, found = HALF.subn("\ufffd", text)
    if found and notes is not None:
        notes[HALVES] += found
    return text


def whole_all(value: Any, notes: Counter[str] | None = None) -> Any:
    """`whole` of every text in a JSON value, names included; encoded texts are decoded. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        value = decode(value)
    if isinstance(value, str):
        return whole(value, notes)
    if isinstance(value, list):
        return [whole_all(item, notes) for item in value]
    if isinstance(value, dict):
        return {whole(name, notes): whole_all(item, notes) for name, item in value.items()}
    return value


def decode(content: bytes) -> str:
    """Decode UTF-8 that may also encode halves of surrogate pairs. Raises UnicodeDecodeError for anything else."""
    return content.decode("utf-8", "surrogatepass")


def counted(notes: dict[str, int]) -> str:
    """A reader's notes with their counts, on one line; empty if there are none."""
    return ", ".join(f"{what}: {number:,}" for what, number in notes.items() if number)


# --- shards


def open_shard(path: Path, column: str) -> Any:
    """The file as a pyarrow ParquetFile. Raises DataError for a truncated file, and for no text in that column."""
    import pyarrow as pa

    file = open_parquet(path)
    names = file.schema_arrow.names
    if column not in names:
        hint = did_you_mean(column, names, f"It has {', '.join(names)}.", "data.column=")
        raise DataMistake(f"{path}: has no column {column!r}. {hint}")
    if names.count(column) > 1:
        raise DataMistake(f"{path}: has more than one column {column!r}. Name another as data.column.")
    kind = file.schema_arrow.field(column).type
    if pa.types.is_dictionary(kind):  # each text is stored once, as pandas writes a category
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataMistake(f"{path}: the column {column!r} contains {kind}, not text. Name another as data.column.")
    return file


def documents(path: Path, column: str = "text", notes: Counter[str] | None = None) -> Iterator[list[str]]:
    """The texts of a shard in order, up to ROW_GROUP at a time; empty ones are left out and counted in `notes`.

    Raises DataError as `open_shard` does.
    """
    open_shard(path, column)
    for batch in read_batches(path, [column], ROW_GROUP):
        texts = [text for text in _texts_of(batch.column(0), path, notes) if text]
        if notes is not None and len(texts) < batch.num_rows:
            notes[SKIPPED] += batch.num_rows - len(texts)
        if texts:
            yield texts


def _texts_of(values: "pa.Array", path: Path, notes: Counter[str] | None) -> list[str | None]:
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
    """Uncompressed bytes of the column according to the file's footer: for progress, not for results."""
    metadata = open_shard(path, column).metadata
    at = metadata.schema.names.index(column)
    return sum(metadata.row_group(g).column(at).total_uncompressed_size for g in range(metadata.num_row_groups))


def read_listing(folder: Path) -> tuple[list[str], str | None, str]:
    """(training shards, validation shard or None, column) according to shards.json. Raises DataError."""
    path = folder / "shards.json"
    listing = read_json(path, dict) or {}
    train, val, column = listing.get("train"), listing.get("val"), listing.get("column")
    if not isinstance(train, list) or not train or not isinstance(column, str):
        raise DataError(f"{path}: is damaged. Remove its artifact and run again.")
    for name in train if val is None else [*train, val]:
        check_name(name, str(path))
    return train, val, column


def held_out(text: str, fraction: float) -> bool:
    """Return True if a document belongs to the validation shard. Its own text decides, whatever others are added."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def write_shard(path: Path, texts: Iterable[str], column: str = "text") -> None:
    """Write documents to one parquet file, which appears complete or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(path.name + ".tmp")
    table = pa.table({column: pa.array(texts, pa.string())})
    pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd")
    os.replace(temporary, path)


# --- files of any kind


def kind_of(path: Path) -> tuple[str, str | None] | None:
    """(".parquet", ".jsonl" or ".txt"; "gzip", "zstd" or None) by a file's name; None for other files."""
    name = path.name.lower()
    packed = next((suffix for suffix in (".gz", ".zst") if name.endswith(suffix)), "")
    kind = Path(name.removesuffix(packed)).suffix
    if kind not in KINDS or (packed and kind == ".parquet"):
        return None
    return kind, COMPRESSIONS[packed]


def read_text(path: Path, column: str, notes: Counter[str] | None = None) -> Iterator[str]:
    """The documents of one file in order. Raises DataError with file and line.

    notes: counts what was skipped, replaced or split, by kind.
    """
    notes = Counter() if notes is None else notes
    kind, _ = kind_of(path) or (".txt", None)
    if kind == ".parquet":
        for texts in documents(path, column, notes):
            yield from texts
    elif kind == ".jsonl":
        for number, line in numbered_lines(path):
            if line.strip():
                text = whole(_document_of(line, column, f"{path}:{number}"), notes)
                if text:
                    yield text
                else:
                    notes[SKIPPED] += 1
    else:
        yield from _read_txt(path, notes)


def _document_of(line: bytes, column: str, where: str) -> str:
    """The text of a line; "" where it is null."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # the second: lists in lists in lists
        raise DataMistake(f"{where}: is not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise DataMistake(f"{where}: is not an object with {column!r}, or with 'prompt' and 'completion'.")
    if column in row:
        parts = [row[column]]
    elif "prompt" in row and "completion" in row:
        parts = [row["prompt"], row["completion"]]
    else:
        names = ", ".join(row)[:200] or "nothing"
        raise DataMistake(f"{where}: has neither {column!r} nor both 'prompt' and 'completion', but {names}.")
    if any(part is None for part in parts):
        return ""
    if not all(isinstance(part, str) for part in parts):
        raise DataMistake(f"{where}: contains a value that is not text where text is expected.")
    if len(parts) == 2:
        prompt, completion = parts
        separated = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
        return prompt + ("" if separated else "\n") + completion
    return parts[0]


def _read_txt(path: Path, notes: Counter[str]) -> Iterator[str]:
    """The file as one document, cut at blank lines if it is long; without blank lines, each line is a document."""
    if not _has_paragraphs(path):
        for line in _lines_of_text(path, notes):
            if line.strip():
                notes[LINES] += 1
                yield line.strip("\n")
        if notes[LINES] == 1:
            del notes[LINES]
        return
    lines: list[str] = []
    size = 0
    for line in _lines_of_text(path, notes):
        if (not line.strip() and size >= PAGE_CHARS) or size >= LONGEST_PAGE_CHARS:
            if page := "".join(lines).strip("\n"):
                yield page
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if page := "".join(lines).strip("\n"):
        yield page


def _has_paragraphs(path: Path) -> bool:
    """Return True if a blank line separates two lines with text."""
    text = gap = False
    for _, line in numbered_lines(path):
        if not line.strip():
            gap = text
        elif gap:
            return True
        else:
            text = True
    return False


def _lines_of_text(path: Path, notes: Counter[str]) -> Iterator[str]:
    for number, line in numbered_lines(path):
        try:
            text = decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except UnicodeDecodeError:
            raise DataMistake(f"{path}:{number}: is not UTF-8. Convert it, as with iconv -t utf-8.") from None
        yield whole(text.replace("\r\n", "\n"), notes)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a file, unpacked. Raises DataError for a line or file that is too long, and for damage."""
    number = 0
    try:
        left = max(SMALL_UNPACKED, MOST_EXPANSION * path.stat().st_size)
        with _open_unpacked(path) as file:
            while line := file.readline(LONGEST_LINE):
                number, left = number + 1, left - len(line)
                if len(line) == LONGEST_LINE:
                    raise DataMistake(f"{path}:{number}: is longer than {LONGEST_LINE >> 20} MB. Split it.")
                if left < 0:
                    raise DataMistake(f"{path}: unpacks to more than {MOST_EXPANSION} times its size. Refused.")
                yield number, line
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataMistake(f"{path}: cannot be read ({error.strerror}).") from None
        reason = (str(error).splitlines() or ["it ends too early"])[0].rstrip(".")
        raise DataMistake(f"{path}: is damaged after line {number} ({reason}). Compress it again.") from None


def _open_unpacked(path: Path) -> Any:
    """The file's bytes, decompressed according to its name, as a buffered binary file."""
    _, packed = kind_of(path) or ("", None)
    if packed is None:
        return open(path, "rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=packed), 1 << 16)  # type: ignore[arg-type]
