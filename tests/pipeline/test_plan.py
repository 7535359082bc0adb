"""What a plan says, without running anything."""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_hub import SmallHub

import pipeline.plan.plan
from pipeline.artifacts.store import RECORD, Store
from pipeline.config import compose as config
from pipeline.config import renamed
from pipeline.errors import UserError
from pipeline.job import Launch
from pipeline.plan import dag
from pipeline.plan.code import Code, code_of
from pipeline.plan.dag import Dag, Stage
from pipeline.plan.plan import Step, make_plan
from pipeline.plan.session import Session
from pipeline.stage import load
from tests.toys import source, total

ROOT = Path(config.__file__).resolve().parents[2]


def make_dag(edges: dict[str, list[str]], scale: dict[str, float] | None = None) -> Dag:
    """A DAG of toys: a stage without inputs is a source."""
    stages = {}
    for i, (name, inputs) in enumerate(edges.items()):
        number = (scale or {}).get(name, float(i))
        if inputs:
            params: Any = total.Params(scale=number)
            run = "tests.toys.total"
        else:
            params, run = source.Params(n=3, gate=name), "tests.toys.source"
        stages[name] = Stage(name, run, {i: i for i in inputs}, params, Launch())
    return Dag(stages)


def publish_all(found: Dag, store: Store) -> dict[str, str]:
    """Pretend that every stage was made."""
    plan = make_plan(found, store, online=True)
    for step in plan.steps.values():
        assert step.key is not None
        if store.find(step.stage.run, step.key):
            continue
        work = store.work(step.stage.run, step.key)
        (work / "out").mkdir(parents=True)
        module = step.stage.run.rpartition(".")[2]
        facts = {"module": module, "key": step.key, "stages": [step.name], "run": "r", "seconds": 60.0, "finished": 1.0}
        store.publish(work, facts | {"usd": 0.0} | step.content)
    return {name: str(step.key) for name, step in plan.steps.items()}


DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def test_changing_one_stage_changes_its_key_and_those_behind_it_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = publish_all(make_dag(DIAMOND), store)
    after = make_plan(make_dag(DIAMOND, {"b": 5.0}), store, online=True)
    changed = {name for name, step in after.steps.items() if step.key != before[name]}
    assert changed == {"b", "d"}
    assert {s.name for s in after.running()} == {"b", "d"}
    assert after.steps["b"].why == "scale 1.0 -> 5.0"
    assert after.steps["d"].why == "b is made again"


@st.composite
def dags(draw: st.DrawFn) -> dict[str, list[str]]:
    names = [f"s{i}" for i in range(draw(st.integers(1, 7)))]
    return {n: draw(st.lists(st.sampled_from(names[:i]), unique=True)) if i else [] for i, n in enumerate(names)}


