"""GPUs are given out to one stage at a time, also between runs that know nothing of each other."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Interrupted, UserError
from pipeline.job import Launch
from pipeline.plan.dag import Stage
from pipeline.runner import gpus
from pipeline.runner import machine as hardware
from tests.conftest import ROOT, Chatmill

HOLD = """
import sys
from pathlib import Path
from pipeline.runner import gpus
with gpus.take(int(sys.argv[2]), "other", print, lambda: False, Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def take(folder: Path, count: int, stop=lambda: True):
    said: list[str] = []
    return gpus.take(count, "pretrain", said.append, stop, folder), said


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-9a/b,3")


def test_each_stage_gets_its_own_and_gives_them_back(four: None, tmp_path: Path) -> None:
    with take(tmp_path, 2)[0] as first, take(tmp_path, 2)[0] as second:
        assert first == {"CUDA_VISIBLE_DEVICES": "0,1"} and second == {"CUDA_VISIBLE_DEVICES": "GPU-9a/b,3"}
    with take(tmp_path, 4)[0] as all_of_them:
        assert all_of_them == {"CUDA_VISIBLE_DEVICES": "0,1,GPU-9a/b,3"}


def test_who_waits_holds_nothing_meanwhile_says_so_and_can_be_stopped(four: None, tmp_path: Path) -> None:
    def stop() -> bool:
        with take(tmp_path, 3)[0] as rest:  # all that the first one left
            assert rest == {"CUDA_VISIBLE_DEVICES": "1,GPU-9a/b,3"}
        return True

    with take(tmp_path, 1)[0]:
        waiting, said = take(tmp_path, 4, stop)
        with pytest.raises(Interrupted, match="pretrain had not started"), waiting:
            pass
        assert said == ["4 of 4 GPUs, in use by other stages"]


def test_another_process_keeps_its_gpus_until_it_is_killed(four: None, tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(Interrupted), take(tmp_path, 2)[0]:
        pass
    other.kill()
    other.communicate()
    with take(tmp_path, 4)[0] as found:
        assert found["CUDA_VISIBLE_DEVICES"].startswith("0,1")


def test_lock_files_of_another_user_are_only_opened(
    four: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with take(tmp_path, 4)[0]:
        pass
    really_open = os.open

    def as_in_tmp(path: Path, how: int, mode: int = 0o777) -> int:
        """The kernel with fs.protected_regular=1, the default of many distributions."""
        if how & os.O_CREAT and os.path.exists(path):
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, how, mode)

    monkeypatch.setattr(os, "open", as_in_tmp)
    with take(tmp_path, 4)[0] as found:
        assert found["CUDA_VISIBLE_DEVICES"] == "0,1,GPU-9a/b,3"


def test_more_than_there_are_is_the_users_mistake_and_none_is_no_limit(
    four: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is 8, but this machine has 4 GPUs"), take(tmp_path, 8)[0]:
        pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with take(tmp_path, 8)[0] as found:
        assert found == {}


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        ("", ["launch=cpu"]),
        ("3", ["launch=gpu1"]),
        ("0,1", ["launch=node8", "launch.nproc=2"]),
        ("0,1,2,3,4,5", ["launch=node8", "launch.nproc=4"]),
        ("0,1,2,3,4,5,6,7", ["launch=node8", "launch.nproc=8"]),
    ],
)
def test_a_run_takes_as_many_of_the_gpus_as_can_share_a_batch(
    visible: str, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.launch_overrides([]) == chosen
    assert hardware.launch_overrides(["launch=cpu"]) == []
    note = hardware.idle_gpus_note([])
    assert ("Uses 4 of the 6 GPUs" in note) if visible == "0,1,2,3,4,5" else note is None
    assert hardware.idle_gpus_note(["launch.nproc=3"]) is None


@pytest.mark.parametrize(
    ("visible", "launch", "missing"),
    [
        ("", {"device": "cuda"}, "needs 1 GPU; this machine has none (CUDA_VISIBLE_DEVICES=)"),
        ("0,1", {"device": "cuda", "nproc": 8}, "needs 8 GPUs; this machine has 2 (CUDA_VISIBLE_DEVICES=0,1)"),
        ("0,1", {"device": "cuda", "nproc": 2}, ""),
        ("0,1", {"device": "auto", "nproc": 4}, "needs 4 GPUs"),
        ("", {"device": "auto", "nproc": 4}, ""),
        ("", {"device": "cpu", "nproc": 4}, ""),
        ("", {"device": "mps"}, "launch.device=mps needs Apple's GPU"),
    ],
)
def test_gpus_that_are_not_there_are_named_while_planning(
    visible: str, launch: dict[str, Any], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(hardware, "has_unnamed_gpus", lambda: False)
    monkeypatch.setattr(hardware, "has_mps", lambda: False)
    trained = Stage("pretrain", "pipeline.stages.pretrain", {}, None, Launch(**launch))
    found = gpus.lacking(trained)
    assert missing in found and bool(missing) == bool(found)
    assert not gpus.lacking(dataclasses.replace(trained, run="pipeline.stages.tokenize")), "it uses none"


def test_gpus_that_nobody_can_count_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(hardware, "has_unnamed_gpus", lambda: True)
    assert not gpus.lacking(Stage("pretrain", "pipeline.stages.pretrain", {}, None, Launch(device="cuda")))


def test_a_plan_for_other_machines_is_priced_and_the_run_refused_before_anything_is_made(chatmill: Chatmill) -> None:
    env = {"CUDA_VISIBLE_DEVICES": ""}
    said = chatmill.run("plan", "recipe=d20", "launch=node8", **env)
    assert "Cannot run here: pretrain: launch.device=cuda with launch.nproc=8 needs 8 GPUs" in said and "$" in said
    said = chatmill.run("launch=gpu1", code=2, **env)
    assert "pretrain: launch.device=cuda with launch.nproc=1 needs 1 GPU; this machine has none" in said
    assert not list((chatmill.store / "artifacts").glob("*/*")) and not list((chatmill.store / "work").glob("*"))
