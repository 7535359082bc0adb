"""`bench`: every measurement runs and gives its quantities; what they say is for machines with nothing else to do."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.text.files import write_shard
from pipeline import typed
from pipeline.bench import command, jobs, registry
from pipeline.bench.data import find_shards
from pipeline.bench.registry import Bench, Skipped, parse
from pipeline.bench.tables import print_table
from pipeline.bench.training import kind_of, stall
from pipeline.errors import UserError
from pipeline.stages import pretrain
from tests.pipeline.test_evaluate import write_bundle

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["bench.tiny=true", "bench.repeats=1", "bench.compile=false", "bench.threads=1", "bench.device=cpu"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of made-up sentences, laid out like a hub."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "datasets" / "someone" / "texts"
    folder.mkdir(parents=True)
    dice = random.Random(7)
    words = ["".join(dice.choices("abcdefghijklmnop", k=dice.randint(2, 8))) for _ in range(300)]
    for number in range(3):
        texts = [" ".join(dice.choices(words, k=120)) + "." for _ in range(120)]
        write_shard(folder / f"shard_{number:05d}.parquet", texts)
    return root


def measured(name: str, *settings: str) -> registry.Result:
    return registry.find(name)(command.prepare(*parse([*QUICK, *settings])))


QUANTITIES = {
    "matmul": {"float32": {"tflop_s", "median_tflop_s", "size"}},
    "memory": {"copy": {"gb_s"}},
    "attention": {"sdpa full": {"ms", "tflop_s"}, "sdpa window 4": {"ms", "tflop_s"}},
    "cross_entropy": {
        "fused 64 x 16 x 128": {"ms", "tflop_s", "peak_extra_mb"},
        "plain 64 x 16 x 128": {"ms", "tflop_s", "peak_extra_mb"},
    },
    "optimiser": {"tiny": {"step_ms", "muon_ms", "adamw_ms", "share_of_step"}},
    "train_step": {"tiny eager": {"tok_s", "of_matmul", "matmul_tflop_s", "first_step_extra_s", "phases", "kernels"}},
    "checkpoint": {"tiny": {"copy_s", "write_s", "stall_s", "share_of_time"}},
    "loader": {
        "stream": {"rows_s", "share_of_step", "waited_share"},
        "bestfit": {"rows_s", "share_of_step", "waited_share"},
    },
    "decode": {"tiny batch 3": {"tok_s", "of_bound", "of_matmuls", "of_torch_bound", "of_torch_matmuls"}},
    "rollouts": {"smallest": {"tok_s", "one_prompt_tok_s", "times_one_prompt", "one_answer_tok_s", "times_one_answer"}},
}


@pytest.mark.parametrize("name", QUANTITIES)
def test_each_measurement_gives_its_quantities(name: str) -> None:
    found = measured(name)
    for case, quantities in QUANTITIES[name].items():
        assert quantities <= found[case].keys()
        assert all(value >= 0 for value in found[case].values() if isinstance(value, float))


def test_encoding_is_measured_on_the_text_that_is_given(hub: Path) -> None:
    found = measured("tokenise", f"bench.data={hub}")
    assert found["2 processes"].keys() >= {"tok_s", "mb_s", "times_one"}
    assert found["1 process"]["tok_s"] > 0


def test_processes_that_encode_do_not_load_prefect(hub: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", "flows.py", "bench", "tokenise", *QUICK, f"bench.data={hub}"]
    done = subprocess.run([*line, f"bench.out={tmp_path}/b.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("tiktoken.core") >= 3 and "prefect" not in done.stderr


@pytest.mark.parametrize("zipped", [False, True])
def test_core_is_measured_on_the_bundle_that_is_given_and_both_ways_agree(tmp_path: Path, hub: Path, zipped) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_bundle(bundle)
    if zipped:
        bundle = Path(shutil.make_archive(str(tmp_path / "eval_bundle"), "zip", bundle))

    found = measured("core", f"bench.bundle={bundle}", f"bench.data={hub}", "bench.items=5")

    assert list(found) == ["mc", "all tasks"]
    for case in found.values():
        assert case["items"] == 5 and case["same_answers"] == 1.0
        assert case["times_one"] == pytest.approx(case["items_s"] / case["one_at_a_time_items_s"])


def test_core_without_a_bundle_is_skipped() -> None:
    with pytest.raises(Skipped, match=r"bench\.bundle"):
        measured("core")


def test_what_only_gpus_can_answer_is_skipped_elsewhere() -> None:
    with pytest.raises(Skipped):
        measured("fit")


def test_one_file_holds_what_was_measured_on_what_and_when(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "bench.json"
    assert command.run(["memory", "fit"], [*QUICK, f"bench.out={out}"]) == 0
    written = json.loads(out.read_text())
    assert {"machine", "versions", "date", "config", "memory", "fit"} == written.keys()
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["cores"] >= 1 and "host" not in written["machine"]
    assert "gb_s" in capsys.readouterr().out


def test_a_measurement_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> registry.Result:
        raise ZeroDivisionError("no such luck")

    right = registry.find
    monkeypatch.setattr(registry, "find", lambda name: broken if name == "matmul" else right(name))
    out = tmp_path / "bench.json"
    assert command.run(["matmul", "memory"], [*QUICK, f"bench.out={out}"]) == 1
    written = json.loads(out.read_text())
    assert "no such luck" in written["matmul"]["failed"]["error"]
    assert "copy" in written["memory"]


def test_a_wrong_name_is_the_users_mistake(chatmill) -> None:
    assert "did you mean" in chatmill.run("bench", "memori", code=2).lower()
    with pytest.raises(UserError, match="seed"):
        parse(["bench.seed=3"])
    with pytest.raises(UserError, match=r"bench\.seeds: is 0"):
        parse(["bench.seeds=0"])


def test_measurements_run_where_only_torch_and_numpy_are(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["train_step", *QUICK, "model=modern", "optim.normuon=true", "--out", str(out)]
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['hydra', 'omegaconf', 'prefect', 'rich', 'huggingface_hub'])); "
        f"from pipeline.bench.__main__ import main; sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["train_step"]["tiny eager"]["tok_s"] > 0


@pytest.mark.parametrize("name", jobs.JOBS)
def test_a_job_is_the_same_with_hydra_and_without(name: str) -> None:
    bench = Bench(*parse(["bench.tiny=true"]), torch.device("cpu"))
    plain = jobs.read_plainly(jobs.JOBS[name].split())["params"]
    assert jobs.compose(bench, jobs.JOBS[name]).params == typed.build(pretrain.Params, plain)


def sample_efficiency(hub: Path, out: Path, *settings: str) -> dict:
    few = ["bench.steps=4", "bench.eval_every=2", "bench.total_batch_tokens=64", "bench.sequence_len=32"]
    small = ["bench.vocab_size=300", "bench.val_tokens=640", "model.width=32", "model.head_dim=16", "bench.depth=2"]
    where = [f"bench.data={hub}", f"bench.out={out}", "bench.threads=1"]
    assert command.run(["sample_efficiency"], [*where, *few, *small, *settings]) == 0
    return json.loads(out.read_text())["sample_efficiency"]


def test_sample_efficiency_compares_architectures_over_seeds(hub: Path, tmp_path: Path) -> None:
    found = sample_efficiency(hub, tmp_path / "bench.json", "bench.seeds=2")
    assert list(found) == ["base", "modern"]
    for arch in found.values():
        assert list(arch["bpb"]) == ["2", "4"]
        for step, mean in arch["bpb"].items():
            assert mean == pytest.approx(sum(arch["seeds"][step]) / 2)
            assert len(set(arch["seeds"][step])) == 2
    assert found["base"]["params"] == 2 * 300 * 32 + 12 * 2 * 32**2
    assert found["base"]["matmul_params"] == found["modern"]["matmul_params"]


def test_another_split_and_own_variants_are_settings(hub: Path, tmp_path: Path) -> None:
    variants = "bench.variants={plain: model=base, warm: model=base optim=muon_modern optim.matrix_lr=0.01}"
    first = sample_efficiency(hub, tmp_path / "a.json", "bench.variants=[model=base]")
    other = sample_efficiency(hub, tmp_path / "b.json", "bench.split=0", variants)
    assert list(first) == ["model=base"]
    assert len({other["plain"]["bpb"]["4"], other["warm"]["bpb"]["4"], first["model=base"]["bpb"]["4"]}) == 3


def test_sample_efficiency_says_what_it_lacks(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bench\.data"):
        measured("sample_efficiency")
    with pytest.raises(UserError, match="has no shard"):
        find_shards(str(tmp_path))
    with pytest.raises(UserError, match=r"bench\.split"):
        sample_efficiency(hub, tmp_path / "c.json", "bench.split=3")


def test_a_save_costs_what_the_steps_beside_it_are_slower() -> None:
    assert stall([1.5, 1.2, 0.9, 3.0], usual=1.0, until=2.6) == pytest.approx(0.7)


def test_operators_are_told_apart_by_their_names() -> None:
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("aten::addmm") == kind_of("nvjet_tst_128x256_64x4") == "matmul"
    assert kind_of("aten::mul") == "elementwise"


def test_a_table_that_is_too_wide_has_a_row_per_quantity(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table({"a": {"x": 1, "y": 2.34567}, "b": {"x": 1000}})
    narrow = capsys.readouterr().out.splitlines()
    assert [line.split() for line in narrow] == [["x", "y"], ["a", "1", "2.346"], ["b", "1,000"]]
    print_table({"a": {f"quantity_{n}": {"z": n} for n in range(12)}})
    wide = capsys.readouterr().out.splitlines()
    assert len(wide) == 13 and wide[1].split() == ["quantity_0.z", "0"]
    assert all(len(line) <= 80 for line in narrow + wide)


def test_results_are_printed_as_json_where_rich_is_missing(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    print_table(result := {"copy": {"gb_s": 7.0}})
    assert json.loads(capsys.readouterr().out) == result