@given(dags(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_stage_runs_exactly_if_it_is_missing_and_wanted(tmp_path_factory: Any, edges: Any, data: Any) -> None:
    """Against the rule written down once more, as a recursion from the targets."""
    store = Store(tmp_path_factory.mktemp("store"))
    found = make_dag(edges)
    made = publish_all(found, store)
    missing = set(data.draw(st.lists(st.sampled_from(list(edges)), unique=True)))
    for name in missing:
        store.discard(store.folder(found.stages[name].run, made[name]))
    expected: set[str] = set()

    def want(name: str) -> None:
        if name in missing and name not in expected:
            expected.add(name)
            for read in edges[name]:
                want(read)

    for name in found.targets():
        want(name)
    assert {s.name for s in make_plan(found, store, online=True).running()} == expected


def test_a_plan_never_asks_the_network_and_says_what_it_cannot_know(tmp_path: Path) -> None:
    settings = config.settings(config.compose(["data=fineweb_edu", "until=tokenizer"]))
    plan = make_plan(dag.build(settings), Store(tmp_path), online=False, until="tokenizer")
    assert plan.steps["tokenizer"].key is None
    assert plan.steps["tokenizer"].why == "unknown until download"


def test_who_gets_the_hub_token_is_checked_passed_on_and_in_no_key(tmp_path: Path, monkeypatch: Any) -> None:
    with SmallHub(tmp_path / "hub").serving() as small_hub:
        monkeypatch.setenv("HF_ENDPOINT", small_hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        small_hub.add("datasets/karpathy/fineweb-edu-100b-shuffle/shard_00000.parquet", b"a")
        small_hub.add("datasets/karpathy/fineweb-edu-100b-shuffle/shard_01822.parquet", b"b")
        keys = set()
        for number, marked in enumerate(([], [f"hub.send_token=[{small_hub.url}]"])):
            monkeypatch.setenv("CHATMILL_STORE", str(tmp_path / str(number)))
            session = Session.open(["data=fineweb_edu", "data.train_shards=1", *marked])
            step = session.plan(online=True, targets=["download"]).steps["download"]
            keys.add(step.key)
            assert step.data_identity and step.data_identity["source"]["own_token"] == bool(marked)
            assert small_hub.tokens == ["Bearer hf_secret"] * 2 * number
        assert len(keys) == 1
    with pytest.raises(UserError, match=r"hub: 'example' is not a URL"):
        Session.open(["hub.send_token=[example]"])


def test_conversations_of_ones_own_are_read_whole_while_planning(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path / "store"))
    good = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]\n'
    (tmp_path / "own.jsonl").write_text(good)
    given = "mixture.identity.file='~/own.jsonl'"
    assert Session.open([given]).plan(online=False).steps["sft_data"].action == "run"
    (tmp_path / "own.jsonl").write_text(good * 1000 + '{"conversations": [{"from": "gpt", "value": "Hm"}]}\n')
    with pytest.raises(UserError, match=rf"midtrain_data\.params: {tmp_path}/own\.jsonl:1001: message 1 is by") as said:
        Session.open([given]).plan(online=False)
    assert str(said.value).isprintable()
    Session.open([given, "until=pretrain"]).plan(online=False)  # which does not read it
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder: is a directory\. Name a file in it"):
        Session.open(["mixture.identity.file='~/folder'"])
    with pytest.raises(UserError, match=r"absent\.jsonl: there is no such file"):
        Session.open(["mixture.identity.file='~/absent.jsonl'"]).plan(online=False)


def test_stages_that_need_each_other_are_an_error() -> None:
    stages = {n: {"run": "tests.toys.total", "inputs": {"x": m}} for n, m in (("a", "b"), ("b", "a"))}
    with pytest.raises(UserError, match="a -> b -> a"):
        dag.build(config.settings(composed_with(stages)))


def test_an_input_that_is_no_stage_is_an_error_with_the_nearest() -> None:
    stages = {"tokens": {"run": "tests.toys.source"}, "b": {"run": "tests.toys.total", "inputs": {"x": "token"}}}
    with pytest.raises(UserError, match=r"b\.inputs\.x.*Did you mean tokens"):
        dag.build(config.settings(composed_with(stages)))


def composed_with(stages: dict[str, Any]) -> dict[str, Any]:
    composed = config.compose([])
    return composed | {"pipeline": {"stages": list(stages)}} | stages


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.dpeth=3", "Did you mean model.depth"),
        ("+model.dpeth=3", r"model\.dpeth.*Did you mean .*model\.depth"),
        ("+sft.params.lr_fraq=3", r"sft\.params\.lr_fraq.*Did you mean sft\.params\.lr_frac"),
        ("+lauch.nproc=3", "lauch"),
        ("launch.nproc=three", "launch.nproc: is 'three'"),
        ("recipe=d21", "Did you mean recipe=d"),
        ("+data.trian_shards=3", r"data\.trian_shards.*Did you mean data\.train_shards"),
        ("sft.launch.nprocs=2", r"sft\.launch\.nprocs.*Did you mean sft\.launch\.nproc"),
        ("+stage@other=sft other.params.lr_fraq=1", "Did you mean other.params.lr_frac"),
        ("+stage@dpo=dpo", "no stage called 'dpo' in .*conf/stage. There are: "),
        ("mixture.sft=[{task:data.tasks.arithmetic.Arithmetic,split:tset}]", "no split 'tset'. Did you mean test"),
        ("model.arch=nowhere.Mine", "model.arch=nowhere.Mine: there is no module nowhere"),
        ("model.arch=model.gpt.GPTT", r"model/gpt\.py has no GPTT\. Did you mean GPT\?"),
        ("optim.name=torch.optim.RAdm", r"torch/optim/__init__\.py has no RAdm\. Did you mean RAdam\?"),
        ("pretrain.params.optim.init_lr_fraq=1", "Did you mean pretrain.params.optim.init_lr_frac"),
        ("midtrain.params.schedule.warmup_step=1", "Did you mean midtrain.params.schedule.warmup_steps"),
        ("pretrain.params.seed.x=1", r"pretrain\.params\.seed: is {'x': 1}, but a whole number is needed"),
        ("pretrain.params.optim.eps=1,2", "-m runs"),
        ("pretrian.params.optim.eps=1", "there is no setting pretrian. Did you mean pretrain"),
        ("~modle", "Did you mean model"),
        ("=3", "names no setting"),
        ("model=3", "no model called '3' in .*conf/model"),
        ("model.depth=[", r"model\.depth=\[: cannot be read"),
        ("model.depth=2,3", "-m runs"),
        ("hydra.run.dir=here", "hydra.run.dir=here: has no effect"),
        ("run.name=a/b", "run.name: is 'a/b'"),
    ],
)
def test_a_wrong_name_is_an_error_with_the_nearest_right_one(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        dag.build(config.settings(config.compose(override.split(" "))))


def test_a_class_that_is_there_is_not_imported_to_be_planned_with() -> None:
    overrides = ["optim=adamw", "optim.name=torch.optim.RAdam", "model.arch=model.gpt.GPT"]
    program = (
        "import sys; from pipeline.config import compose as config; from pipeline.plan import dag; "
        f"dag.build(config.settings(config.compose({overrides}))); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_settings_that_a_stage_has_without_its_yaml_naming_them_are_set_like_others() -> None:
    overrides = ["skip_spikes=4", "optim.init_lr_frac=0.5", "optim.args={foreach: false}", "model.depth=6"]
    stages = dag.build(config.settings(config.compose([f"pretrain.params.{o}" for o in overrides]))).stages
    params = stages["pretrain"].params
    assert (params.skip_spikes, params.optim.init_lr_frac, params.optim.args) == (4, 0.5, {"foreach": False})
    plain = dag.build(config.settings(config.compose([]))).stages["pretrain"].params
    assert params.model == dataclasses.replace(plain.model, depth=6)  # what else the group says is kept
    assert stages["sft"].params.optim.init_lr_frac == 1.0


def test_a_value_of_a_group_that_a_stage_follows_leaves_the_others_as_they_are() -> None:
    """Training one stage with a rate of its own must not give it the defaults of another optimiser."""
    given = ["optim=adamw", "pretrain.params.optim.matrix_lr=0.001", "optim.eps=1e-7", "mixture=hub"]
    composed = config.compose([*given, "evaluate_base.params.core.dataset=mine"])
    params = composed["pretrain"]["params"]
    assert params["optim"] == composed["optim"] | {"matrix_lr": 0.001}
    assert params["optim"]["betas"] == [0.9, 0.95] and params["optim"]["eps"] == 1e-7
    assert composed["sft"]["params"]["optim"] == composed["optim"]
    assert composed["evaluate_base"]["params"]["core"] == {"dataset": "mine", "max_per_task": 16}
    assert config.compose(["rl.params.schedule.warmup_steps=3"])["rl"]["params"]["schedule"]["warmdown_frac"] == 1.0


def test_every_stage_can_be_pinned_and_started_in_its_own_way() -> None:
    settings = config.settings(config.compose(["sft.pin=4f2a", "sft.launch.nproc=2"]))
    assert settings.stages["sft"].pin == "4f2a"
    stages = dag.build(settings).stages
    assert (stages["sft"].launch.nproc, stages["midtrain"].launch.nproc) == (2, 1)


def test_modules_of_ones_own_lie_where_the_command_is_given(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text("from data.tasks.task import Task\n\nclass Own(Task):\n    pass\n")
    command = [sys.executable, ROOT / "flows.py", "why", "sft_data", "mixture.sft=[{task: own_task.Own}]"]
    env = os.environ | {"CHATMILL_STORE": str(tmp_path / "store"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "code own_task" in done.stdout


def test_planning_and_stage_modules_import_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys, pkgutil, importlib, pipeline.stages, pipeline.commands.cli, contextlib, io; "
        "[importlib.import_module('pipeline.stages.' + m.name) for m in pkgutil.iter_modules(pipeline.stages.__path__)"
        " if m.name != '__main__']; contextlib.redirect_stdout(io.StringIO()).__enter__(); "
        "[pipeline.commands.cli.main(['plan', 'recipe=' + name]) for name in ('tiny', 'd20')]; "
        "sys.stdout = sys.__stdout__; "
        "print(sorted({'torch', 'numpy', 'pyarrow', 'prefect', 'gradio', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    env = os.environ | {"CHATMILL_STORE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "now"),
    [
        ("data.kind=x", "data.source"),
        ("overlap.params.ngram=8", "contamination_text or contamination_rows"),
        ("until=overlap", "contamination_text or contamination_rows"),
        ("overlap_rows.params.ngram=8", "contamination_rows"),
        ("until=overlap_text", "contamination_text"),
        ("num_iterations=5", "pretrain.params.steps"),
        ("device_batch_size=4", "launch.device_batch_size"),
    ],
)
def test_a_name_of_an_earlier_version_or_of_nanochat_answers_with_the_one_of_today(override: str, now: str) -> None:
    with pytest.raises(UserError, match=f"It is called {now} here"):
        Session.open([override]).plan(online=False)


def test_names_of_today_are_settings() -> None:
    composed = config.compose([])
    for now in renamed.NOW.values():
        for name in now.split(" or "):
            functools.reduce(dict.__getitem__, name.split("."), composed)


def test_no_file_repeats_a_default() -> None:
    """A setting is declared once: in a dataclass with its default, and in YAML only where it differs."""
    for path in (ROOT / "conf" / "stage").glob("*.yaml"):
        declared = yaml.safe_load(path.read_text())
        params = importlib.import_module(declared["run"]).Params if "run" in declared else Launch
        for param in dataclasses.fields(params):
            assert declared.get("params", {}).get(param.name, "default") != param.default, f"{path}: {param.name}"


def test_all_that_can_be_set_is_in_the_composed_settings() -> None:
    composed = config.compose([])
    assert set(composed["launch"]) == {f.name for f in dataclasses.fields(Launch)}
    for name in composed["pipeline"]["stages"]:
        params = importlib.import_module(composed[name]["run"]).Params
        assert set(composed[name]["params"]) >= {f.name for f in dataclasses.fields(params)}


def test_keys_of_stages_leave_out_what_only_runs_them(tmp_path: Path) -> None:
    parts = code_of("pipeline.stages.download", {"source": "data.sources.pydocs"}).parts
    assert "data.sources.pydocs" in parts
    assert "data.sources.hub" not in parts, "a source that is not named does not count"
    assert not any(name.startswith("pipeline.") and not name.startswith("pipeline.stages") for name in parts)


def test_a_file_that_is_not_there_is_named_with_its_setting(tmp_path: Path) -> None:
    settings = config.settings(config.compose(["mixture.identity.file=/nowhere.jsonl"]))
    with pytest.raises(UserError, match=r"sft_data\.params\.mixture.*file.*/nowhere\.jsonl"):
        make_plan(dag.build(settings), Store(tmp_path), online=True, until="sft_data")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recipe=d26", "data.train_shards=240"], r"pretrain\.params: 21,6.* tokens .* set data\.train_shards=41\d"),
        (["recipe=d20", "pack.params.method=bestfit"], r"set data\.train_shards=33\d"),
        (
            ["pretrain.params.total_batch_tokens=1000"],
            r"total_batch_tokens=1000 is not a multiple of model\.sequence_len",
        ),
        (["pack.params.sequence_len=128"], r"pack\.params\.sequence_len=128; set both"),
        (["model.width=100"], r"model\.width 100 is not a multiple of model\.head_dim"),
        (["tokenizer.params.vocab_size=200"], r"vocab_size.* 200 is too small"),
        (["sft.params.total_batch_tokens=1000"], r"sft\.params: total_batch_tokens=1000 is not a multiple of the 256"),
        (["pretrain.params.total_batch_tokens=0"], r"total_batch_tokens: is 0, but a whole number from 1 on is needed"),
        (["pretrain.params.max_epochs=0"], r"max_epochs: is 0, but a number above 0 is needed"),
        (["rl.params.dtype=float64"], r"rl\.params\.dtype: is 'float64'.*bfloat16"),
        (["mixture.sft=[]"], r"sft_data\.params: needs a mixture"),
        (["mixture.rl=[{task: data.tasks.gsm9k.GSM9K}]"], r"rl\.params\.tasks\[0\]: task 'data\.tasks\.gsm9k"),
        (["optim.name=adamz"], r"optim\.name 'adamz' is not muon"),
        (
            ["optim.name=torch.optim.RAdam"],
            r"at the rates of muon .*\. Set optim=adamw optim\.name=torch\.optim\.RAdam$",
        ),
        (["optim=muon_modern", "optim.name=adamw"], r"at the rates of muon .*\. Set optim=adamw$"),
        (["optim=sgd", "optim.name=muon"], r"at the rates of sgd .*\. Set optim=muon$"),
        (["sft.params.optim.name=lion"], r"sft\.params\.optim: optim\.name 'lion' .*\. Set optim=lion$"),
        (["model.arch=bsae"], r"model\.arch 'bsae' is not base"),
        (["model.head_dim=0"], r"model\.head_dim is 0; it must be at least 1"),
        (["launch.nproc=0"], r"launch\.nproc: is 0, but a whole number from 1 on is needed"),
        (["launch.retries=-1"], r"launch\.retries: is -1"),
        (["launch.resume=newest"], r"launch\.resume: is 'newest', but latest \| never or a whole number"),
        (["sft.launch.slots=0"], r"sft\.launch\.slots: is 0"),
        (["data.train_shards=0"], r"data\.train_shards: is 0"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dag.build(config.settings(config.compose(overrides)))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["launch.nproc=3"], r"^pretrain: launch\.nproc=3 .* the 32 rows of a step .*; use 2 or 4$"),
        (
            ["pretrain.launch.device_batch_size=5"],
            r"^pretrain: launch\.device_batch_size=5 .*; use one of 1, 2, 4, ",
        ),
        (["midtrain.launch.nproc=3"], r"^midtrain: launch\.nproc=3 .*; use 2 or 4$"),
        (["sft.launch.nproc=2", "sft.launch.device_batch_size=6"], r"^sft: launch\.device_batch_size=6 .* the 16 rows"),
        (["rl.launch.nproc=20"], r"^rl: launch\.nproc=20 .* the 16 problems of a step .*; use at most 16$"),
    ],
)
def test_processes_and_rows_that_do_not_divide_are_refused_by_the_plan(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        Session.open([*overrides, f"store.root={tmp_path}"]).plan(online=False)
    assert "\n" not in str(raised.value)


def test_batches_of_tuning_are_measured_against_its_own_rows_and_not_those_of_stages_before(tmp_path: Path) -> None:
    own = ["midtrain_data.params.sequence_len=192", "midtrain.params.total_batch_tokens=7680"]
    session = Session.open([*own, "sft.params.total_batch_tokens=4096", f"store.root={tmp_path}"])
    assert session.plan(online=False).steps["sft"].action == "run"


def test_rows_that_a_stage_of_the_users_own_makes_can_be_planned_with() -> None:
    composed = config.compose(["launch=gpu1"])
    composed["pipeline"]["stages"].append("mine")
    composed |= {"mine": {"run": "tests.toys.source"}, "sft": composed["sft"] | {"inputs": {"rows": "mine"}}}
    found = dag.build(config.settings(composed))
    sft = found.stages["sft"]
    dag.check_launch(sft, found)
    assert sft.module.estimate(sft.params, sft.launch, found.upstream(sft)) is None


def test_a_tokenizer_of_the_users_own_leaves_the_horizon_to_the_run() -> None:
    composed = config.compose(["launch=gpu1"])
    composed["pipeline"]["stages"].append("mine")
    inputs = composed["pretrain"]["inputs"] | {"tokenizer": "mine"}
    composed |= {"mine": {"run": "tests.toys.source"}, "pretrain": composed["pretrain"] | {"inputs": inputs}}
    found = dag.build(config.settings(composed))
    pretrain = found.stages["pretrain"]
    assert pretrain.module.estimate(pretrain.params, pretrain.launch, found.upstream(pretrain)) is None


def test_a_module_with_params_and_main_alone_is_a_stage() -> None:
    module = load("tests.toys.source", "mine")
    assert module.main is source.main and not module.RANKS and module.data_identity is None
    module.check(source.Params(), {})
    assert module.estimate(source.Params(), Launch(), {}) is None


def test_what_was_accepted_is_kept_when_it_is_made_again_by_other_code(tmp_path, monkeypatch) -> None:
    found, store = make_dag(DIAMOND), Store(tmp_path)
    old = publish_all(found, store)
    with monkeypatch.context() as changed:
        other = Code("other", {"tests.toys.source": {"main": "other"}})
        changed.setattr(pipeline.plan.plan, "code_of", lambda module, params=None: other)
        wanted = make_plan(found, store, online=True).steps["a"].wanted
        assert wanted and wanted != old["a"]
        store.memory.accept("tests.toys.source", wanted, old["a"], "same")
        assert make_plan(found, store, online=True).steps["a"].key == old["a"]
        forced = make_plan(found, store, online=True, force=["a"]).steps["a"]
        assert (forced.key, forced.action) == (wanted, "run")
        publish_all(found, store)  # reads the accepted one
        shutil.copytree(store.folder("source", old["a"]), store.folder("source", wanted))
        assert make_plan(found, store, online=True).steps["a"].key == wanted
    assert {name: step.key for name, step in make_plan(found, store, online=True).steps.items()} == old


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"until": "a", "force": ["d"]}, "force: this run does not make d"),
        ({"only": ["d"], "force": ["b"]}, "force: this run does not make b"),
        ({"until": "d", "only": ["b"]}, "until, only: cannot be combined"),
    ],
)
def test_settings_that_contradict_each_other_are_not_passed_over(tmp_path, chosen, said) -> None:
    with pytest.raises(UserError, match=said):
        make_plan(make_dag(DIAMOND), Store(tmp_path), online=True, **chosen)


