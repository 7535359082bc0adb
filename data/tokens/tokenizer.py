"""The tokenizer of training and chat: byte-level BPE by tiktoken, from a tokenizer.json that other tools can load."""

import functools
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from data.errors import DataError

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
LONGEST_SPACE = 50_000  # characters; the regex engine's stack ends somewhere above a hundred thousand


class Tokenizer:
    """Encodes text as token ids and decodes them.

    special: the ids of SPECIAL_TOKENS by name. They are never read from text: encode turns "<|bos|>" into ordinary
    tokens.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], special: dict[str, int]):
        self.special = special
        self.bos = special["<|bos|>"]
        self.vocab_size = len(ranks) + len(special)
        self.encoding = tiktoken.Encoding(
            "chatmill", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=self.vocab_size
        )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load tokenizer.json from a folder. Raises DataError when it is missing or not one of ours."""
        path = folder / "tokenizer.json"
        try:
            document = json.loads(path.read_text("utf-8"))
            pattern = document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            special = {token["content"]: token["id"] for token in document["added_tokens"]}
            to_byte = {character: byte for byte, character in enumerate(byte_characters())}
            ranks = {
                bytes(map(to_byte.__getitem__, token)): rank
                for token, rank in document["model"]["vocab"].items()
                if token not in special
            }
            if missing := [name for name in SPECIAL_TOKENS if name not in special]:
                raise ValueError(f"it has no {missing[0]}")
            if sorted([*ranks.values(), *special.values()]) != list(range(len(ranks) + len(special))):
                raise ValueError("its ids are not unique and consecutive")
            return cls(pattern, ranks, special)
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such file.") from None
        except (KeyError, IndexError, TypeError, AttributeError, RecursionError, OSError, ValueError) as error:
            raise DataError(f"{path}: is not a byte-level BPE tokenizer of this project ({error!r:.200}).") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text. Half of a surrogate pair becomes U+FFFD."""
        if len(text) > LONGEST_SPACE and _LONG_SPACE.search(text):
            return [token for piece in _pieces(text) for token in self.encoding.encode_ordinary(piece)]
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of each text, in `threads` threads (the work holds no Python lock)."""
        if threads == 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        return self.encoding.decode(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: number of bytes of each token, 0 for special tokens. The divisor of bpb."""
        sizes = np.zeros(self.vocab_size, np.int32)
        special = set(self.special.values())
        for token in range(self.vocab_size):
            if token not in special:
                sizes[token] = len(self.encoding.decode_single_token_bytes(token))
        return sizes


def byte_characters() -> list[str]:
    """The printable character that represents each byte in tokenizer.json, as GPT-2 chose them.

    Printable Latin-1 bytes represent themselves, the others are characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


# Matches only at the start of a run: tried from each of its characters, a run that is too short would cost its length
# squared.
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_SPACE},}}")


def _pieces(text: str) -> list[str]:
    """The text cut within its longest runs of white space, as nothing else overflows the regex engine."""
    cuts = [0]
    for run in _LONG_SPACE.finditer(text):
        cuts += range(run.start() + LONGEST_SPACE, run.end(), LONGEST_SPACE)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)])]
