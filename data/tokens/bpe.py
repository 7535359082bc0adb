"""Making a byte-level BPE vocabulary: training by rustbpe, and the file that tiktoken and tokenizers both load."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.errors import DataMistake
from data.tokens.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_characters
from data.tokens.word_counts import SEPARATOR, count_words, repeated

# GPT-4's split, with numbers cut into at most two digits instead of three: small vocabularies have no room for more.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SMALLEST = 256 + len(SPECIAL_TOKENS)


def train(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """learn() from the words of some texts."""
    return learn(count_words(texts, PATTERN), vocab_size)


def learn(
    counts: Counter[str], vocab_size: int, on_chars: Callable[[int], None] = lambda count: None, exact: bool = True
) -> dict[bytes, int]:
    """Tokens and their ranks from counted words: the 256 bytes, then the merges in the order they were learnt.

    vocab_size counts SPECIAL_TOKENS too. on_chars is told of text that is read, and may raise to stop. Raises
    DataError when vocab_size is too small or, if it is `exact`, when the text gives fewer tokens.
    """
    import rustbpe

    check_vocab_size(vocab_size)
    trainer = rustbpe.Tokenizer()
    ordinary = vocab_size - len(SPECIAL_TOKENS)
    pieces = _told(repeated(counts), on_chars)
    trainer.train_from_iterator(pieces, vocab_size=ordinary, buffer_size=128, pattern=f"[^{SEPARATOR}]+")
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if exact and len(ranks) < ordinary:
        raise DataMistake(
            f"tokenizer.params.vocab_size: {vocab_size} is more than the text gives: it has room for "
            f"{len(ranks) + len(SPECIAL_TOKENS)} tokens. Ask for fewer, leave it out, or train on more text."
        )
    return ranks


def _told(pieces: Iterator[str], on_chars: Callable[[int], None]) -> Iterator[str]:
    for piece in pieces:
        yield piece
        on_chars(len(piece))


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST:
        raise DataMistake(
            f"tokenizer.params.vocab_size: {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens make {SMALLEST}."
        )


def save(ranks: dict[bytes, int], folder: Path) -> Tokenizer:
    """Write tokenizer.json and token_bytes.npy; returns the tokenizer read back from them."""
    import numpy as np

    text = json.dumps(tokenizer_json(ranks), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, "utf-8")
    tokenizer = Tokenizer.load(folder)
    np.save(folder / "token_bytes.npy", tokenizer.token_bytes)
    return tokenizer


def tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The vocabulary in the format of Hugging Face tokenizers, special tokens after the merges."""
    characters = byte_characters()

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(len(ranks) + i, name) for i, name in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is that token, as in tiktoken
            "vocab": {spell(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])},
            "merges": [[spell(left), spell(right)] for left, right in merges(ranks)],
        },
    }


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """All pairs of tokens that make a token, by its rank.

    tiktoken joins any two neighbours whose bytes together are a token, not only the pair it was learnt from; listing
    every such pair makes `tokenizers` do the same.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                yield token[:cut], token[cut:]


def _special(token: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": name, **flags}
