"""Small JSON files of a store may hold anything: every command goes on as if the file were absent, and says so once."""

import functools
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data import durable
from pipeline.artifacts.artifact import RECORD
from pipeline.artifacts.store import FORMAT_FILE, Store
from pipeline.commands.cli import main
from pipeline.commands.find_model import newest
from pipeline.config import compose as config
from pipeline.errors import UserError
from pipeline.runner.run import Run

LOOKING = (["ls"], ["plan"], ["status"], ["why"], ["show", "a"], ["verify"], ["gc"])


def declare(name: str, **params: Any) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in params.items())
    return f"+{name}={{run: tests.toys.source, params: {{{inner}}}}}"


def carry_out(overrides: list[str]) -> dict[str, Any]:
    """A run without Prefect: the record of each stage."""
    with Run.open(overrides) as run:
        for step in run.plan.steps.values():
            if step.action != "idle":
                run.make(step)
    return {name: artifact.record for name, artifact in run.artifacts.items()}


compose = config.compose  # half of what a command takes


@functools.cache
def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose(list(overrides))


@dataclass(frozen=True)
class Made:
    """A store with two finished stages, one of which stands for what was accepted as equal, and one that was stopped.

    files: its small JSON files, but for the manifests and the format of the store, which a newer Chatmill may raise.
    """

    root: Path
    gate: Path
    overrides: list[str]
    files: list[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("small")
    root, gate = folder / "store", folder / "gate"
    common = ["store.min_free_gb=0", "run.name=mine"]
    slow = declare("u", n=6, pause_at=3, gate=str(gate))
    overrides = [*common, "pipeline.stages=[a,b,u]", declare("a", n=4), declare("b", n=5), slow]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATMILL_STORE", str(root))
        older = carry_out([*common, "pipeline.stages=[a,b]", declare("a", n=4), declare("b", n=7)])
        with Run.open(overrides) as run:
            store = run.session.store
            store.memory.accept("tests.toys.source", str(run.plan.steps["b"].key), older["b"]["key"], "the same")
            run.maker.events.progress = lambda stage, state: (
                os.kill(os.getpid(), signal.SIGTERM) if state["done"] == 3 and not run.maker.switch.asked else None
            )
            with pytest.raises(BaseException, match="3 of 6 numbers are written"):
                run.make(run.plan.steps["u"])
    gate.touch()
    apart = (RECORD, FORMAT_FILE)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*.json") if path.name not in apart)
    yield Made(root, gate, overrides, files)


@pytest.fixture
def copy(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store like it, to be damaged."""
    root = tmp_path / "store"
    shutil.copytree(made.root, root)
    monkeypatch.setenv("CHATMILL_STORE", str(root))
    monkeypatch.setattr(config, "compose", lambda overrides: composed(tuple(overrides)))
    durable._report.cache_clear()
    return root


def other_types(value: Any) -> Any:
    """The same shape with values of other types."""
    if isinstance(value, dict):
        return {name: other_types(item) for name, item in value.items()}
    if isinstance(value, list) and value:
        return [other_types(item) for item in value]
    return {str: 7, bool: "yes", int: "many", float: [1.5], list: "none", type(None): {"a": 1}}[type(value)]


def values_replaced(value: Any) -> Any:
    """The same names with containers and values swapped."""
    if isinstance(value, dict):
        return {name: [] if isinstance(item, dict) else {} for name, item in value.items()}
    return [[], {}, None, "x"]


DAMAGES = {
    "emptied": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1, [], {}, null]",
    "an object": lambda text: '{"a": 1}',
    "a number": lambda text: "17",
    "null": lambda text: "null",
    "other types": lambda text: json.dumps(other_types(json.loads(text))),
    "other containers": lambda text: json.dumps(values_replaced(json.loads(text))),
    "huge numbers": lambda text: json.dumps(json.loads(text, parse_float=lambda _: 1e300, parse_int=lambda _: 10**18)),
    "not UTF-8": lambda text: "\udcff",
    "a folder": None,
}


def damage(path: Path, how: str) -> None:
    change = DAMAGES[how]
    text = path.read_text()
    if change is not None:
        path.write_bytes(change(text).encode("utf-8", "surrogateescape"))
    else:
        path.unlink()
        (path / "inside").mkdir(parents=True)


def check_everything(root: Path, made: Made, capsys: pytest.CaptureFixture[str], forgotten: bool) -> None:
    """All commands work, and a run makes what is not finished, going on where it was, and nothing else."""
    before = {artifact.key: artifact.record for artifact in Store(root).all()}
    with pytest.raises(UserError, match="no model yet"):
        newest(Store(root), [])
    (unfinished,) = (root / "work").iterdir()
    for line in (*LOOKING, ["log", unfinished.name]):
        assert main([*line, *made.overrides]) == 0, line
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    assert sorted(artifact.key for artifact in Store(root).all()) == sorted(before)
    records = carry_out(made.overrides)
    assert records["a"] == before[records["a"]["key"]]
    assert forgotten or records["b"] == before[records["b"]["key"]]
    assert records["u"]["metrics"] == {"numbers": 6, "resumed_at": 3}
    assert main(["ls", *made.overrides]) == 0 and main(["verify", *made.overrides]) == 0


@pytest.mark.parametrize("how", DAMAGES)
def test_all_small_files_at_once(made: Made, copy: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    assert {Path(name).name for name in made.files} >= {"attempts.json", "outcome.json", "progress.json", "job.json"}
    assert {Path(name).parts[0] for name in made.files} >= {"accepted", "artifacts", "locks", "memory", "runs", "work"}
    for name in made.files:
        damage(copy / name, how)
    check_everything(copy, made, capsys, forgotten=True)


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_each_small_file_alone(made: Made, copy: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    """Each file with one of the damages, dealt out in turn."""
    check_each(made, made.files[number :: len(DAMAGES)], list(DAMAGES)[number], copy, capsys)


@pytest.mark.full
@pytest.mark.parametrize("how", DAMAGES)
def test_every_small_file_with_every_damage(
    made: Made, copy: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    check_each(made, made.files, how, copy, capsys)


def check_each(made: Made, names: list[str], how: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in names:
        shutil.rmtree(copy)
        shutil.copytree(made.root, copy)
        damage(copy / name, how)
        check_everything(copy, made, capsys, forgotten=name.startswith("accepted"))


def test_damage_is_said_once(made: Made, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(copy / "memory" / "names.json", "cut")
    with caplog.at_level(logging.WARNING):
        assert main(["ls", *made.overrides]) == 0
        assert main(["ls", *made.overrides]) == 0
    assert [record.getMessage().split(" is damaged")[0] for record in caplog.records] == [
        str(copy / "memory" / "names.json")
    ]


@pytest.mark.parametrize("how", [*(how for how in DAMAGES if how != "huge numbers"), "a file in the folder's place"])
def test_a_damaged_manifest_or_folder_goes_to_quarantine_and_is_made_again(
    made: Made, copy: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    folder = Store(copy).find_by_name("a").folder
    if how not in DAMAGES:
        shutil.rmtree(folder)
        folder.write_text(how)
    else:
        damage(folder / RECORD, how)
    for line in (["ls"], ["status"], ["why", "a"], ["gc"]):
        assert main([*line, *made.overrides]) == 0
    capsys.readouterr()
    assert main(["plan", *made.overrides]) == 0
    assert "damaged" in capsys.readouterr().out
    records = carry_out(made.overrides)
    assert records["a"]["metrics"] == {"numbers": 4, "resumed_at": 0}
    assert any(path.name.startswith("source-") for path in (copy / "quarantine").iterdir())
