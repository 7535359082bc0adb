"""Documents of any local source as training shards of bounded size and one validation shard, resumable by shard."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.durable import keep_json, read_fields
from data.errors import DataError
from data.text.files import documents, held_out, read_text, write_shard
from data.trust import fits

VAL = "val.parquet"


@dataclass
class Position:
    """A position in the sources; everything before it is in a shard on disk."""

    source: int = 0
    document: int = 0
    shards: int = 0
    val_parts: list[str] = field(default_factory=list)
    notes: dict[str, dict[str, int]] = field(default_factory=dict)  # by source: what its reader skipped or replaced


@dataclass
class Resplit:
    """sources: files in the order they are read. column: of parquet and jsonl sources.

    shard_chars: a shard is closed once it has this many characters. val_fraction: of the documents, chosen by their
    own text; the first one (and each equal text) is always held out, so that there is one. max_shards: stop after this
    many; None: never.
    """

    sources: list[Path]
    column: str
    shard_chars: int
    val_fraction: float
    max_shards: int | None
    out: Path
    scratch: Path
    notes: dict[str, dict[str, int]] = field(default_factory=dict)

    def run(self, on_source: Callable[[int], None], should_stop: Callable[[], bool]) -> bool:
        """Write shard_00000.parquet ... and val.parquet into `out`; False if stopped before the end.

        on_source receives the number of sources that have been read completely. Raises DataError for what cannot be
        read, and when no document is left to train on.
        """
        position = self._load()
        self.notes = position.notes
        first = next((text for path in self.sources for text in read_text(path, self.column)), None)
        train: list[str] = []
        val: list[str] = []
        chars = 0
        for source, document, text in self._read(position):
            if document % 256 == 0:
                on_source(source)
                if should_stop():
                    return False
            if held_out(text, self.val_fraction) or text == first:
                val.append(text)
            else:
                train.append(text)
                chars += len(text)
            if chars >= self.shard_chars:
                position = self._flush(position, train, val, source, document + 1)
                train, val, chars = [], [], 0
            if position.shards == self.max_shards:
                break
        if train or val:
            position = self._flush(position, train, val, len(self.sources), 0)
        if position.shards == 0:
            names = ", ".join(map(str, self.sources))
            raise DataError(f"{names}: no document is left to train on beside the one held out. Give more text.")
        parts = (documents(self.scratch / part, self.column) for part in position.val_parts)
        held = [text for part in parts for texts in part for text in texts]
        write_shard(self.out / VAL, held, self.column)
        return True

    def names(self) -> list[str]:
        """The training shards of a finished run."""
        return [shard_name(i) for i in range(self._load().shards)]

    def _read(self, position: Position) -> Iterator[tuple[int, int, str]]:
        if position.shards == self.max_shards:
            return
        for source, path in enumerate(self.sources):
            if source < position.source:
                continue
            skip = position.document if source == position.source else 0
            notes = Counter[str]()
            self.notes[str(path)] = notes
            for document, text in enumerate(read_text(path, self.column, notes)):
                if document >= skip:
                    yield source, document, text

    def _flush(self, before: Position, train: list[str], val: list[str], source: int, document: int) -> Position:
        """Write the documents, then the position: after a crash in between, the same files are written again."""
        parts = list(before.val_parts)
        if val:
            parts.append(f"val-{len(parts):05d}.parquet")
            write_shard(self.scratch / parts[-1], val, self.column)
        if train:
            write_shard(self.out / shard_name(before.shards), train, self.column)
        notes = {path: dict(notes) for path, notes in self.notes.items()}
        after = Position(source, document, before.shards + bool(train), parts, notes)
        keep_json(self._position_file, asdict(after))
        return after

    def _load(self) -> Position:
        """The saved position, or the start if there is none or it is damaged."""
        saved = Position(**read_fields(self._position_file, asdict(Position())))
        sound = all(isinstance(part, str) and (self.scratch / part).is_file() for part in saved.val_parts)
        for notes in saved.notes.values():
            sound &= isinstance(notes, dict) and fits(notes, dict.fromkeys(notes, 0))
        return saved if sound else Position()

    @property
    def _position_file(self) -> Path:
        return self.scratch / "position.json"


def shard_name(i: int) -> str:
    return f"shard_{i:05d}.parquet"
