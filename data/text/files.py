"""Documents of one text file: parquet, jsonl or txt, the latter two also compressed (.gz, .zst)."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.characters import decode, whole
from data.errors import DataMistake
from data.text.shards import SKIPPED, documents

KINDS = (".parquet", ".jsonl", ".txt")
COMPRESSIONS = {"": None, ".gz": "gzip", ".zst": "zstd"}
READ = "parquet, jsonl, txt, jsonl.gz, jsonl.zst, txt.gz or txt.zst"
ABOUT = re.compile(r"(licen[cs]e|readme|copying|notice)\b", re.IGNORECASE)  # files about a data set, not of it
PAGE_CHARS = 20_000  # a longer txt file is cut at blank lines into documents of about this size
LONGEST_PAGE_CHARS = 200_000  # without blank lines, it is cut at a line end
LONGEST_LINE = 256 << 20  # bytes
MOST_EXPANSION = 100  # of a compressed file, past SMALL_UNPACKED
SMALL_UNPACKED = 1 << 30
LINES = "lines read as one document each, as no blank line separates them"


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
        yield from _read_jsonl(path, column, notes)
    else:
        yield from _read_txt(path, notes)


def _read_jsonl(path: Path, column: str, notes: Counter[str]) -> Iterator[str]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        text = whole(_document_of(line, column, f"{path}:{number}"), notes)
        if text:
            yield text
        else:
            notes[SKIPPED] += 1


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
        raise DataMistake(f"{where}: holds something that is not text where text is needed.")
    return _join(*parts) if len(parts) == 2 else parts[0]


def _join(prompt: str, completion: str) -> str:
    """Prompt and completion as one document, kept apart by white space if they bring none."""
    apart = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return prompt + ("" if apart else "\n") + completion


def _read_txt(path: Path, notes: Counter[str]) -> Iterator[str]:
    """The file as one document, cut at blank lines if it is long; without blank lines, each line is a document."""
    if not _has_paragraphs(path):
        for line in _texts(path, notes):
            if line.strip():
                notes[LINES] += 1
                yield line.strip("\n")
        if notes[LINES] == 1:
            del notes[LINES]
        return
    paragraphs: list[str] = []
    size = 0
    for line in _texts(path, notes):
        if (not line.strip() and size >= PAGE_CHARS) or size >= LONGEST_PAGE_CHARS:
            page = "".join(paragraphs).strip("\n")
            if page:
                yield page
            paragraphs, size = [], 0
        paragraphs.append(line)
        size += len(line)
    rest = "".join(paragraphs).strip("\n")
    if rest:
        yield rest


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


def _texts(path: Path, notes: Counter[str]) -> Iterator[str]:
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
        with open_unpacked(path) as file:
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


def open_unpacked(path: Path) -> Any:
    """The file's bytes, decompressed as its name says, as a buffered binary file."""
    _, packed = kind_of(path) or ("", None)
    if packed is None:
        return open(path, "rb")
    import io

    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression=packed), 1 << 16)  # type: ignore[arg-type]
