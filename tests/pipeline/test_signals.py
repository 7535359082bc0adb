"""Signals on real processes: a dropped connection, an impatient user, a follower of a log."""

import json
import os
import pty
import select
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, Chatmill
from tests.pipeline.test_run import children_naming, paused, records, toys, wait_for

NUMBERS = {"pause_at": 2, "gate": "never"}


def outcome_of(store: Path, module: str = "source") -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in (store / "work").glob(f"{module}-*/outcome.json")]


def test_a_terminal_that_hangs_up_lets_the_stage_save_and_stops_the_run(served: Chatmill) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ["CHATMILL_STORE"] = str(served.store)
        os.execv(sys.executable, [sys.executable, "flows.py", *toys(a=NUMBERS), "only=[a]"])
    while not paused(served.store):
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert [(o["status"], o["message"]) for o in outcome_of(served.store)] == [
        ("stopped", "2 of 4 numbers are written")
    ]
    assert not children_naming(served.store)


def test_under_nohup_a_hangup_is_ignored(served: Chatmill, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited by the child, as nohup does it
    try:
        process = served.start(*toys(a=NUMBERS | {"gate": str(tmp_path / "gate")}))
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(lambda: paused(served.store), process)
    for each in [psutil.Process(process.pid), *children_naming(served.store)]:
        each.send_signal(signal.SIGHUP)
    (tmp_path / "gate").touch()
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert records(served.store)["c"]["metrics"]["total"] == 16


@pytest.mark.parametrize("sig", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_asked_twice_the_run_ends_its_stage_and_says_so(served: Chatmill, sig: signal.Signals) -> None:
    process = served.start(*toys(a=NUMBERS | {"deaf": True}), "only=[a]")
    wait_for(lambda: paused(served.store), process)
    process.send_signal(sig)
    wait_for(lambda: list((served.store / "work").glob("*/stop")), process)
    process.send_signal(sig)
    out, err = process.communicate()
    assert process.returncode == 130, out + err
    assert "a: ended before it could save: you asked twice" in err
    assert "memory" not in out + err and "Traceback" not in out + err
    assert not children_naming(served.store)


@pytest.mark.full
def test_a_stage_that_does_not_save_in_time_is_ended_and_the_setting_is_named(served: Chatmill) -> None:
    process = served.start(*toys(a=NUMBERS | {"deaf": True}), "only=[a]", "launch.grace_seconds=0.1")
    wait_for(lambda: paused(served.store), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "did not save within launch.grace_seconds=0.1" in err


@pytest.mark.parametrize(
    "end", ["published", *(pytest.param(end, marks=pytest.mark.full) for end in ("failed", "killed"))]
)
def test_a_followed_log_ends_with_its_stage_and_shows_its_last_lines(
    served: Chatmill, tmp_path: Path, end: str
) -> None:
    gate = tmp_path / "gate"
    more = {"fail_at": 3} if end == "failed" else {}
    run = served.start(*toys(a=NUMBERS | {"gate": str(gate)} | more), "only=[a]")
    wait_for(lambda: paused(served.store), run)
    follower = served.start("log", "a", "-f", *toys())
    assert follower.stdout is not None
    assert "pipeline.stages" in follower.stdout.readline()
    if end == "killed":
        run.kill()
    gate.touch()
    run.communicate()
    rest, err = follower.communicate(timeout=60)
    assert follower.returncode == 0, err
    assert {"published": "4 numbers are written", "failed": "number 3 cannot be written", "killed": ""}[end] in rest


def test_ctrl_c_ends_a_followed_log_without_a_word(served: Chatmill) -> None:
    run = served.start(*toys(a=NUMBERS), "only=[a]")
    wait_for(lambda: paused(served.store), run)
    follower = served.start("log", "a", "-f", *toys())
    assert follower.stdout is not None
    follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    assert follower.communicate(timeout=60) == ("", "")
    assert follower.returncode == 130
    run.send_signal(signal.SIGTERM)
    run.communicate()


def test_a_stage_that_is_hung_up_on_saves_and_is_resumed(served: Chatmill, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    process = served.start(*toys(a=NUMBERS | {"gate": str(gate)}), "only=[a]")
    wait_for(lambda: paused(served.store), process)
    (stage,) = children_naming(served.store)
    stage.send_signal(signal.SIGHUP)
    psutil.wait_procs([stage], timeout=60)
    gate.touch()
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert (records(served.store)["a"]["attempts"], records(served.store)["a"]["metrics"]["resumed_at"]) == (2, 2)
