"""How often each piece of text that a vocabulary must not cross ("word") occurs: counted shard by shard, and kept.

Counting is most of the work of training a tokenizer, and can be shared out and resumed; what is learnt from the counts
is what rustbpe learns from the text itself.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.durable import put_in_place
from data.text.shards import documents

HELD_OUT_EVERY = 50  # documents of the shard that some are held out of
REPORT_EVERY = 64  # documents
SEPARATOR = "\U0010ffff"  # no character, so no text has it; a word with it is left out
PIECE_CHARS = 1 << 18


@dataclass(frozen=True)
class ShardText:
    """What to read of a shard: documents cut to doc_cap characters, max_chars of them together.

    held_out_chars: of the first documents, every HELD_OUT_EVERY-th is kept back until they are so many characters.
    """

    path: Path
    column: str
    doc_cap: int
    max_chars: int
    held_out_chars: int = 0

    def parts(self) -> Iterator[tuple[str, bool]]:
        """(text, whether it is held out)."""
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
    """Matches of the pattern, which is of Rust's dialect: there \\s is Unicode's White_Space and no more.

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
    """Write the counts of a shard to the file `kept`, unless it is there. Reports characters that are done."""
    if kept.exists():
        report(shard.max_chars)
        return
    write_counts(count_words(_reported(shard, report), pattern), kept)


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


def write_counts(counts: Counter[str], path: Path) -> None:
    """A parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(path.name + ".tmp")
    words = pa.array(counts.keys(), pa.large_string())
    pq.write_table(pa.table({"word": words, "count": pa.array(counts.values(), pa.int64())}), temporary)
    put_in_place(temporary, path)


def read_counts(path: Path) -> Counter[str]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return Counter(dict(zip(table["word"].to_pylist(), table["count"].to_pylist())))


def repeated(counts: Counter[str]) -> Iterator[str]:
    """Text in which each word stands as often as it was counted, SEPARATOR after each, PIECE_CHARS or so at a time."""
    held: list[str] = []
    chars = 0
    for word, count in counts.items():
        if SEPARATOR in word:
            continue
        unit = word + SEPARATOR
        most = max(1, PIECE_CHARS // len(unit))
        for start in range(0, count, most):
            piece = unit * min(most, count - start)
            held.append(piece)
            chars += len(piece)
            if chars >= PIECE_CHARS:
                yield "".join(held)
                held, chars = [], 0
    yield "".join(held)
