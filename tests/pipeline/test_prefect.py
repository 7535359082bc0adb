"""Prefect helps, and no run fails because of it: what its pages show, deployments, and servers that go away."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.errors import Interrupted, StageFailed
from pipeline.plan.session import Session
from pipeline.runner.run import Run, overrides_of, parameters_of
from tests.conftest import ROOT, Chatmill
from tests.pipeline.prefect_server import PrefectApi, PrefectServer
from tests.pipeline.test_run import children_naming, paused, records, toys, wait_for

NOWHERE = "http://127.0.0.1:9/api"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[PrefectServer]:
    """A server for one test, which may kill it."""
    server = PrefectServer(tmp_path / "prefect")
    yield server
    server.signal(signal.SIGCONT)
    server.kill()


def gated(gate: Path, **more: Any) -> list[str]:
    return toys(a={"pause_at": 2, "gate": str(gate)} | more)


def temporary_server(run: "subprocess.Popen[str]") -> psutil.Process:
    """The temporary server of a run."""
    children = psutil.Process(run.pid).children()
    return next(child for child in children if "pipeline.runner.server" in child.cmdline())


def attempts(store: Path) -> int:
    """How often a stage was started in this store, all stages together."""
    logs = [*store.glob("artifacts/*/*/log.txt"), *store.glob("work/*/log.txt")]
    return sum(log.read_text().count("$ cd ") for log in logs)


# --- the flow


def test_the_flow_is_at_module_level_and_its_parameters_are_a_form() -> None:
    from prefect import Flow

    from flows import chatmill

    assert isinstance(chatmill, Flow) and chatmill.name == "chatmill"
    form = chatmill.parameters.properties
    assert {name: field.get("type") for name, field in form.items()} == {
        "recipe": "string",
        "overrides": "array",
        "until": "string",
        "run_name": "string",
    }
    assert form["overrides"]["items"] == {"type": "string"}
    assert all("For example" in field["description"] for field in form.values())
    assert chatmill.parameters.required == []


def test_as_a_program_flows_py_imports_prefect_only_where_something_runs(tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", "flows.py", "plan", *toys()]
    env = os.environ | {"CHATMILL_STORE": str(tmp_path)}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "would run" in done.stdout and "prefect" not in done.stderr


def test_a_runs_parameters_compose_to_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path))
    given = ["recipe=d12", "until=pretrain", "run.name='mine, all mine'", "guard.usd=3"]
    session = Session.open(given)
    parameters = parameters_of(session, given)
    assert parameters == {
        "recipe": "d12",
        "overrides": ["guard.usd=3"],
        "until": "pretrain",
        "run_name": "mine, all mine",
    }
    assert Session.open(overrides_of(parameters)).composed == session.composed
    assert overrides_of(parameters | {"overrides": ["recipe=d20"]})[-1] == "recipe=d20"


# --- a run by itself


def test_a_stage_that_several_ask_for_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path))
    with Run.open(toys()) as run:
        first = run.make(run.plan.steps["a"])
        assert run.make(run.plan.steps["a"]) == first
        assert not run.settled()
        run.make_rest()
        assert run.settled()
    assert attempts(tmp_path) == 3
    assert records(tmp_path)["c"]["metrics"]["total"] == 16


def test_a_run_that_nobody_orchestrates_ends_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path))
    asked = [*toys(a={"fail_at": 1}), "pipeline.targets=[b,c]"]
    with Run.open(asked) as run, pytest.raises(StageFailed, match="number 1 cannot be written"):
        run.make_rest()
        run.raise_failures()
    assert set(records(tmp_path)) == {"b"}
    with Run.open(toys()) as run, pytest.raises(Interrupted):
        run.maker.switch.ask()
        run.make_rest()
        run.raise_failures()
    assert set(records(tmp_path)) == {"b"}


# --- what Prefect shows


def test_prefect_shows_a_run_by_its_name_with_tags_plan_logs_and_what_was_cached(
    served: Chatmill, prefect_server: str
) -> None:
    server = PrefectApi(prefect_server)

    def tasks(**states: str) -> dict[str, Any]:
        """The newest run, once its tasks are known to be in these states, of which Prefect learns a little later."""
        wait_for(lambda: server.tasks(server.runs()[0]) == states)
        return server.runs()[0]

    served.run(*toys(), "until=b", "run.name=mine")
    run = tasks(b="Completed")
    assert run["name"] == "mine" and run["state_name"] == "Completed" and run["parameters"]["until"] == "b"
    assert "tiny" in run["tags"] and any(re.fullmatch(r"\d{8}-\d{6}-\w{4}", tag) for tag in run["tags"])
    (row,) = json.loads(server.artifact("plan"))
    assert row == row | {"stage": "b", "action": "run", "time": "?", "price": "?", "why": "never made"}
    wait_for(lambda: "made in" in " ".join(server.logs(run)))
    logs = server.logs(run)
    assert logs.count("5 numbers are written") == 1
    assert any(line.startswith("starts: never made. Its log: ") for line in logs)

    served.run(*toys(), "until=a")
    tasks(a="Completed")
    next(
        served.store.glob("artifacts/*/*/_prefect.json")
    ).unlink()  # as after kill -9 between the end of a stage and of its task
    out = served.run(*toys(), "pipeline.stages=[a,b]", "run.sweep=lr")
    assert "Nothing to do" in out
    assert "sweep lr" in tasks(a="Cached", b="Cached")["tags"]
    assert len(list(served.store.glob("runs/*"))) == 2  # a run that made nothing leaves no trace here


def test_with_everything_cached_a_server_that_is_away_ends_no_run(
    chatmill: Chatmill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATMILL_STORE", str(chatmill.store))
    with Run.open([*toys(), "until=a"]) as run:
        run.make_rest()
    out = chatmill.run(*toys(), "until=a", PREFECT_API_URL=NOWHERE)
    assert "Nothing to do" in out and f"This run is not shown in Prefect. PREFECT_API_URL={NOWHERE}" in out


def test_a_run_of_the_command_line_is_cancelled_in_the_ui_too(served: Chatmill, prefect_server: str) -> None:
    server = PrefectApi(prefect_server)
    process = served.start(*gated(Path("never")), "run.name=unwanted")
    wait_for(lambda: paused(served.store), process)
    (run,) = [run for run in server.runs() if run["name"] == "unwanted"]
    cancelled_in_the_ui(server, run["id"])
    out, err = process.communicate()
    assert process.returncode == 130 and "2 of 4 numbers are written" in err, out + err


# --- deployments


def wait_for_state(server: PrefectApi, run_id: str, *states: str) -> dict[str, Any]:
    while (run := server.ask(f"flow_runs/{run_id}"))["state_name"] not in states:
        assert run["state_name"] not in ("Completed", "Failed", "Crashed", "Cancelled"), run["state"]["message"]
    return dict(run)


def deployment(server: PrefectServer) -> dict[str, Any]:
    """The deployment of the flow, once there is one."""
    while True:
        found = server.ask("deployments/filter", {})
        if found:
            return dict(found[0])


def cancelled_in_the_ui(server: PrefectApi, run_id: str) -> None:
    server.ask(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_for_state(server, run_id, "Cancelled")


@pytest.mark.full
def test_a_deployment_runs_on_a_worker_elsewhere_and_is_cancelled_in_the_ui(
    shared: PrefectServer, tmp_path: Path
) -> None:
    store, gate = tmp_path / "store", tmp_path / "gate"
    assert shared.prefect("work-pool", "create", "here", "--type", "process").wait() == 0
    deploy = shared.prefect("--no-prompt", "deploy", "flows.py:chatmill", "-n", "chatmill", "-p", "here")
    assert deploy.wait() == 0
    deployed = deployment(shared)
    assert set(deployed["parameter_openapi_schema"]["properties"]) == {"recipe", "overrides", "until", "run_name"}
    worker = shared.prefect("worker", "start", "--pool", "here", cwd=tmp_path, CHATMILL_STORE=str(store))
    try:
        wanted = {"parameters": {"overrides": gated(gate), "until": "c", "run_name": "from a form"}}
        first = shared.ask(f"deployments/{deployed['id']}/create_flow_run", wanted)["id"]
        wait_for(lambda: paused(store), worker)
        cancelled_in_the_ui(shared, first)
        (outcome,) = store.glob("work/source-*/outcome.json")
        assert json.loads(outcome.read_text())["message"] == "2 of 4 numbers are written"  # it saved before it ended
        assert not children_naming(store)

        gate.touch()
        second = shared.ask(f"deployments/{deployed['id']}/create_flow_run", wanted)["id"]
        run = wait_for_state(shared, second, "Completed")
        assert run["name"] == "from a form" and "tiny" in run["tags"]
        assert records(store)["a"]["metrics"]["resumed_at"] == 2
        assert records(store)["a"]["run_name"] == "from a form"

        wrong = shared.ask(f"deployments/{deployed['id']}/create_flow_run", {"parameters": {"recipe": "d21"}})["id"]
        assert "did you mean" in wait_for_state(shared, wrong, "Failed")["state"]["message"].lower()
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


@pytest.mark.full
def test_a_flow_that_is_served_runs_by_its_schedule_and_is_cancelled_in_the_ui(
    shared: PrefectServer, tmp_path: Path
) -> None:
    program, store = tmp_path / "nightly.py", tmp_path / "store"
    program.write_text(
        "from datetime import timedelta\n\nfrom flows import chatmill\n\nif __name__ == '__main__':\n"
        "    chatmill.serve(name='nightly', limit=1, interval=timedelta(seconds=5), "
        f"parameters={{'overrides': {gated(tmp_path / 'gate')!r}}})\n"
    )
    env = os.environ | shared.env | {"PREFECT_API_URL": shared.url, "CHATMILL_STORE": str(store)}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    served = subprocess.Popen([sys.executable, program], cwd=ROOT, env=env, start_new_session=True)
    try:
        wait_for(lambda: paused(store), served)  # nobody has started it but the schedule
        (running,) = [run for run in shared.runs() if run["state_name"] == "Running"]
        cancelled_in_the_ui(shared, running["id"])
        assert not children_naming(store)
    finally:
        os.killpg(served.pid, signal.SIGKILL)
        served.wait()


@pytest.mark.full
def test_several_flows_run_in_threads_of_one_process(shared: PrefectServer, tmp_path: Path) -> None:
    """Compose included, which Hydra does by globals; none is in the main thread, which alone hears signals."""
    program = (
        "import sys, concurrent.futures as futures; from flows import chatmill\n"
        f"asked = {toys()!r}\n"
        "with futures.ThreadPoolExecutor(3) as threads:\n"
        "    made = list(threads.map(lambda name: chatmill(overrides=asked, until=name), 'aba'))\n"
        "assert [sorted(keys) for keys in made] == [['a'], ['b'], ['a']], made\n"
    )
    env = os.environ | shared.env | {"PREFECT_API_URL": shared.url, "CHATMILL_STORE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, check=True)
    assert set(records(tmp_path)) == {"a", "b"} and attempts(tmp_path) == 2


# --- servers that go away


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_temporary_server_that_dies_or_hangs_is_started_again_and_nothing_is_lost_or_made_twice(
    chatmill: Chatmill, tmp_path: Path, how: signal.Signals
) -> None:
    home, gate = tmp_path / "prefect", tmp_path / "gate"
    run = chatmill.start(*gated(gate), PREFECT_HOME=str(home))
    wait_for(lambda: paused(chatmill.store), run)
    temporary_server(run).send_signal(how)
    gate.touch()
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    assert "temporary server ended (SIGKILL) and is started again" in out and "Traceback" not in out + err
    assert records(chatmill.store)["c"]["metrics"]["total"] == 16 and attempts(chatmill.store) == 3
    history = PrefectServer(home)  # the same database, served to look at
    try:
        (kept,) = history.runs()
        assert kept["state_name"] == "Completed"
        assert history.tasks(kept) == {"a": "Completed", "b": "Completed", "c": "Completed"}
    finally:
        history.kill()


@pytest.mark.full
def test_when_the_configured_server_goes_away_the_run_continues_with_a_temporary_one(
    chatmill: Chatmill, own: PrefectServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    run = chatmill.start(*gated(gate), PREFECT_API_URL=own.url, PREFECT_HOME=str(tmp_path / "home"))
    wait_for(lambda: paused(chatmill.store), run)
    own.kill()
    assert run.stdout is not None
    said = ""
    while "continues with a temporary Prefect server" not in said:
        line = run.stdout.readline()
        assert line, f"the run ended: {said}{run.communicate()}"
        said += line
    wait_for(lambda: (tmp_path / "home" / "prefect.db").exists(), run)
    gate.touch()
    out, err = run.communicate()
    assert run.returncode == 0, said + out + err
    assert said.count("does not answer") == 1 and "httpx" not in said + out + err and "Traceback" not in out + err
    assert records(chatmill.store)["c"]["metrics"]["total"] == 16 and attempts(chatmill.store) == 3
    history = PrefectServer(tmp_path / "home")
    try:
        (kept,) = history.runs()
        assert kept["state_name"] == "Completed" and history.tasks(kept)["c"] == "Completed"
    finally:
        history.kill()
    own.start()  # for the fixture to end


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_run_whose_server_is_dead_or_stuck_can_be_stopped(
    chatmill: Chatmill,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    how: signal.Signals,
    configured: bool,
    stop: signal.Signals,
) -> None:
    env = {"PREFECT_API_URL": "", "PREFECT_HOME": str(tmp_path / "home")}
    if configured:
        own: PrefectServer = request.getfixturevalue("own")
        env = {"PREFECT_API_URL": own.url}
    run = chatmill.start(*gated(tmp_path / "gate"), **env)
    wait_for(lambda: paused(chatmill.store), run)
    server = psutil.Process(own.process.pid) if configured else temporary_server(run)
    server.send_signal(how)
    run.send_signal(stop)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, out + err
    assert "2 of 4 numbers are written" in err and "Traceback" not in out + err and "httpx" not in out + err
    assert not children_naming(chatmill.store)
    if not configured:
        psutil.wait_procs([server], timeout=60)
        assert not server.is_running()
    elif how == signal.SIGKILL:
        own.process.wait()
        own.start()


@pytest.mark.full
def test_without_any_server_everything_is_made_all_the_same(chatmill: Chatmill) -> None:
    database = "sqlite+aiosqlite:////nowhere/at/all.db"
    out = chatmill.run_process(*toys(), PREFECT_SERVER_DATABASE_CONNECTION_URL=database)
    assert "temporary server does not start" in out and "continues without it" in out
    assert records(chatmill.store)["c"]["metrics"]["total"] == 16


@pytest.mark.full
def test_first_runs_ever_may_start_at_once(chatmill: Chatmill, tmp_path: Path) -> None:
    home = str(tmp_path / "prefect")
    runs = [chatmill.start(*toys(), f"store.root={tmp_path / str(i)}", PREFECT_HOME=home) for i in range(5)]
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0 and "Prefect" not in out + err, out + err
