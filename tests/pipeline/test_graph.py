"""`graph`: the stages of a configuration in the terminal and as a flowchart, which is also the picture in README."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.text import Text

from pipeline.artifacts.store import Store
from pipeline.commands.cli import main
from pipeline.commands.graph import edges, mermaid, tree
from pipeline.config import compose as config
from pipeline.errors import StageFailed
from pipeline.plan import dag
from pipeline.plan.dag import Dag
from pipeline.printing import PlainConsole
from tests.pipeline.small_store import ROOT
from tests.pipeline.test_small_files import carry_out, declare


def recipe(name: str) -> Dag:
    return dag.build(config.settings(config.compose([f"recipe={name}"])))


def printed(found: Dag, states: dict[str, Text], width: int) -> list[str]:
    console = PlainConsole(width=width, record=True)
    with console.capture() as captured:
        for root in tree(found, states):
            console.print(root)
    return captured.get().splitlines()


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "80")

    def draw(*arguments: str) -> str:
        assert main(["graph", *arguments]) == 0
        return capsys.readouterr().out

    return draw


@pytest.mark.parametrize("name", ["tiny", "d20"])
def test_each_stage_stands_once_with_all_that_it_reads_within_80_columns(name: str) -> None:
    found = recipe(name)
    lines = printed(found, {}, width=80)

    assert max(map(len, lines)) <= 80
    text = " ".join(re.sub(r"[│├└─]", " ", line) for line in lines).split()
    named = [word for i, word in enumerate(text) if not word.endswith(",") and text[i - 1] != "+"]
    for stage, sources in edges(found).items():
        assert stage in named
        assert all(source in " ".join(text) for source in sources)
    beside = sum(max(0, len(sources) - 1) for sources in edges(found).values())
    assert len([word for word in text if word != "+"]) == len(found.stages) + beside


def test_an_edge_is_left_out_only_where_another_input_leads_there_too() -> None:
    found = recipe("tiny")

    for stage, sources in edges(found).items():
        assert found.behind(list(sources)) == found.behind([stage]) - {stage}


def test_readmes_picture_is_what_the_command_prints(drawn) -> None:
    readme = (ROOT / "README.md").read_text()

    assert f"```mermaid\n{drawn('--mermaid', 'recipe=tiny')}```" in readme


def test_overrides_choose_the_stages(drawn) -> None:
    assert "dataset/gsm8k" in drawn("recipe=d20") and "dataset/gsm8k" not in drawn("recipe=tiny")
    assert drawn("pipeline.stages=[a]", declare("a", n=4)) == "a\n"
    assert drawn("until=tokenizer") == "tokenizer_text\n└── tokenizer\n"


def test_without_a_store_no_state_is_shown(drawn) -> None:
    assert "will run" not in drawn()


def test_names_of_any_kind_are_nodes() -> None:
    flowchart = mermaid(recipe("tiny"))

    assert 'dataset_python_words["dataset/python_words"]' in flowchart
    assert re.search(r"^    dataset_python_words --> .*\bmidtrain_data\b", flowchart, re.MULTILINE)


def test_with_a_store_each_stage_has_its_state_and_time(drawn, tmp_path: Path) -> None:
    toys = ["store.min_free_gb=0", "pipeline.stages=[a,b,c]", declare("a", n=4), declare("b", n=4, fail_at=2)]
    toys.append("+c={run: tests.toys.total, inputs: {a: a, b: b}, params: {scale: 1.0}}")
    carry_out([*toys, "until=a"])
    with pytest.raises(StageFailed):
        carry_out([*toys, "until=b"])

    (made,) = Store(tmp_path / "store").all()
    assert re.fullmatch(r"b  cached, \d+\.\d s\n", drawn(*toys, f"b.pin={made.key}", "until=b")), "inputs are not shown"
    states = dict(line.split("  ", 1) for line in re.sub(r"[├└]── ", "", drawn(*toys)).splitlines())
    assert re.match(r"cached, \d+\.\d s", states["a"])
    assert states["b"].startswith("failed, will run again")
    assert states["c"].startswith("will run")


def test_a_pinned_stage_is_drawn_without_what_it_was_made_of() -> None:
    found = recipe("tiny")
    pinned = Dag(found.stages | {"sft": replace(found.stages["sft"], pin="4f2a")})
    shown = Dag({name: pinned.stages[name] for name in found.stages if name in pinned.behind(["sft"])})

    assert edges(shown) == {"sft": []} and printed(shown, {}, width=80) == ["sft"]
