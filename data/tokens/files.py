"""Token files: shards of text as token ids, made once for each tokenizer and shard."""

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.durable import file_sha256, locked, read_fields, remove, sync, write_json
from data.errors import DataError
from data.text.files import documents
from data.tokens.tokenizer import Tokenizer

PARTS = ("tokens.npy", "offsets.npy")
FORMAT = 1  # of the files and of tokenisation; part of their path


@dataclass
class TokenFile:
    """A tokenised shard: `folder` has tokens.npy (flat ids) and offsets.npy (int64 starts, and the end)."""

    folder: str
    shard_sha256: str
    tokens: int
    documents: int
    sha256: dict[str, str]  # of the two files


NONE = TokenFile("", "", 0, 0, {})


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 as long as every id fits."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def tokenizer_key(tokenizer_folder: Path, column: str) -> str:
    """16 hex digits of all that the tokens depend on besides the shard."""
    content = f"{FORMAT} {column} {file_sha256(tokenizer_folder / 'tokenizer.json')}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def tokenize_shard(
    shard: Path, column: str, tokenizer_folder: Path, root: Path, on_text: Callable[[int, int], None]
) -> TokenFile:
    """The token files of `shard` under root/TOKENIZER_KEY/SHARD_SHA256: the existing ones if complete, else new ones.

    Every document starts with <|bos|>. on_text(bytes of UTF-8, tokens) is called after each batch of documents.
    Raises DataError for a damaged shard or one without text.
    """
    sha256 = file_sha256(shard)
    parent = root / tokenizer_key(tokenizer_folder, column)
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / sha256
    with locked(parent / f"{sha256}.lock"):
        if kept := _complete(folder):
            return kept
        aside = parent / f"{sha256}.tmp"
        for leftover in (folder, aside):
            remove(leftover)
        aside.mkdir()
        offsets = _write_tokens(shard, column, _tokenizer(tokenizer_folder), aside / "tokens.npy", on_text)
        np.save(aside / "offsets.npy", offsets)
        made = TokenFile(
            folder=str(folder),
            shard_sha256=sha256,
            tokens=int(offsets[-1]),
            documents=len(offsets) - 1,
            sha256={name: file_sha256(aside / name) for name in PARTS},
        )
        write_json(aside / "shard.json", asdict(made))
        for path in aside.iterdir():
            sync(path)
        os.rename(aside, folder)
    return made


def _write_tokens(
    shard: Path, column: str, tokenizer: Tokenizer, path: Path, on_text: Callable[[int, int], None]
) -> np.ndarray:
    """Write the flat token file, batch by batch; returns the offsets (documents + 1,) int64."""
    dtype = token_dtype(tokenizer.vocab_size)
    lengths: list[int] = []
    with open(path, "wb") as file:
        _write_header(file, dtype, 0)
        for texts in documents(shard, column):
            encoded = tokenizer.encode_batch(texts)
            flat = np.empty(sum(map(len, encoded)) + len(encoded), dtype)
            at = 0
            for ids in encoded:
                flat[at] = tokenizer.bos
                flat[at + 1 : at + 1 + len(ids)] = ids
                at += 1 + len(ids)
                lengths.append(1 + len(ids))
            flat.tofile(file)
            on_text(sum(len(text.encode("utf-8", "replace")) for text in texts), len(flat))
        if not lengths:
            raise DataError(f"{shard}: has no text in the column {column!r}.")
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        file.seek(0)
        _write_header(file, dtype, int(offsets[-1]))
    return offsets


def _write_header(file, dtype: np.dtype, length: int) -> None:
    """The .npy header of a one-dimensional array, padded by numpy so that a longer length needs no more room."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _complete(folder: Path) -> TokenFile | None:
    """The files of a finished folder if their bytes are still those that were written."""
    try:
        kept = TokenFile(**read_fields(folder / "shard.json", asdict(NONE)) | {"folder": str(folder)})
        return kept if all(file_sha256(folder / name) == kept.sha256.get(name) for name in PARTS) else None
    except OSError:
        return None


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)
