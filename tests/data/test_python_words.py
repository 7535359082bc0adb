"""Words for spelling come from a data set with a key, also where there is no network."""

from pathlib import Path

import pytest

from data.sources import python_words
from data.sources.fetch import Blobs
from data.sources.source import Request
from data.tasks.simple_spelling import SimpleSpelling
from data.tasks.task import TaskError
from pipeline.stages.download import Params


def test_words_of_this_python_are_a_data_set_that_spelling_reads(tmp_path: Path) -> None:
    params = Params("data.sources.python_words", what="dataset")
    identity = python_words.identity(params, {}, online=False)
    assert identity["files"]["python"]
    out = tmp_path / "out"
    out.mkdir()
    request = Request(params, identity, out, tmp_path, Blobs(tmp_path), 1, lambda done, total: None, lambda: False)
    assert python_words.make(request).files == ["words.txt"]
    (out / "log.txt").write_text("what the stage says is no word list")
    task = SimpleSpelling("train", folder=out)
    assert len(task) > 500


def test_spelling_without_a_word_list_names_one() -> None:
    with pytest.raises(TaskError, match="dataset: python_words"):
        SimpleSpelling("train")
