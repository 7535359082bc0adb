"""Measurements that go to Weights & Biases."""

from pathlib import Path

import pytest

from pipeline.tracking import WandbLogger


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
