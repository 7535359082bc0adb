"""Measurements that go to Weights & Biases or TensorBoard, and trackers that fail."""

import socket
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose as config
from pipeline.config.settings import LoggerConfig
from pipeline.errors import UserError
from pipeline.runner.trackers import WeightsAndBiases
from pipeline.runner.tracking import check, environment_overrides, open_loggers
from tests.conftest import Chatmill
from tests.pipeline.test_run import paused, records, toys, wait_for

KEY = "a" * 40
VARIABLES = ("WANDB_RUN", "WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC")


@pytest.fixture(autouse=True)
def without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("variables", "overrides", "logger", "name"),
    [
        ({"WANDB_RUN": "mine"}, [], ("wandb", "online"), "mine"),
        ({"WANDB_RUN": "it's, a=name"}, [], ("wandb", "online"), "it's, a=name"),
        ({"WANDB_RUN": "a\\b \\"}, [], ("wandb", "online"), "a\\b \\"),
        ({"WANDB_RUN": "mine"}, ["run.name=other"], ("wandb", "online"), "other"),
        ({"WANDB_RUN": "mine"}, ["logger.mode=offline"], ("wandb", "offline"), "mine"),
        ({"WANDB_RUN": "mine", "WANDB_MODE": "offline"}, [], ("wandb", "offline"), "mine"),
        ({"WANDB_RUN": "mine"}, ["logger=none"], ("none", "online"), "mine"),
        ({"WANDB_RUN": "mine"}, ["logger=tensorboard"], ("tensorboard", "online"), "mine"),
        ({"WANDB_RUN": "dummy"}, [], ("none", "online"), None),
        ({"WANDB_MODE": "offline"}, ["logger=wandb"], ("wandb", "offline"), None),
        ({"WANDB_MODE": "dryrun"}, ["logger=wandb"], ("wandb", "offline"), None),
        ({"WANDB_MODE": "disabled"}, ["logger=wandb"], ("wandb", "disabled"), None),
        ({"WANDB_MODE": "disabled"}, ["logger=wandb", "logger.mode=online"], ("wandb", "online"), None),
        ({"WANDB_MODE": "disabled"}, [], ("none", "disabled"), None),
        ({"WANDB_MODE": "shared"}, [], ("none", "online"), None),
        ({}, ["logger=wandb"], ("wandb", "online"), None),
    ],
)
def test_variables_of_wandb_are_obeyed_unless_the_command_line_decides(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    overrides: list[str],
    logger: tuple[str, str],
    name: str | None,
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    settings = config.settings(config.compose([*environment_overrides(overrides), *overrides]))
    assert (settings.logger.kind, settings.logger.mode) == logger
    assert settings.run.name == name


def test_a_mode_that_does_not_exist_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE: is 'ofline'"):
        environment_overrides(["logger=wandb"])


def test_a_missing_key_is_said_while_planning(chatmill: Chatmill) -> None:
    out = chatmill.run_process("plan", *toys(), "logger=wandb")
    assert "logger=wandb: no API key for https://" in out and "wandb login" in out
    assert "40" in chatmill.run_process("plan", *toys(), "logger=wandb", WANDB_API_KEY="short")
    assert "API key" not in chatmill.run_process("plan", *toys(), "logger=wandb", WANDB_MODE="offline")


def test_a_key_in_netrc_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    (tmp_path / ".netrc").write_text(f"machine wandb.example login user password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert check(LoggerConfig("wandb"), online=False) == (LoggerConfig("wandb"), "")


def test_a_missing_package_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in ("wandb", "tensorboard"):
        found, note = check(LoggerConfig(kind), online=False)  # type: ignore[arg-type]
        assert found.kind == "none" and f"pip install {kind}" in note


def test_an_unreachable_service_is_said_once_and_the_run_is_measured_offline(served: Chatmill) -> None:
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    out = served.run_process(*toys(), "logger=wandb", **env)
    assert out.count("does not answer") == 1 and "http://127.0.0.1:9" in out
    assert records(served.store)["c"]["metrics"]["total"] == 16
    assert len(list((served.store / "wandb").glob("offline-run-*"))) == 2  # c logs nothing: no empty run


def test_a_service_that_falls_silent_after_the_start_leaves_the_stage_measured_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.runner.trackers.INIT_SECONDS", 2.0)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        logger = WeightsAndBiases(job_of(tmp_path, "wandb", mode="online"), said.append)
        logger.log(1, {"loss": 2.0})
        logger.close(done=True)
    assert len(said) == 1 and "cannot be reached" in said[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_is_told_what_the_stage_is_and_continues_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.init", lambda **told: asked.append(told))
    for _ in range(2):
        WeightsAndBiases(job_of(tmp_path, "wandb", sweep="1"), print)
    first, second = asked
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["name"], first["group"], first["job_type"]) == ("mine/sft", "sweep 1", "finetune")
    assert first["tags"] == ["sft", "tiny", "mine"]
    assert first["config"] == {
        "stage": "sft",
        "key": "4f2a00aa4f2a00aa",
        "recipe": "tiny",
        "commit": "abcdef",
        "inputs": {"model": "pretrain/1111"},
        "params": {"depth": 4},
        "launch": {},
    }


@pytest.mark.parametrize("how", ["init", "log", "finish"])
def test_a_tracker_that_raises_ends_no_stage_and_is_said_once(served: Chatmill, tmp_path: Path, how: str) -> None:
    raises = {name: "raise SystemExit(name)" if name == how else "return Run()" for name in ("init", "log", "finish")}
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(
        f"class Settings:\n    def __init__(self, **_): pass\n"
        f"class Run:\n    summary = dict()\n"
        f"    def log(self, *_, name='log', **__): {raises['log']}\n"
        f"    def finish(self, name='finish', **_): {raises['finish']}\n"
        f"def init(name='x', **_):\n    {raises['init']}\n"
        f"def teardown(): pass\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    out = served.run(*toys(), "logger=wandb", "logger.mode=offline", "until=a", **env)
    assert out.count("logger=wandb failed") == 1
    assert records(served.store)["a"]["metrics"]["numbers"] == 4


def test_runs_of_a_sweep_share_a_group(served: Chatmill, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(
        "import os\n"
        "class Settings:\n    def __init__(self, **_): pass\n"
        "def init(group, **_): open(os.environ['GROUPS'], 'a').write(group + '\\n')\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "GROUPS": str(tmp_path / "groups")}
    served.run("-m", *toys(), "until=a", "a.params.n=2,3", "logger=wandb", "logger.mode=offline", **env)
    groups = (tmp_path / "groups").read_text().splitlines()
    assert len(groups) == 2 and len(set(groups)) == 1 and groups[0].startswith("sweep ")


def test_what_is_measured_offline_outlives_the_work_folder(tmp_path: Path) -> None:
    described = job_of(tmp_path, "wandb", mode="offline")
    (logger,) = open_loggers(described, scores=True, say=print)
    logger.log(1, {"loss": 2.0})
    logger.close(done=True)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [p.name for p in Path(described["work"]).rglob("*")] == ["scratch", "wandb.json"]


# --- TensorBoard


def test_event_files_of_a_stage_that_was_stopped_continue_without_a_step_twice(
    served: Chatmill, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    gate = tmp_path / "gate"
    overrides = [*toys(a={"pause_at": 2, "gate": str(gate)}), "only=[a]", "logger=tensorboard"]
    process = served.start(*overrides, "run.name=first")
    wait_for(lambda: paused(served.store), process)
    process.kill()
    process.communicate()
    gate.touch()
    served.run(*overrides, "run.name=second")
    assert scalars(served.store / "tensorboard" / "first" / "a", "value") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert not (served.store / "tensorboard" / "second").exists()


def test_after_a_rewind_steps_are_those_of_the_later_attempt(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for steps, value in ((range(1, 8), 1.0), (range(5, 10), 2.0)):
        (logger,) = open_loggers(job_of(tmp_path, "tensorboard"), scores=False, say=print)
        for step in steps:
            logger.log(step, {"loss": value, "dtype": "float32"})
        logger.close(done=True)
    folder = tmp_path / "tensorboard" / "mine" / "sft"
    assert scalars(folder, "loss") == [(n, 1.0) for n in range(1, 5)] + [(n, 2.0) for n in range(5, 10)]


def test_results_of_an_evaluation_are_shown_and_other_stages_make_no_empty_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for scores in (False, True):
        (logger,) = open_loggers(job_of(tmp_path, "tensorboard"), scores=scores, say=print)
        assert not (tmp_path / "tensorboard").exists()
        logger.summary({"ARC-Easy": 0.5, "CORE": 0.25, "bpb": 1.5})
        logger.close(done=True)
    assert scalars(tmp_path / "tensorboard" / "mine" / "sft", "CORE") == [(0, 0.25)]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def job_of(store: Path, kind: str, **logger: Any) -> dict[str, Any]:
    """What job.json says of a stage."""
    work = store / "work" / "sft-k"
    (work / "scratch").mkdir(parents=True, exist_ok=True)
    settings = {"kind": kind, "project": "p", "mode": "offline", "sweep": None, "run": "mine"} | logger
    return {
        "stage": "sft",
        "module": "pipeline.stages.finetune",
        "key": "4f2a00aa4f2a00aa",
        "params": {"depth": 4},
        "launch": {},
        "inputs": {"model": f"{store}/artifacts/pretrain/1111"},
        "context": {"recipe": "tiny", "git": "abcdef"},
        "work": str(work),
        "store": str(store),
        "logger": settings,
    }
