"""Documents of one text file: parquet, jsonl or txt."""

import json
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataMistake
from data.shards import documents

SUFFIXES = (".parquet", ".jsonl", ".txt")
PAGE_CHARS = 20_000  # a longer txt file is cut at blank lines into documents of about this size


def read_text(path: Path, column: str) -> Iterator[str]:
    """The documents of one file in order. Raises DataError with file and line."""
    if path.suffix == ".parquet":
        for texts in documents(path, column):
            yield from texts
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path, column)
    else:
        yield from _read_txt(path)


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                text = _document_of(line, column, f"{path}:{number}")
                if text:
                    yield text


def _document_of(line: bytes, column: str, where: str) -> str:
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
        names = ", ".join(row) or "nothing"
        raise DataMistake(f"{where}: has neither {column!r} nor both 'prompt' and 'completion', but {names}.")
    if not all(isinstance(part, str) for part in parts):
        raise DataMistake(f"{where}: holds something that is not text where text is needed.")
    text = _join(*parts) if len(parts) == 2 else parts[0]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataMistake(f"{where}: holds half of a surrogate pair, which is no character.") from None
    return text


def _join(prompt: str, completion: str) -> str:
    """Prompt and completion as one document, kept apart by white space if they bring none."""
    apart = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
    return prompt + ("" if apart else "\n") + completion


def _read_txt(path: Path) -> Iterator[str]:
    """The file as one document; a long one cut at blank lines."""
    paragraphs: list[str] = []
    size = 0
    for line in _lines(path):
        if not line.strip() and size >= PAGE_CHARS:
            page = "".join(paragraphs).strip("\n")
            if page:
                yield page
            paragraphs, size = [], 0
        paragraphs.append(line)
        size += len(line)
    rest = "".join(paragraphs).strip("\n")
    if rest:
        yield rest


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                raise DataMistake(f"{path}:{number}: is not UTF-8. Convert it, as with iconv -t utf-8.") from None
