"""Runs through the command line: what is made, what is kept, and what happens when somebody pulls the plug."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.artifacts.store import Store
from pipeline.commands.status import print_status
from pipeline.commands.store import remove
from pipeline.errors import Interrupted, UserError
from pipeline.runner.run import Run
from tests.conftest import ROOT, Chatmill
from tests.small_hub import SmallHub


def toys(
    a: dict[str, Any] | None = None,
    b: dict[str, Any] | None = None,
    c: dict[str, Any] | None = None,
    total: str = "total",
) -> list[str]:
    """Overrides that declare two sources and the sum of both; total="ranked": the sum runs under torchrun."""

    def declare(name: str, run: str, params: dict[str, Any], inputs: str = "") -> str:
        inner = ", ".join(f"{k}: {v}" for k, v in params.items())
        return f"+{name}={{run: tests.toys.{run}, inputs: {{{inputs}}}, params: {{{inner}}}}}"

    return [
        "pipeline.stages=[a,b,c]",
        "store.min_free_gb=0",
        declare("a", "source", {"n": 4} | (a or {})),
        declare("b", "source", {"n": 5} | (b or {})),
        declare("c", total, {"scale": 1.0} | (c or {}), "a: a, b: b"),
    ]


def records(store: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in (store / "artifacts").glob("*/*/artifact.json")]
    return {name: record for record in sorted(found, key=lambda r: r["finished"]) for name in record["stages"]}


def test_a_name_is_kept_by_a_run_that_finds_everything_made(served: Chatmill) -> None:
    served.run(*toys(), "until=a")
    assert "Nothing to do" in served.run(*toys(), "until=a", "run.name=mine")
    assert records(served.store)["a"]["key"] in served.run("show", "mine")


def test_no_password_is_kept(served: Chatmill) -> None:
    served.run(*toys(), "until=a", "app.password=swordfish")
    kept = [path.read_bytes() for path in served.store.glob("runs/*/*.json")]
    assert kept and not any(b"swordfish" in content for content in kept)


def test_prefects_own_record_of_a_cached_stage_may_be_damaged(served: Chatmill) -> None:
    overrides = [*toys(), "pipeline.stages=[a,b]"]
    served.run(*overrides)
    before = records(served.store)
    for i, path in enumerate(sorted(served.store.glob("artifacts/*/*/_prefect.json"))):
        path.write_text("") if i else path.unlink()
        if i == 0:
            path.mkdir()
    served.run(*overrides, "force=[b]")
    after = records(served.store)
    assert after["a"] == before["a"] and after["b"]["finished"] > before["b"]["finished"]


def children_naming(store: Path) -> list[psutil.Process]:
    """Live processes that work on this store."""
    found = []
    for process in psutil.process_iter():
        try:
            if "pipeline.stages" in process.cmdline() and any(str(store) in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Any, process: "subprocess.Popen[str] | None" = None) -> None:
    while not condition():
        time.sleep(0.02)  # leaves the core to what is waited for
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()}")


def paused(store: Path, module: str = "source") -> bool:
    """Whether a toy has said how far it came, which it does while it waits."""
    for path in (store / "work").glob(f"{module}-*/progress.json"):
        with contextlib.suppress(FileNotFoundError):  # another toy's, which has just ended
            if '"done": 2' in path.read_text():
                return True
    return False


def test_a_run_with_its_own_server_makes_everything_and_the_next_one_nothing(chatmill: Chatmill) -> None:
    ask = toys(total="ranked")
    out = chatmill.run_process(*ask, PREFECT_API_URL="")  # which Prefect itself would take for a server's
    made = records(chatmill.store)
    assert made["c"]["metrics"]["total"] == 16
    assert "never made" in out and "ERROR" not in out
    before = {name: record["finished"] for name, record in made.items()}
    again = chatmill.run_process(*ask)
    assert "Nothing to do" in again
    assert {name: record["finished"] for name, record in records(chatmill.store).items()} == before


def test_a_changed_setting_makes_only_what_depends_on_it(served: Chatmill) -> None:
    served.run(*toys())
    before = records(served.store)
    out = served.run(*toys(b={"n": 6}))
    after = records(served.store)
    assert after["a"]["finished"] == before["a"]["finished"]
    assert after["c"]["metrics"]["total"] == 21
    assert "n 5 -> 6" in out
    assert "b is made again" in out


def test_inputs_that_nothing_reads_are_not_made_again(served: Chatmill) -> None:
    served.run(*toys())
    served.run("rm", "a", "b")
    assert "not needed" in served.run("plan", *toys())
    assert "Nothing to do" in served.run(*toys())
    served.run(*toys(c={"scale": 2.0}))
    assert records(served.store)["c"]["metrics"]["total"] == 32


def test_until_only_force_and_pin(served: Chatmill) -> None:
    served.run(*toys(), "until=a")
    assert set(records(served.store)) == {"a"}
    assert "c needs b" in served.run(*toys(), "only=[c]", code=2)
    served.run(*toys(), "only=[b,c]")
    first = records(served.store)
    served.run(*toys(), "force=[b]")
    second = records(served.store)
    assert second["b"]["finished"] > first["b"]["finished"]
    assert second["a"]["finished"] == first["a"]["finished"]
    key = first["b"]["key"]
    served.run(*toys(b={"n": 50}), f"+b.pin={key}", "force=[c]")
    assert records(served.store)["c"]["inputs"]["b"] == key


def test_an_input_of_what_is_being_made_is_not_removed(served: Chatmill, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    reader = f"+c={{run: tests.toys.source, inputs: {{a: a}}, params: {{pause_at: 2, gate: {gate}}}}}"
    ask = ["store.min_free_gb=0", "pipeline.stages=[a,c]", "+a={run: tests.toys.source, params: {n: 7}}", reader]
    process = served.start(*ask)
    wait_for(lambda: paused(served.store), process)
    assert "is being read by c now" in served.run("rm", "a", code=2)
    gate.touch()
    assert process.wait() == 0
    served.run("rm", "a")


@pytest.mark.parametrize("verb", [["plan"], []])
def test_a_reader_who_has_seen_enough_ends_no_run(served: Chatmill, verb: list[str]) -> None:
    read, written = os.pipe()
    os.close(read)
    env = os.environ | {"CHATMILL_STORE": str(served.store)}
    line = [sys.executable, "flows.py", *verb, *toys()]
    assert subprocess.run(line, cwd=ROOT, env=env, stdout=written, check=False).returncode == 0
    os.close(written)
    assert len(records(served.store)) == (0 if verb else 3)


def test_a_terminal_without_some_letters_and_bytes_that_are_no_text(chatmill: Chatmill) -> None:
    name = "a.params.gate='日本'"
    assert "would run" in chatmill.run_process("plan", *toys(), name, PYTHONIOENCODING="latin-1")
    assert "is not UTF-8" in chatmill.run_process("plan", *toys(), "a.params.gate=\udce4", code=2)


@pytest.mark.parametrize("who", [pytest.param("worker", marks=pytest.mark.full), "launcher"])
def test_after_kill_9_the_same_command_goes_on_and_no_process_is_left(
    served: Chatmill, tmp_path: Path, who: str
) -> None:
    gate = tmp_path / "gate"
    overrides = [*toys(a={"pause_at": 2, "gate": str(gate)}), "launch.retries=0"]
    process = served.start(*overrides)
    wait_for(lambda: paused(served.store), process)
    (worker,) = children_naming(served.store)
    (worker if who == "worker" else process).send_signal(signal.SIGKILL)
    _, err = process.communicate()
    if who == "worker":
        assert process.returncode == 1
        assert "SIGKILL" in err
    worker.wait(timeout=60)
    assert not children_naming(served.store)
    gate.touch()
    served.run(*overrides)
    made = records(served.store)
    assert made["a"]["metrics"] == {"numbers": 4, "resumed_at": 2}
    lines = (served.store / "artifacts" / "source" / made["a"]["key"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_ctrl_c_saves_says_how_to_go_on_and_ends_with_130(chatmill: Chatmill, tmp_path: Path) -> None:
    """As a terminal does it: the signal goes to every process of the foreground group."""
    gate = tmp_path / "gate"
    overrides = toys(a={"pause_at": 2, "gate": str(gate)})
    process = chatmill.start(*overrides)
    wait_for(lambda: paused(chatmill.store), process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, out + err
    assert "2 of 4 numbers are written" in err
    assert "Run the same command to continue" in err
    assert "ERROR" not in out + err
    assert not children_naming(chatmill.store)
    assert "the same command continues it" in chatmill.run("status", *overrides)


def test_the_temporary_server_ends_with_a_run_that_is_killed(chatmill: Chatmill, tmp_path: Path) -> None:
    process = chatmill.start(*toys(a={"pause_at": 2, "gate": str(tmp_path / "gate")}))
    wait_for(lambda: paused(chatmill.store), process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("pipeline.runner.server" in child.cmdline() for child in children)
    process.kill()
    process.communicate()
    psutil.wait_procs(children, timeout=60)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_two_runs_at_once_make_it_once_and_the_second_says_what_it_waits_for(served: Chatmill, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    overrides = toys(a={"pause_at": 2, "gate": str(gate)})
    first = served.start(*overrides)
    wait_for(lambda: paused(served.store), first)
    second = served.start(*overrides)
    heard = ""
    while not ("waits for run" in heard and "at 2 of 4 numbers" in heard):  # it may wait for another stage first
        assert second.stdout is not None
        line = second.stdout.readline()
        assert line and heard.count("\n") < 100, f"the second run does not say it: {heard}"
        heard += line
    gate.touch()
    out, err = second.communicate()
    assert first.wait() == 0
    assert second.returncode == 0, err
    assert "made by another run" in out
    assert records(served.store)["a"]["attempts"] == 1


def test_a_run_whose_stage_another_host_took_over_does_not_start_it_again(served: Chatmill, tmp_path: Path) -> None:
    run = served.start(*toys(a={"pause_at": 2, "gate": str(tmp_path / "gate")}), "until=a")
    wait_for(lambda: paused(served.store), run)
    (state,) = served.store.glob("locks/source-*.json")
    ours = json.loads(state.read_text())
    state.write_text(json.dumps(ours | {"host": "awake", "fence": ours["fence"] + 1}))
    out, err = run.communicate()
    assert run.returncode == 1 and "awake took over its work" in out + err
    (log,) = served.store.glob("work/source-*/log.txt")
    assert log.read_text().count("$ cd ") == 1


def test_a_damaged_file_makes_its_stage_again_said_in_one_line(served: Chatmill) -> None:
    served.run(*toys())
    made = records(served.store)["b"]
    path = served.store / "artifacts" / "source" / made["key"] / "numbers.txt"
    path.write_bytes(path.read_bytes()[::-1])
    out = served.run(*toys(c={"scale": 3.0}))
    assert "sha256 differs" in out
    assert records(served.store)["c"]["metrics"]["total"] == 48
    assert len(list((served.store / "quarantine").iterdir())) == 1


def test_a_failing_stage_says_what_and_where_and_leaves_what_was_asked_for(served: Chatmill) -> None:
    out = served.run(*toys(a={"fail_at": 2}), "pipeline.targets=[b,c]", code=1)
    assert "a failed (unknown): RuntimeError: number 2 cannot be written" in out
    assert "log.txt" in out
    assert set(records(served.store)) == {"b"}


def test_after_a_failure_nothing_starts_that_nobody_reads_any_more(served: Chatmill, tmp_path: Path) -> None:
    """d fails while b waits; then c, which only the report r would read, does not start."""
    gate = tmp_path / "gate"
    chain = [
        "pipeline.stages=[b,c,d,r]",
        "store.min_free_gb=0",
        "launch.slots=2",
        f"+b={{run: tests.toys.source, params: {{n: 3, pause_at: 2, gate: {gate}}}}}",
        "+c={run: tests.toys.total, inputs: {b: b}}",
        "+d={run: tests.toys.source, params: {n: 3, fail_at: 0}}",
        "+r={run: tests.toys.total, inputs: {c: c, d: d}}",
    ]
    process = served.start(*chain)
    assert process.stdout is not None
    said = next(line for line in process.stdout if "Cannot be made without it" in line)
    gate.touch()
    rest, err = process.communicate(timeout=300)
    assert "r. Not started, because only those need them: c. The run continues with: b (running)." in said
    assert process.returncode == 1 and "d failed (unknown)" in err and "Traceback" not in rest + err
    assert set(records(served.store)) == {"b"}


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (None, ("interrupted", "the same command continues it")),
        ({"status": "stopped", "cause": "preempted"}, ("stopped", "the same command continues it")),
        ({"status": "failed", "cause": "peer_lost"}, ("failed (peer_lost)", "the same command continues it")),
        ({"status": "failed", "cause": "oom"}, ("failed (oom)", "launch.device_batch_size")),
        ({"status": "failed", "cause": "disk"}, ("failed (disk)", "make room")),
        ({"status": "failed", "cause": "nan"}, ("failed (nan)", "would fail again: change what it says")),
        ({"status": "failed", "cause": "config"}, ("failed (config)", "would fail again: change what it says")),
    ],
)
def test_status_says_how_unfinished_work_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], outcome: dict[str, str] | None, said: tuple[str, ...]
) -> None:
    store = Store(tmp_path)
    work = store.work("pipeline.stages.finetune", "4f2a00aa4f2a00aa")
    work.mkdir(parents=True)
    (work / "job.json").write_text(json.dumps({"stage": "sft", "key": "4f2a00aa4f2a00aa"}))
    if outcome:
        (work / "outcome.json").write_text(json.dumps(outcome | {"message": "as it was"}))
    print_status(Console(width=300), store)
    told = capsys.readouterr().out
    assert all(words in told for words in said), told
    other = store.root / "work" / "rl-4f2abbbb4f2abbbb"
    other.mkdir()
    with pytest.raises(UserError, match="matches several"):
        remove(store, ["4f2a"])
    other.rmdir()
    assert remove(store, ["4f2a"]) == ["finetune-4f2a00aa4f2a00aa (unfinished)"]
    assert not work.exists()


def test_a_sweep_makes_what_its_runs_share_once(served: Chatmill) -> None:
    out = served.run("-m", *toys(), "c.params.scale=1.0,2.0")
    totals = sorted(r["metrics"]["total"] for r in all_records(served.store, "total"))
    assert totals == [16, 32]
    assert len(all_records(served.store, "source")) == 2
    assert out.count("===") == 2
    states = [json.loads(path.read_text()) for path in (served.store / "runs").glob("*/state.json")]
    assert len(states) == 2 and len({state["sweep"] for state in states}) == 1 and states[0]["sweep"]
    other = served.store.with_name("other")
    served.run("-m", *toys(), f"store.root={other}", "until=a,b")
    assert set(records(other)) == {"a", "b"} and (other / "runs" / "sweeps").is_dir()


@pytest.mark.parametrize(
    ("override", "said"), [("c.params.sacle=1,2", "Did you mean"), ("recipe=tiny,d21", "no recipe called 'd21'")]
)
def test_a_wrong_name_in_a_sweep_is_said_in_one_line(chatmill: Chatmill, override: str, said: str) -> None:
    assert said in chatmill.run("-m", *toys(), override, code=2)


def all_records(store: Path, module: str) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in (store / "artifacts" / module).glob("*/artifact.json")]


def test_the_guard_names_what_changed_and_accept_keeps_the_old_artifact(
    served: Chatmill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "own_stage.py"
    text = (ROOT / "tests" / "toys" / "source.py").read_text()
    module.write_text(text)
    own = [
        "pipeline.stages=[a]",
        "+a={run: own_stage, params: {n: 2}}",
        "store.min_free_gb=0",
        "launch.usd_per_hour=1e6",
    ]
    monkeypatch.syspath_prepend(tmp_path)
    env = {"PYTHONPATH": str(tmp_path)}
    served.run(*own, **env)
    module.write_text(text.replace('"numbers": job.params.n', '"numbers": job.params.n + 0'))
    out = served.run(*own, code=3, **env)
    assert "own_stage (main)" in out
    assert "accept a --why" in out
    served.run("accept", "a", "--why", "same numbers", *own, **env)
    assert "Nothing to do" in served.run(*own, **env)
    module.write_text(text.replace('"numbers": job.params.n', '"numbers": job.params.n + 1'))
    served.run(*own, "force=[a]", **env)
    assert sorted(r["metrics"]["numbers"] for r in all_records(served.store, "own_stage")) == [2, 3]


def test_more_shards_are_all_that_is_fetched_and_tokenised(served: Chatmill, tmp_path: Path) -> None:
    with small_text_hub(tmp_path, shards=5).serving() as hub:
        env = {"HF_ENDPOINT": hub.url}
        common = ["data=fineweb_edu", "data.repo_id=me/text", "data.val_shard=shard_00004.parquet", "until=tokenize"]
        common += ["data.tokenizer_shards=1", "tokenizer.params.vocab_size=300", "store.min_free_gb=0"]
        served.run(*common, "data.train_shards=2", **env)
        first = records(served.store)
        fetched = [hub.gets(f"shard_0000{i}.parquet") for i in range(5)]
        out = served.run(*common, "data.train_shards=4", **env)
        second = records(served.store)
        assert [hub.gets(f"shard_0000{i}.parquet") for i in range(5)] == [*fetched[:2], 1, 1, fetched[4]]
    assert second["tokenizer"]["finished"] == first["tokenizer"]["finished"]
    found = re.search(r"([\d,]+) tokens in 5 shards, ([\d,]+) of them new", out)
    assert found, out
    every, new = (int(number.replace(",", "")) for number in found.groups())
    assert new == pytest.approx(every * 2 / 5, rel=0.01)


def test_a_branch_that_moved_is_followed_when_download_is_forced(served: Chatmill, tmp_path: Path) -> None:
    with small_text_hub(tmp_path, shards=2).serving() as hub:
        env = {"HF_ENDPOINT": hub.url}
        common = [
            "data=fineweb_edu",
            "data.repo_id=me/text",
            "data.train_shards=1",
            "data.val_shard=shard_00001.parquet",
        ]
        common += ["until=download", "store.min_free_gb=0"]
        served.run(*common, **env)
        first = records(served.store)["download"]
        hub.commit = "d" * 40
        hub.add("datasets/me/text/shard_00000.parquet", table_of(["something else"]))
        assert "Nothing to do" in served.run(*common, **env)
        served.run(*common, "force=[download]", **env)
        second = records(served.store)["download"]
        assert second["key"] != first["key"] and second["source"]["commit"] == hub.commit
        assert "Nothing to do" in served.run(*common, **env)


def small_text_hub(folder: Path, shards: int) -> SmallHub:
    hub = SmallHub(folder / "hub")
    for i in range(shards):
        texts = [f"shard {i} says {j} words of text to learn from" for j in range(200)]
        hub.add(f"datasets/me/text/shard_{i:05d}.parquet", table_of(texts))
    return hub


def table_of(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue()


def test_a_mirror_that_answers_with_a_web_page_is_said_in_one_line(chatmill: Chatmill, tmp_path: Path) -> None:
    with small_text_hub(tmp_path, shards=2).serving() as hub:
        page = (200, {"Content-Type": "text/html"}, [b"<html>\x1b]0;owned\x07</html>"])
        hub.answers["/api/datasets/me/text/revision/main"] = page
        out = chatmill.run("data=fineweb_edu", "data.repo_id=me/text", "until=download", code=1, HF_ENDPOINT=hub.url)
    assert f"{hub.url}/api/datasets/me/text/revision/main: the answer is not JSON" in out
    assert len(out.strip().splitlines()) <= 2 and "\x1b" not in out


def test_what_did_not_start_for_another_s_failure_is_not_what_a_run_raises() -> None:
    waited, wrong = Interrupted("problems had not started"), UserError("code changed since this run was planned")
    maker = SimpleNamespace(switch=SimpleNamespace(asked=False))
    run: Any = SimpleNamespace(maker=maker, failures=[waited, wrong])
    with pytest.raises(UserError, match="code changed"):
        Run.raise_failures(run)


def test_an_unreachable_hub_is_said_in_one_line(chatmill: Chatmill) -> None:
    out = chatmill.run("data=fineweb_edu", "until=download", code=1, HF_ENDPOINT="http://127.0.0.1:1")
    assert "cannot reach karpathy/fineweb-edu-100b-shuffle" in out
    assert len(out.strip().splitlines()) <= 2
