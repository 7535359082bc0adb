"""GPUs are given out to one stage at a time, also between runs that know nothing of each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import gpus, hardware
from pipeline.errors import Interrupted, UserError
from tests.conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from pipeline import gpus
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
        assert said == ["4 of 4 GPUs; others have them"]


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


def test_more_than_there_are_is_the_users_mistake_and_none_is_no_limit(
    four: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="8 GPUs are asked for, 4 can be seen"), take(tmp_path, 8)[0]:
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