def test_a_pinned_artifact_that_is_damaged_or_forced_is_a_mistake_of_the_users(tmp_path: Path) -> None:
    found, store = make_dag(DIAMOND), Store(tmp_path)
    key = publish_all(found, store)["b"]
    found.stages["b"] = dataclasses.replace(found.stages["b"], pin=key)
    with pytest.raises(UserError, match="force: b is pinned"):
        make_plan(found, store, online=True, force=["b"])
    record = json.loads((store.folder("total", key) / RECORD).read_text())
    record["files"] = {"numbers.txt": {"bytes": 1, "sha256": "0" * 64}}
    (store.folder("total", key) / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"b\.pin={key}: is damaged: .*numbers\.txt is missing"):
        make_plan(found, store, online=True)


def test_how_a_stage_that_does_not_run_would_be_started_matters_to_nobody(tmp_path: Path) -> None:
    session = Session.open(["pretrain.launch.nproc=3", "until=tokenizer", f"store.root={tmp_path}"])
    assert {step.name for step in session.plan(online=False).running()} == {"tokenizer_text", "tokenizer"}


def test_a_plan_that_cannot_be_started_is_a_mistake_of_the_users(chatmill) -> None:
    said = chatmill.run("plan", "launch.nproc=3", code=2)
    assert "launch.nproc=3" in said and "use 2 or 4" in said


