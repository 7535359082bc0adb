"""A disk that is full ends a stage in a line that names it; after room was made the run goes on where it was."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts.store import Store
from pipeline.config import compose as config
from pipeline.errors import StageFailed
from pipeline.plan.session import Session
from tests.pipeline.test_small_files import carry_out, composed, declare

PAGE = 4096


class Disk:
    """A file system in memory, of a size to choose."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, size: int, how: str = "remount") -> None:
        options = f"{'remount,' if how == 'remount' else ''}size={size}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    tried = subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"mount is not allowed here ({tried.stderr.strip()})")
    monkeypatch.setenv("CHATMILL_STORE", str(folder / "store"))
    monkeypatch.setattr(config, "compose", lambda overrides: composed(tuple(overrides)))
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_stage_that_finds_the_disk_full_at_any_write_goes_on_once_there_is_room(disk: Disk) -> None:
    """The disk grows by a page at a time, so that each write is the one that fails."""
    overrides = ["store.min_free_gb=0", "pipeline.stages=[a]", declare("a", n=3)]
    failures: list[str] = []
    for pages in range(1, 80):
        disk.resize(pages * PAGE)
        shutil.rmtree(disk.folder / "store" / "runs", ignore_errors=True)  # each try would use up what is new
        try:
            record = carry_out(overrides)["a"]
            break
        except (OSError, StageFailed) as error:
            failures.append(str(error))
    else:
        pytest.fail("it never had room enough")
    assert record["metrics"]["numbers"] == 3
    artifact = Store(disk.folder / "store").find("tests.toys.source", record["key"])
    assert artifact is not None and Store(disk.folder / "store").verify(artifact, everything=True) == 3
    assert (artifact.folder / "numbers.txt").read_text() == "0\n1\n2\n"
    staged = [told for told in failures if told.startswith("a failed (disk): ")]
    assert len(staged) > 5
    for told in staged:
        assert re.search(rf"No space left on device: {disk.folder}.*`gc`.*store\.root", told), told


BATCH = {"total_batch_tokens": 256}
MEASURED = {"bpb_tokens": 256, "max_new_tokens": 4, "prompts": "[The]"}
PARAMS: dict[str, dict[str, Any]] = {
    "tokenizer": {"vocab_size": 300},
    "pretrain": BATCH | {"steps": 6, "eval_every": 3, "val_tokens": 256},
    "midtrain": BATCH,
    "sft": BATCH,
    "rl": {"steps": 2, "max_new_tokens": 4, "eval_every": 1},
    **{f"evaluate_{name}": MEASURED for name in ("base", "mid", "sft", "rl")},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"depth": 1, "width": 32, "head_dim": 16, "sequence_len": 64},
    "launch": {"device": "cpu", "threads": 1, "workers": 1, "save_every": 2, "log_every": 1},
    "mixture": dict.fromkeys(("midtrain", "sft", "rl"), "[{task: data.tasks.arithmetic.Arithmetic, size: 40}]")
    | dict.fromkeys(("rl_eval", "chat_eval"), "[{task: data.tasks.arithmetic.Arithmetic, split: test, size: 4}]"),
    **{f"{stage}.params": values for stage, values in PARAMS.items()},
}
TINY = [f"{group}.{name}={value}" for group, values in SETTINGS.items() for name, value in values.items()]
TINY += ["store.min_free_gb=0", "data=local"]


@pytest.mark.full
def test_every_kind_of_stage_goes_on_after_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    """A whole pipeline, on a disk that has little room for each stage until it has failed."""
    for name in ("a", "b"):
        lines = (f"The number {name} {i} follows {i - 1}." for i in range(900))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    overrides = [*TINY, f"data.paths=[{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}]"]
    store, kinds = Store(disk.folder / "store"), set()
    for name, stage in Session.open(overrides).dag.stages.items():
        for pages in (12, 24, 96, 384, 1536, 6144):
            shutil.rmtree(store.root / "runs", ignore_errors=True)
            disk.resize(shutil.disk_usage(disk.folder).used + pages * PAGE)
            try:
                record = carry_out([*overrides, f"until={name}"])[name]
                break
            except StageFailed as error:
                assert (error.stage, error.cause) == (name, "disk"), error
                assert f"No space left on device: {disk.folder}" in error.message, error
                kinds.add(stage.run)
        artifact = store.find(record["module"], record["key"])
        assert artifact is not None and store.verify(artifact, everything=True), name
    assert kinds == {stage.run for stage in Session.open(overrides).dag.stages.values()}
