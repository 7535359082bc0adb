"""Values as people type them: taken as they are meant, or refused with the very words to type."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.cli import main
from pipeline.commands.parser import Parser
from pipeline.config import compose as config
from pipeline.config.quoting import quote, quoted, texts_in
from pipeline.config.settings import Settings
from pipeline.errors import UserError
from pipeline.plan.session import store_root

TEXTS = dict(texts_in(Settings))


def read(override: str) -> Any:
    """The value that Hydra reads."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(quoted(override, TEXTS)).value()


@pytest.mark.parametrize(
    "value",
    ["[x]", "L'Oréal", "2024", "007", "1e5", "true", "my run", "a=b", "a: b", "(draft)", "50%", "#1", "naïve", "日本",
     "~", "~/x", "C:\\new\\", "it's {ok}", 'say "hi"', "-1", "a;b", "a&b", "x!", "<x>", "Müller's", "[", "]", "{", "'"],
)  # fmt: skip
def test_text_is_taken_as_it_is_typed(value: str) -> None:
    assert read(f"run.name={value}") == value


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("[Müller's notes/]", ["Müller's notes/"]),
        ("[~/texts,/data/ü (1)/a.jsonl]", ["~/texts", "/data/ü (1)/a.jsonl"]),
        ("[2024, 007]", ["2024", "007"]),
        ("['a, b',L'Oréal]", ["a, b", "L'Oréal"]),
        ("[it's, that's]", ["it's", "that's"]),
        ("[a#1,b=2,c&d]", ["a#1", "b=2", "c&d"]),
        ("[]", []),
        ("[my/folder,more.jsonl]", ["my/folder", "more.jsonl"]),
    ],
)
def test_lists_of_text_are_taken_item_by_item(value: str, items: list[str]) -> None:
    assert [str(item) for item in read(f"data.paths={value}")] == items


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        ("[{task: a.B, file: ~/x.jsonl}]", [{"task": "a.B", "file": "~/x.jsonl"}]),
        (
            "[{task: a.B, args: {name: L'Oréal, size: 3}}, ü]",
            [{"task": "a.B", "args": {"name": "L'Oréal", "size": 3}}, "ü"],
        ),
        ("[{name: 'a, b', file: ~/x}]", [{"name": "a, b", "file": "~/x"}]),
        ("[[~/a,~/b],[1,2]]", [["~/a", "~/b"], [1, 2]]),
    ],
)
def test_paths_and_names_inside_groups_of_a_list_are_taken_too(value: str, read_as: list[Any]) -> None:
    assert read(f"mixture.sft={value}") == read_as


def test_a_single_path_is_answered_with_the_list_to_type() -> None:
    with pytest.raises(UserError, match=r"'data\.paths=\[~/texts\]'"):
        config.settings(config.compose(["data.paths=~/texts"]))


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_comes_through_quotes(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(f"run.name={quote(text)}").value() == text


@pytest.mark.parametrize(
    "override",
    ["run.name=null", "run.name='a b'", "run.name=a,b", "model.depth=4", "data.paths=[a,b]", "sft.params.lr_frac=1,2",
     "mixture.sft=[{task: x, size: 3}]", "~model", "+x={a: 1}", "optim.betas=[0.9,0.95]", "store.root=${oc.env:HOME}",
     "recipe=tiny", "run.name=", "only=[sft,rl]", "model.depth=[", "optim.args={foreach: fal"],
)  # fmt: skip
def test_what_hydra_reads_as_it_is_meant_is_left_alone(override: str) -> None:
    assert quoted(override, TEXTS) == override


def test_keys_of_digits_can_be_pinned() -> None:
    composed = config.compose(["sft.pin=1234567890123456", "rl.pin=12e4567890123456", "sft.params.init=12@3"])
    assert composed["sft"]["pin"] == "1234567890123456" and composed["rl"]["pin"] == "12e4567890123456"
    assert composed["sft"]["params"]["init"] == "12@3"


def test_names_and_paths_reach_the_settings_as_they_were_typed() -> None:
    given = ["run.name=[x]", "data.paths=[Müller's notes/]", "mixture.identity.name=L'Oréal", "store.root=~/big disk"]
    built = config.settings(config.compose(given))
    assert built.run.name == "[x]" and built.data.paths == ["Müller's notes/"]
    assert built.mixture.identity.name == "L'Oréal"
    assert store_root(built.store.root) == Path("~/big disk").expanduser()


@pytest.mark.parametrize("override", ["run.name=a, b", "run.name=x,y", "data.paths=[a"])
def test_what_cannot_be_read_is_refused_with_what_to_type(override: str) -> None:
    with pytest.raises(UserError, match="As one text: ") as raised:
        config.compose([override])
    advised = shlex.split(re.split("As one text: ", str(raised.value))[1])
    assert advised[0].partition("=")[0] == override.partition("=")[0]
    value = override.partition("=")[2]
    assert read(advised[0]) == value


def test_numbers_in_letters_are_named_with_their_setting() -> None:
    with pytest.raises(UserError, match=r"launch\.nproc: is 'zwölf', but a whole number"):
        config.settings(config.compose(["launch.nproc=zwölf"]))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The verbs that a command line comes down to, with what is left for them."""
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("pipeline.commands.cli.carry_out", lambda verb, rest: found.append((verb, rest)) or 0)
    return found


@pytest.mark.parametrize(
    ("typed", "verb", "rest"),
    [
        (["store.root=X", "plan"], "plan", ["store.root=X"]),
        (["recipe=d20", "launch=node8", "why", "sft"], "why", ["recipe=d20", "launch=node8", "sft"]),
        (["plan", "recipe=d20"], "plan", ["recipe=d20"]),
        (["recipe=d20"], "run", ["recipe=d20"]),
        (["recipe=d20", "-m"], "run", ["recipe=d20", "-m"]),
        (["~model.x", "plan"], "run", ["~model.x", "plan"]),
        ([], "run", []),
    ],
)
def test_settings_may_come_before_the_verb(asked: Any, typed: list[str], verb: str, rest: list[str]) -> None:
    assert main(typed) == 0
    assert asked == [(verb, rest)]


def test_a_flag_takes_a_text_that_begins_with_a_dash() -> None:
    parser = Parser("chat")
    parser.add_argument("--prompt")
    parser.add_argument("--cli", action="store_true")
    flags, rest = parser.parse_known_args(["--cli", "--prompt", "-5+3?", "sft"])
    assert (flags.prompt, flags.cli, rest) == ("-5+3?", True, ["sft"])
    with pytest.raises(UserError, match="expected one argument"):
        parser.parse_known_args(["--prompt", "--cli"])