@pytest.mark.parametrize("launch", ["cpu", "gpu1", "node8"])
@pytest.mark.parametrize("recipe", ["tiny", "d12", "d20", "d26", "d32"])
def test_every_recipe_can_be_started_on_every_kind_of_machine(recipe: str, launch: str) -> None:
    found = dag.build(config.settings(config.compose([f"recipe={recipe}", f"launch={launch}"])))
    for stage in found.stages.values():
        dag.check_launch(stage, found)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("store.root=", r"store\.root: is '', which is not a directory"),
        ("store.root=/dev/null", r"store\.root: is '/dev/null', which is not a directory"),
        ("force=[sfft]", r"force: there is no stage 'sfft'\. Did you mean sft"),
        ("sft.run=", r"sft\.run: is '', which is not a module"),
        ("pipeline.stages=sft", r"pipeline\.stages: is 'sft', but a list is needed"),
        ("pipeline=null", r"pipeline: is empty, but a group of settings is needed"),
        ("data.source=data.sources.hubb", r"data\.source=data\.sources\.hubb: No module"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said_with_its_setting(
    override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path))
    with pytest.raises(Exception, match=said) as raised:
        Session.open([override]).plan(online=False)
    assert raised.value.cause == "config"  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", ["tiny", "d12", "d20", "d26", "d32"])
