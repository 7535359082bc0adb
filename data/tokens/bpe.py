"""Training a byte-level BPE vocabulary: words are counted shard by shard, rustbpe learns the merges from the counts.

Counting is most of the work; it can be distributed and resumed. What is learnt from the counts is what rustbpe learns
from the text itself. A "word" is a piece of text that no token may cross. The vocabulary is written as a file that
tiktoken and tokenizers can load.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import put_in_place
from data.errors import DataMistake
from data.text.files import documents
from data.tokens.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_characters

# GPT-4's split, with numbers cut into at most two digits instead of three: small vocabularies have no room for more.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SMALLEST = 256 + len(SPECIAL_TOKENS)
HELD_OUT_EVERY = 50  # documents of the shard that some are held out of
REPORT_EVERY = 64  # documents
SEPARATOR = "\U0010ffff"  # not a character, so no text has it; a word with it is left out
PIECE_CHARS = 1 << 18


# --- counting words


@dataclass(frozen=True)
class ShardText:
    """The part of a shard to read: documents cut to doc_cap characters, max_chars of them together.

    held_out_chars: of the first documents, every HELD_OUT_EVERY-th is kept back until they have so many characters.
    """

    path: Path
    column: str
    doc_cap: int
    max_chars: int
    held_out_chars: int = 0

    def parts(self) -> Iterator[tuple[str, bool]]:
        """(text, True if it is held out)."""
        read = held_chars = number = 0
        for texts in documents(self.path, self.column):
            for text in texts:
                text, held = text[: self.doc_cap], number % HELD_OUT_EVERY == 0 and held_chars < self.held_out_chars
                number += 1
                held_chars += held * len(text)
                read += (not held) * len(text)
                yield text, held
                if read >= self.max_chars:
                    return

    def held_out(self) -> Iterator[str]:
        left = self.held_out_chars
        for text, held in self.parts():
            if left <= 0:
                return
            if held:
                left -= len(text)
                yield text


def count_words(texts: Iterable[str], pattern: str) -> Counter[str]:
    """Matches of the pattern, which is in Rust's dialect: there \\s is Unicode's White_Space and no more.

    A character newer than rustbpe's Unicode may be a letter here and none there; it is split from its neighbours
    accordingly.
    """
    import regex

    split = regex.compile(pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")).findall
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(text))
    return counts


def count_shard(shard: ShardText, pattern: str, kept: Path, report: Callable[[int], None]) -> None:
    """Write the counts of a shard to the parquet file `kept`, unless it exists. Reports characters that are done."""
    if kept.exists():
        report(shard.max_chars)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts = count_words(_reported(shard, report), pattern)
    temporary = kept.with_name(kept.name + ".tmp")
    words = pa.array(counts.keys(), pa.large_string())
    pq.write_table(pa.table({"word": words, "count": pa.array(counts.values(), pa.int64())}), temporary)
    put_in_place(temporary, kept)


def _reported(shard: ShardText, report: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for number, (text, held) in enumerate(shard.parts()):
        if not held:
            yield text
            done += len(text)
        if number % REPORT_EVERY == 0:
            report(done)
            done = 0
    report(done)


def read_counts(path: Path) -> Counter[str]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return Counter(dict(zip(table["word"].to_pylist(), table["count"].to_pylist())))


# --- learning merges


def train(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """learn() from the words of some texts."""
    return learn(count_words(texts, PATTERN), vocab_size)


def learn(
    counts: Counter[str], vocab_size: int, on_chars: Callable[[int], None] = lambda count: None, exact: bool = True
) -> dict[bytes, int]:
    """Tokens and their ranks from counted words: the 256 bytes, then the merges in the order in which they are learnt.

    vocab_size includes SPECIAL_TOKENS. on_chars receives the number of characters read, and may raise to stop. Raises
    DataError when vocab_size is too small or, if it is `exact`, when the text yields fewer tokens.
    """
    import rustbpe

    check_vocab_size(vocab_size)
    trainer = rustbpe.Tokenizer()
    ordinary = vocab_size - len(SPECIAL_TOKENS)
    pieces = _repeated(counts, on_chars)
    trainer.train_from_iterator(pieces, vocab_size=ordinary, buffer_size=128, pattern=f"[^{SEPARATOR}]+")
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if exact and len(ranks) < ordinary:
        raise DataMistake(
            f"tokenizer.params.vocab_size: {vocab_size} is more than the text gives: it has room for "
            f"{len(ranks) + len(SPECIAL_TOKENS)} tokens. Ask for fewer, leave it out, or train on more text."
        )
    return ranks


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST:
        raise DataMistake(
            f"tokenizer.params.vocab_size: {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens make {SMALLEST}."
        )


def _repeated(counts: Counter[str], on_chars: Callable[[int], None]) -> Iterator[str]:
    """Text with each word as often as it was counted, SEPARATOR after each, in pieces of about PIECE_CHARS."""
    held: list[str] = []
    chars = 0
    for word, count in counts.items():
        if SEPARATOR in word:
            continue
        unit = word + SEPARATOR
        most = max(1, PIECE_CHARS // len(unit))
        for start in range(0, count, most):
            held.append(unit * min(most, count - start))
            chars += len(held[-1])
            if chars >= PIECE_CHARS:
                yield "".join(held)
                on_chars(chars)
                held, chars = [], 0
    yield "".join(held)
    on_chars(chars)


# --- the files


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

    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": len(ranks) + i, "content": name, **flags} for i, name in enumerate(SPECIAL_TOKENS)]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
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

    tiktoken merges any two neighbours whose bytes together are a token, not only the pair it was learnt from; listing
    every such pair makes `tokenizers` do the same.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                yield token[:cut], token[cut:]
