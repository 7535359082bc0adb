"""What still runs after a stage has failed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts.store import Store
from pipeline.plan.plan import Plan, after, make_plan, wanted_by_name
from tests.pipeline.test_plan import make_dag, publish_all

HOUSE = {
    "text": [],
    "rows": [],
    "problems": [],
    "base": ["text"],
    "score_base": ["base"],
    "chat": ["base", "rows"],
    "score_chat": ["chat"],
    "rl": ["chat", "problems"],
    "report": ["score_base", "score_chat", "rl"],
}


def planned(tmp_path: Path, targets: list[str] | None = None) -> Plan:
    return make_plan(make_dag(HOUSE), Store(tmp_path), online=True, targets=targets)


def test_what_only_feeds_lost_stages_does_not_start(tmp_path: Path) -> None:
    found = after(planned(tmp_path), {"rows"}, {"rows", "text", "base"}, {"report"})
    assert found.lost == ["chat", "score_chat", "rl", "report"]
    assert found.unneeded == ["problems", "score_base"]
    assert found.left == []


def test_targets_and_what_they_need_still_run_with_the_reason(tmp_path: Path) -> None:
    plan = planned(tmp_path, ["score_base", "score_chat", "report"])
    wanted = wanted_by_name(plan, [])
    found = after(plan, {"rows"}, {"rows", "text"}, wanted)
    assert (found.left, found.unneeded) == (["base", "score_base"], ["problems"])
    assert found.describe(["text"], wanted) == (
        "Cannot be made without it: chat, score_chat, rl, report. Not started, because only those need them: problems. "
        "The run continues with: text (running), base (needed by one asked for), score_base (asked for)."
    )


def test_forced_stages_are_made_for_their_own_sake(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert after(plan, {"rows"}, {"rows"}, wanted_by_name(plan, ["problems"])).left == ["problems"]


def test_a_failure_that_concerns_nobody_else_is_not_explained(tmp_path: Path) -> None:
    plan = planned(tmp_path, ["score_base", "score_chat"])
    found = after(plan, {"score_chat"}, set(HOUSE) - {"score_base"}, wanted_by_name(plan, []))
    assert found.left == ["score_base"] and found.describe([], {"score_base"}) == ""


def test_what_is_made_already_starts_nothing_and_loses_nothing(tmp_path: Path) -> None:
    publish_all(make_dag(HOUSE), Store(tmp_path))
    plan = make_plan(make_dag(HOUSE), Store(tmp_path), online=True, force=["rows", "chat"], targets=["chat"])
    assert after(plan, {"rows"}, {"rows"}, wanted_by_name(plan, ["rows", "chat"])).lost == ["chat"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return planned(tmp_path_factory.mktemp("store"), ["score_base", "report"])


@given(st.sets(st.sampled_from(list(HOUSE)), min_size=1), st.sets(st.sampled_from(list(HOUSE))))
def test_every_waiting_stage_is_in_one_list_and_what_runs_has_its_inputs(whole: Plan, failed: set, others: set) -> None:
    wanted = wanted_by_name(whole, [])
    found = after(whole, failed, failed | others, wanted)
    assert sorted([*found.lost, *found.unneeded, *found.left]) == sorted(set(HOUSE) - failed - others)
    assert all(source not in {*failed, *found.lost, *found.unneeded} for name in found.left for source in HOUSE[name])
    assert all(name not in wanted for name in found.unneeded)