def test_every_recipe_has_the_text_it_needs(recipe: str) -> None:
    for data in ([], ["data=climbmix"]) if recipe != "tiny" else ([],):
        dag.build(config.settings(config.compose([f"recipe={recipe}", *data])))


def test_a_stage_that_is_added_is_part_of_the_run(tmp_path: Path) -> None:
    session = Session.open(["+stage@dpo=sft", "dpo.inputs.model=sft", f"store.root={tmp_path}"])
    assert session.dag.stages["dpo"].inputs["model"] == "sft" and "dpo" in session.dag.targets()
    assert session.plan(online=False).steps["dpo"].action == "run"


def test_training_on_gpus_is_estimated_before_it_ever_ran(tmp_path: Path) -> None:
    """About three hours for d20 on eight H100, as others measured."""
    store = f"store.root={tmp_path}"

    def planned(*overrides: str) -> dict[str, Step]:
        return Session.open([store, "recipe=d20", *overrides]).plan(online=False).steps

    node, alone, cpu = planned("launch=node8"), planned("launch=gpu1"), planned("launch=cpu")
    assert node["pretrain"].seconds == pytest.approx(3 * 3600, rel=0.1)
    assert node["pretrain"].usd == pytest.approx(72, rel=0.1)
    assert node["midtrain"].seconds == pytest.approx(8 * 60, rel=0.2)  # 450 M tokens
    assert alone["midtrain"].seconds == pytest.approx(8 * node["midtrain"].seconds)
    assert 0 < node["sft"].seconds < 60
    assert planned("launch=node8", "midtrain.params.steps=10")["midtrain"].seconds < 60
    assert node["rl"].seconds is None  # sampling is no matter of FLOPs
    assert cpu["pretrain"].seconds is cpu["midtrain"].seconds is None
