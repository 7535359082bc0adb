"""Locks end with their holder, and a holder that only seemed dead notices that it was replaced."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.artifacts import locks
from pipeline.artifacts.locks import Lock
from pipeline.errors import Interrupted, StageFailed

ROOT = Path(locks.__file__).resolve().parents[2]

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from pipeline.artifacts.locks import Lock
with Lock(Path(sys.argv[1]), {"stage": "s", "run": "other"}):
    print("held", flush=True)
    time.sleep(600)
"""

ORPHAN = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from pipeline.artifacts.locks import share_alive
share_alive(Path(sys.argv[1]))
print("up", flush=True)
time.sleep(600)
"""


def holder_process(path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_waiter_is_told_for_whom_and_goes_on_when_the_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    process = holder_process(path)
    told: list[str] = []

    def on_wait(holder: dict[str, object]) -> None:
        told.append(str(holder["run"]))
        process.send_signal(signal.SIGKILL)
        process.wait()

    with Lock(path, {"run": "mine"}, on_wait) as lock:
        assert told[0] == "other"
        assert lock.holds()


def test_a_wait_can_be_given_up(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    process = holder_process(path)
    try:
        with pytest.raises(Interrupted), Lock(path, {}, stop=lambda: True):
            pass
    finally:
        process.kill()
        process.wait()


def other_host_holds(path: Path, beat: int) -> None:
    """As another machine leaves it on a file system whose flock ends at each machine."""
    record = {"host": "elsewhere", "pid": 1, "run": "theirs", "fence": 7, "beat": beat}
    path.with_suffix(".json").write_text(json.dumps(record))


def test_a_holder_on_another_host_is_outlived_only_when_its_heart_stands_still(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    other_host_holds(path, beat=1)
    beats = iter(range(2, 8))

    def alive_for_a_while(_: object) -> None:
        if (beat := next(beats, None)) is not None:
            other_host_holds(path, beat)

    with Lock(path, {"run": "mine"}, alive_for_a_while, dead_seconds=0.2) as lock:
        assert next(beats, None) is None, "taken over while the other heart was beating"
        assert lock.fence == 8


def test_a_holder_that_ended_properly_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    other_host_holds(path, beat=-1)
    waited: list[object] = []
    with Lock(path, {}, waited.append, dead_seconds=60):
        assert not waited


def test_the_old_holder_notices_that_it_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with Lock(path, {"stage": "pretrain"}, host="sleepy", beat_seconds=3600) as old:
        old_record = old.read()
        path.with_suffix(".json").write_text(json.dumps(old_record | {"host": "awake", "fence": old.fence + 1}))
        assert not old.holds()
        with pytest.raises(StageFailed, match="awake took over"):
            old.check()
    assert json.loads(path.with_suffix(".json").read_text())["host"] == "awake", "the new holder's record stays"


def test_workers_of_an_earlier_maker_are_waited_for(tmp_path: Path) -> None:
    orphan = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE, text=True
    )
    assert orphan.stdout is not None
    orphan.stdout.readline()
    waited = threading.Event()

    def on_wait() -> None:
        waited.set()
        orphan.kill()
        orphan.wait()

    locks.wait_for_orphans(tmp_path, on_wait, lambda: False)
    assert waited.is_set()
