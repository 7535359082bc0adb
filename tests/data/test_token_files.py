"""Token files that stages share are used only if they are what was written, whatever is left in their folder."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.tokens import bpe
from data.tokens.files import tokenize_shard

DAMAGES = ["", "{", "[]", "null", '{"sha256": 3}', '{"sha256": {"../../x": "y"}}', "[" * 100_000]


@pytest.fixture
def tokenize(tmp_path):
    """A function that tokenises one shard; what it returns has the bytes of text that were read."""
    (tmp_path / "tokenizer").mkdir()
    bpe.save(bpe.train(["the mill grinds the meal of the miller"] * 20, 275), tmp_path / "tokenizer")
    pq.write_table(pa.table({"text": ["the mill", "the meal"]}), tmp_path / "shard.parquet")

    def call():
        read = []
        made = tokenize_shard(
            tmp_path / "shard.parquet", "text", tmp_path / "tokenizer", tmp_path / "tokens", lambda *n: read.append(n)
        )
        return made, len(read)

    return call


def test_what_is_there_is_not_made_again(tokenize):
    first, read = tokenize()
    assert read == 1
    assert tokenize() == (first, 0)


@pytest.mark.parametrize("damage", [*DAMAGES, "types", "folder", "tokens", "file in its place"])
def test_what_is_damaged_is_made_again(tokenize, tmp_path, damage):
    first, _ = tokenize()
    folder = next(path for path in (tmp_path / "tokens").glob("*/*") if path.is_dir())
    described = folder / "shard.json"
    if damage == "types":
        described.write_text(json.dumps(json.loads(described.read_text()) | {"tokens": "many"}))
    elif damage == "folder":
        described.unlink()
        described.mkdir()
    elif damage == "tokens":
        (folder / "tokens.npy").write_bytes(b"")
    elif damage == "file in its place":
        folder.rename(tmp_path / "away")
        folder.write_text("")
    else:
        described.write_text(damage)
    assert tokenize() == (first, 1)
