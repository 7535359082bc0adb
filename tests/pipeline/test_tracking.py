"""Measurements that go to Weights & Biases."""

from pathlib import Path

import pytest

from pipeline import config, hardware
from pipeline.tracking import WandbLogger


@pytest.mark.parametrize(
    ("variables", "overrides", "logger"),
    [
        ({"WANDB_RUN": "mine"}, [], ("wandb", "online", "mine")),
        ({"WANDB_RUN": "mine"}, ["logger.mode=offline"], ("wandb", "offline", "mine")),
        ({"WANDB_RUN": "mine", "WANDB_MODE": "offline"}, [], ("wandb", "offline", "mine")),
        ({"WANDB_RUN": "mine"}, ["logger=none"], ("none", "online", None)),
        ({"WANDB_RUN": "dummy"}, [], ("none", "online", None)),
        ({}, ["logger=wandb"], ("wandb", "online", None)),
    ],
)
def test_wandb_run_names_a_run_and_dummy_means_none(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    overrides: list[str],
    logger: tuple[str, str, str | None],
) -> None:
    for name in ("WANDB_RUN", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    composed = config.compose([*hardware.habit_overrides(overrides), *overrides])["logger"]
    assert (composed["kind"], composed["mode"], composed["name"]) == logger


def test_what_is_measured_offline_outlives_the_work_folder(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    work = tmp_path / "work" / "pretrain-k"
    (work / "scratch").mkdir(parents=True)
    about = {"project": "p", "mode": "offline", "name": None, "run": "r"}
    logger = WandbLogger(
        {"logger": about, "work": str(work), "store": str(tmp_path), "stage": "pretrain", "params": {"depth": 4}}
    )
    logger.log(1, {"loss": 2.0})
    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [p.name for p in work.rglob("*")] == ["scratch", "wandb.json"]
