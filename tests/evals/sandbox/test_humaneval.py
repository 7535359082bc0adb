"""HumanEval in the sandbox gives the verdicts that running code and tests as one program gives."""

import pytest

from data.tasks.humaneval import HumanEval
from evals.sandbox.box import Sandbox


@pytest.mark.parametrize("items", [pytest.param(8, id="some"), pytest.param(164, marks=pytest.mark.full, id="all")])
def test_reference_solutions_pass_and_changed_ones_do_not(shared_hub, items):
    task = HumanEval("test", items, shared_hub / "datasets" / "openai" / "openai_humaneval")
    sandbox = Sandbox(mode="weak")

    for i in range(len(task)):
        row = task.rows[i]
        name, right = row["entry_point"], row["prompt"] + row["canonical_solution"]
        other = f"\n\ndef answer(*given, right={name}):\n    return None if right(*given) else [1]\n"
        assert task.grade(i, right, sandbox) == 1.0, i
        for wrong in ("", "    return None\n", "    raise ValueError\n", f"{right}{other}\n{name} = answer\n"):
            assert task.grade(i, wrong, sandbox) == 0.0, (i, wrong)
