"""No program passes a check without being right. The list is in attacks.txt."""

import pytest
from attacks import ATTACKS, CHECK, ENDLESS, MARK, RIGHT, SHARED

from data.tasks.task import Check
from evals.sandbox.box import Limits, Sandbox

ADDS = Check(CHECK, "add")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    box = Sandbox(Limits(wall_seconds=4.0, cpu_seconds=1, memory_bytes=256 << 20))
    if box.weakness:
        pytest.skip(f"no sandbox on this machine: {box.weakness}")
    return box


def test_a_right_answer_passes_the_check_that_attacks_are_judged_by(sandbox):
    assert sandbox(RIGHT, ADDS).passed


def test_the_search_of_memory_finds_what_is_there(sandbox):
    assert "found" in sandbox(SHARED["search"] + "kept = '5550' + str(157)\nprint(search())").output


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_does_not_pass(sandbox, name):
    result = sandbox(ATTACKS[name], ADDS)

    allowed = ["timeout"] if name in ENDLESS else ["failed", "timeout", "memory", "killed"]
    assert result.status in allowed and not result.advisory
    assert "found" not in result.output and MARK not in result.output
