"""`bench gpu`: its parts run in small on a CPU, and what a crash, a hang, a budget or full memory does to them."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model.attention import BACKENDS
from model.kernels import fp8
from pipeline.bench import command, equality, gpu, registry, training
from pipeline.bench.gpu import BARS, PARTS, Child, Part
from pipeline.bench.jobs import MODERN
from pipeline.bench.registry import Bench, parse
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["bench.tiny=true", "bench.repeats=1", "bench.compile=false", "bench.threads=1", "bench.device=cpu"]
NOT_THERE = [
    "hydra",
    "omegaconf",
    "prefect",
    "rich",
    "gradio",
    "fastapi",
    "huggingface_hub",
    "wandb",
    "rustbpe",
    "psutil",
]
NOT_THERE += ["matplotlib", "pydantic", "regex", "tensorboard"]


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_bench(*words: str, save=lambda result: None) -> Bench:
    bench = command.prepare(*parse([*words, *QUICK]))
    bench.save = save
    return bench


@pytest.mark.parametrize("name", [name for name in PARTS if not name.startswith("d12")])  # in small, d12 is d20
def test_every_part_runs_in_small_on_a_cpu(name: str) -> None:
    part = PARTS[name]
    found = command.measure(part.measurement, make_bench(*part.words.split()))
    assert found and not command.wrong(found)
    if part.measurement == "train_step":
        assert found["tiny eager"]["tok_s"] > 0
    if part.measurement == "decode":
        assert found["tiny batch 3"].keys() >= {"tok_s", "of_bandwidth", "of_bound"}
    if part.measurement == "fit":
        assert found["skipped"]["why"] == "needs CUDA"


@pytest.mark.full
def test_compiled_steps_are_those_of_eager_ones() -> None:
    found = command.measure(
        "equal_compiled", command.prepare(*parse([word for word in QUICK if "compile" not in word]))
    )
    if "skipped" in found:
        pytest.skip(found["skipped"]["why"])
    assert found["modern float32 steps"]["within"]


def test_bars_belong_to_parts() -> None:
    assert BARS.keys() <= PARTS.keys()


# What is not equal is seen.


def test_attention_in_a_wrong_window_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["blocked"]
    monkeypatch.setitem(BACKENDS, "blocked", lambda q, k, v, window, ids: right(q, k, v, max(1, window - 1), ids))
    found = command.measure("equal_attention", make_bench())
    assert {case for case, values in found.items() if not values["within"]} >= {"blocked window 16"}
    assert all(values["within"] for case, values in found.items() if case.startswith("sdpa"))
    assert command.wrong(found)


def test_a_backend_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(BACKENDS, "blocked", refuse)
    found = command.measure("equal_attention", make_bench())
    assert (
        found["blocked window 64"] == {"failed": "RuntimeError: no kernel image"} and found["sdpa window 64"]["within"]
    )
    assert command.wrong(found)


def test_a_wrong_scale_of_8_bit_products_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fp8.multiply
    monkeypatch.setattr(fp8, "multiply", lambda *arguments, **named: right(*arguments, **named) * 1.03)
    found = command.measure("equal_fp8", make_bench())
    assert not found["products forward"]["within"] and not found["products of the weight's gradient"]["within"]


@pytest.mark.full
def test_steps_at_another_rate_are_beyond_every_bound() -> None:
    bench = make_bench()
    for words in (equality.FLOAT32, equality.FP8):
        usual = equality.observe(bench, "", words)["steps"]
        faster = equality.observe(bench, "optim.init_lr_frac=0.024", words)["steps"]
        assert equality.difference(faster, usual) > equality.FP8_BOUND > equality.BOUNDS["float32"]["steps"]


def test_decoding_that_draws_other_tokens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.kernels.graphs import FixedCache

    right = FixedCache.positions
    monkeypatch.setattr(FixedCache, "positions", lambda self, count: (right(self, count) - 1).clamp(min=0))
    assert not command.measure("equal_graphs", make_bench())["float32, called and plain"]["within"]


# Parts as processes.

WRITE = "import json, sys; json.dump({%r: %r}, open(sys.argv[1], 'w'))"


def run_parts(monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], *words: str) -> tuple[dict, list[dict]]:
    """The result of parts that are these programs, called with the file they write to, and all that was saved."""
    monkeypatch.setattr(gpu, "PARTS", {name: Part("memory", 60) for name in programs})
    monkeypatch.setattr(gpu, "command", lambda bench, part, out: [sys.executable, "-c", programs[out.stem], str(out)])
    saved: list[dict] = []
    result = gpu.gpu(make_bench(*words, save=lambda found: saved.append(copy.deepcopy(found))))
    return result, saved


def test_a_part_that_crashes_costs_no_other_and_all_are_saved_as_they_end(monkeypatch, capsys) -> None:
    fine = WRITE % ("memory", {"copy": {"gb_s": 7.0}})
    programs = {
        "first": fine,
        "killed": fine + "; import os; os.kill(os.getpid(), 11)",
        "raises": "raise SystemError('an illegal memory access was encountered')",
        "out of memory": WRITE % ("memory", {"failed": {"error": "OutOfMemoryError: CUDA out of memory"}})
        + "; sys.exit(1)",
        "last": fine,
    }
    result, saved = run_parts(monkeypatch, programs)
    assert [list(found) for found in saved] == [list(programs)[: n + 1] for n in range(len(programs))]
    assert result["first"]["copy"] == result["last"]["copy"] == {"gb_s": 7.0}
    assert result["killed"]["failed"]["error"] == "ended by SIGSEGV" and result["killed"]["copy"] == {"gb_s": 7.0}
    assert "illegal memory access" in result["raises"]["failed"]["output"][-1]
    assert "CUDA out of memory" in result["out of memory"]["failed"]["error"]
    assert command.wrong(result) and not command.wrong({"first": result["first"]})
    assert gpu.summary(result)["killed"] == {"measured": "failed: ended by SIGSEGV"}


def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_had(monkeypatch, tmp_path: Path) -> None:
    program = (
        "import json, os, sys, time\n"
        "json.dump({'memory': {'copy': {'gb_s': 7.0}}}, file := open(sys.argv[1] + '.new', 'w')); file.close()\n"
        "os.rename(file.name, sys.argv[1]); time.sleep(999)"
    )
    monkeypatch.setattr(gpu, "command", lambda bench, part, out: [sys.executable, "-c", program, str(out)])
    monkeypatch.setitem(gpu.PARTS, "hangs", Part("memory", 60))
    child = Child(make_bench(), "hangs", tmp_path, limit=0)
    while not child.out.exists():
        assert child.process.poll() is None
        time.sleep(0.01)
    assert child.ended() and child.process.returncode == -signal.SIGKILL
    result = child.result()
    assert result["copy"] == {"gb_s": 7.0} and "bench.budget_seconds" in result["failed"]["error"]


def test_parts_end_with_the_command(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    sleep = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(999)"
    program = (
        "import sys, torch; from pipeline.bench import gpu; from pipeline.bench.registry import Bench, parse\n"
        f"gpu.command = lambda *_: [sys.executable, '-c', {sleep!r}]\n"
        "gpu.gpu(Bench(parse(['bench.tiny=true', 'bench.parts=[d32 memory]'])[0], [], torch.device('cpu')))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.01)
    parent.terminate()
    assert parent.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_what_is_not_expected_to_fit_into_the_budget_is_skipped_by_name(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "Child", None)  # no process is started
    result = gpu.gpu(make_bench("bench.budget_seconds=5"))
    assert list(result) == list(PARTS)
    assert all("expected to take 20 s" in found["skipped"]["why"] for found in result.values())
    said = capsys.readouterr().out
    assert all(name in said for name in PARTS) and not command.wrong(result)
    gpu.print_summary(result)
    assert capsys.readouterr().out.endswith("d12 base fp8,d12 modern fp8]'.\n")


def test_parts_that_are_timed_run_alone() -> None:
    timed, other = Part("memory", 1), Part("memory", 1, alone=False)
    assert gpu.may_start(timed, []) and gpu.may_start(other, []) and gpu.may_start(other, [other])
    assert not any(gpu.may_start(*pair) for pair in ((timed, [other]), (other, [timed]), (timed, [timed])))


def test_a_bar_is_shown_beside_what_was_measured_and_fails_nothing(monkeypatch) -> None:
    program = WRITE % ("memory", {"d20 compiled": {"tok_s": 140_000.0, "mfu": 0.5}})
    result, _ = run_parts(monkeypatch, {"d20 base bf16": program})
    assert result["d20 base bf16"]["d20 compiled"] == {
        "tok_s": 140_000.0,
        "mfu": 0.5,
        "tok_s_bar": 150_000,
        "mfu_bar": 0.53,
    }
    assert not command.wrong(result)
    assert list(gpu.summary(result).values()) == [
        {"measured": 140_000.0, "bar": 150_000},
        {"measured": 0.5, "bar": 0.53},
    ]


def test_of_cases_that_are_equal_the_worst_is_shown_and_all_that_are_not() -> None:
    cases = {name: equality.judged(error, 0.01) for name, error in (("a", 1e-9), ("b", 0.02), ("c", 1e-3), ("d", 0.03))}
    shown = gpu.summary({"equal_steps": {"seconds": 1.0} | cases})
    assert list(shown) == [f"equal_steps: {name} error" for name in "bcd"]


def test_a_part_gets_its_settings_and_those_of_the_user_which_count(tmp_path: Path) -> None:
    words = ["bench.repeats=3", "bench.budget_seconds=99", "bench.parts=[decode d20]", "model.depth=2"]
    bench = Bench(*parse(words), torch.device("cpu"))
    line = gpu.command(bench, PARTS["d12 modern fp8"], tmp_path / "a part.json")
    given, others = parse(line[4:])
    assert (
        line[3] == "train_step" and given.repeats == 3 and given.jobs == ["d12"] and given.out.endswith("a part.json")
    )
    assert given.parts is None and given.budget_seconds == 520
    assert others == [*MODERN.split(), "pretrain.params.fp8=true", "model.depth=2"]


def test_a_part_or_model_there_is_not_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"Did you mean bench\.parts\.decode d20"):
        gpu.check(make_bench("bench.parts=[decode d2]"))
    settings, overrides = parse(["bench.device=cpu", "bench.models=[d21]"])
    with pytest.raises(UserError, match=r"Did you mean bench\.models\.d20"):
        registry.find("decode")(Bench(settings, overrides, torch.device("cpu")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("start", [["flows.py", "bench"], ["-m", "pipeline.bench"]])
def test_without_a_gpu_one_line_says_so(start: list[str]) -> None:
    done = subprocess.run([sys.executable, *start, "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "bench gpu: torch finds no GPU here. Set bench.tiny=true for a trial on the CPU.\n"


def test_it_runs_where_only_torch_and_a_few_packages_are(tmp_path: Path) -> None:
    refuse = f"import sys; sys.modules.update(dict.fromkeys({NOT_THERE!r}))"
    (tmp_path / "sitecustomize.py").write_text(refuse)  # in the processes of parts too
    out, parts = tmp_path / "bench.json", ["equal_graphs", "d12 modern fp8", "decode d20"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    line = [
        sys.executable,
        "-m",
        "pipeline.bench",
        "gpu",
        *QUICK,
        f"bench.out={out}",
        f"bench.parts={json.dumps(parts)}",
    ]
    done = subprocess.run(line, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())["gpu"]
    assert list(written) == parts
    assert written["d12 modern fp8"]["tiny eager"]["tok_s"] > 0
    assert written["decode d20"]["tiny batch 1"]["of_bandwidth"] > 0


# Memory.


def out_of_memory_above(rows: int, tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    right, trainers = training.run_trainer, []

    def run(trainer, timer) -> None:
        assert all(not vars(earlier) for earlier in trainers)  # the memory of an attempt is free before the next
        trainers.append(trainer)
        tried.append(trainer.settings.micro_batch)
        if trainer.settings.micro_batch > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        right(trainer, timer)

    monkeypatch.setattr(training, "run_trainer", run)


def test_a_step_that_does_not_fit_is_measured_with_fewer_rows_a_pass(monkeypatch, capsys) -> None:
    tried: list[int] = []
    out_of_memory_above(2, tried, monkeypatch)
    found = command.measure("train_step", make_bench("pretrain.params.total_batch_tokens=384"))
    assert tried == [12, 6, 3, 1] and found["tiny eager"]["micro_batch_rows"] == 1
    assert "out of memory with 12 rows per pass, trying 6" in capsys.readouterr().out


def test_a_step_that_does_not_fit_at_all_fails(monkeypatch, capsys) -> None:
    out_of_memory_above(0, tried := [], monkeypatch)
    found = command.measure("train_step", make_bench())
    assert tried == [2, 1] and "OutOfMemoryError" in found["failed"]["error"]
