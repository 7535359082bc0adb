"""Settings as their users see them: with origin and meaning, from files of their own, swept and completed."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.config import OptimConfig
from pipeline.commands import sweep
from pipeline.commands.cli import main
from pipeline.config import compose as config
from pipeline.config.show import commented, comments
from pipeline.job import Launch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path / "store"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The folder that the README describes, with its recipe."""
    found = re.search(r"    # my_conf/(recipe/mine\.yaml)\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    path = tmp_path / "my_conf" / found[1]
    path.parent.mkdir(parents=True)
    path.write_text(textwrap.dedent(found[2]))
    return path.parents[1]


def test_plan_config_prints_every_setting_with_its_origin_and_meaning() -> None:
    given = ["recipe=d20", "optim=adamw", "pretrain.params.optim.matrix_lr=0.001", "sft.launch.nproc=2"]
    composed = config.compose(given)
    text = commented(composed, given)
    assert yaml.safe_load(text) == composed
    lines = [line.strip() for line in text.splitlines()]
    assert "depth: 20 # [conf/recipe/d20.yaml] layers" in lines
    assert "max_chars: 2000000000 # [default] of text to train on, the same of each shard" in lines
    assert "nproc: 2 # [command line] processes under torchrun, for stages with ranks" in lines
    assert sum(line.startswith("matrix_lr: 0.001 # [command line]") for line in lines) == 1
    assert sum(line.startswith("matrix_lr: 0.0006 # [as optim.matrix_lr]") for line in lines) == 3
    assert "core: null # [conf/stage/evaluate_mid.yaml] null: no CORE" in lines


def test_the_meaning_of_a_setting_is_the_comment_behind_it_or_above_it() -> None:
    assert comments(Launch)["slots"] == "stages that may run side by side"
    assert comments(OptimConfig)["rates_for"] == "the optimiser that these rates suit; null: any"
    assert comments(OptimConfig)["coefficients"].startswith("classic: ")
    assert "embedding_lr" not in comments(OptimConfig)


def test_cfg_job_prints_the_settings_plain_and_info_their_files(capsys: Any) -> None:
    assert main(["--cfg", "job", "recipe=d20", "launch=cpu"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == config.compose(["recipe=d20", "launch=cpu"])
    assert main(["--info", "defaults", "recipe=d20"]) == 0
    assert "recipe/d20" in capsys.readouterr().out


def test_a_recipe_of_ones_own_is_found_in_ones_own_folder(own: Path, capsys: Any) -> None:
    assert main(["plan", "--config-dir", str(own), "recipe=mine"]) == 0
    composed = config.compose([f"hydra.searchpath=[{own}]", "recipe=mine", "optim.weight_decay=0.3"])
    assert composed["model"]["depth"] == 14 and composed["mixture"] == config.compose(["recipe=d12"])["mixture"]
    assert composed["sft"]["params"]["optim"] == composed["optim"] | {"matrix_lr": 0.01}
    assert main(["plan", "--config-dir", str(own), "recipe=mien"]) == 2
    assert "Did you mean recipe=mine" in capsys.readouterr().err
    assert main(["plan", "--config-dir", str(own / "nowhere"), "recipe=mine"]) == 2
    assert "nowhere' is not a directory" in capsys.readouterr().err


def test_a_recipe_of_ones_own_can_add_a_stage_whose_params_can_all_be_set(own: Path) -> None:
    (own / "stage").mkdir()
    (own / "stage" / "count.yaml").write_text("run: tests.toys.source\nparams: { n: 3 }\n")
    (own / "recipe" / "more.yaml").write_text(
        "# @package _global_\ndefaults: [tiny, /stage@count: count, _self_]\nrecipe: more\n"
    )
    composed = config.compose([f"hydra.searchpath=[{own}]", "recipe=more", "count.params.gate=x"])
    assert "count" in composed["pipeline"]["stages"]
    assert composed["count"]["params"].items() >= {"n": 3, "gate": "x"}.items()


def test_sweeps_take_settings_that_no_file_names_and_hydras_own_way_to_name_them(
    own: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("pipeline.commands.cli.main", lambda arguments: seen.append(arguments) or 0)
    params = "+hydra.sweeper.params={rl.params.kl: '0.1,0.2'}"
    folder = f"hydra.searchpath=[{own}]"
    given = ["sft.params.seed=1,2", "recipe=mine", params, folder, f"store.root={tmp_path}"]
    assert sweep.sweep(given) == 0
    assert [call[:2] for call in seen] == [["run", folder]] * 4
    swept = {tuple(word for word in call if word.startswith(("sft", "rl"))) for call in seen}
    assert swept == {(f"sft.params.seed={s}", f"rl.params.kl={k}") for s in (1, 2) for k in (0.1, 0.2)}


@pytest.mark.parametrize("override", ["hydra.sweeper.params={sft.params.seed: '1,2'}", "hydra.sweep.dir=x"])
def test_settings_of_sweeps_are_refused_without_a_sweep(override: str, capsys: Any) -> None:
    assert main(["plan", override]) == 2
    assert capsys.readouterr().err == f"{override}: has no effect. It is for -m.\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("python flows.py pl", ["plan "]),
        ("python flows.py plan rec", ["recipe="]),
        ("python flows.py plan recipe=d2", ["d20", "d26"]),
        ("python flows.py plan sft.params.skip", ["sft.params.skip_spikes="]),
        ("python flows.py sft.", ["sft.inputs.", "sft.launch=", "sft.params.", "sft.pin=", "sft.run="]),
    ],
)
def test_bash_completes_commands_groups_and_settings(typed: str, offered: list[str]) -> None:
    words = typed.replace("=", " = ").split()
    program = f"""
        python() {{ {shlex.quote(sys.executable)} "$@"; }}
        eval "$(python flows.py completion)"
        COMP_WORDS=({" ".join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}
        COMP_LINE={shlex.quote(typed)} COMP_POINT={len(typed)}
        _chatmill
        printf '%s\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == offered
