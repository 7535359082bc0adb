"""A key changes with what makes the artifact, and with nothing else."""

import ast
import dataclasses
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.plan import code, keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's own on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    return tmp_path


def write(folder: Path, module: str, text: str) -> None:
    path = folder / (module.replace(".", "/") + ".py")
    path.write_text(textwrap.dedent(text))
    code.forget()


def code_digest(module: str, params: object = None) -> str:
    return code.code_of(module, params).digest


STAGE = """
    '''What it does.'''
    from mine import helper

    def main(job):
        # a comment
        return helper.twice(job)
"""


def test_comments_docstrings_and_layout_do_not_count(project: Path) -> None:
    write(project, "mine.helper", "def twice(x):\n    return 2 * x\n")
    write(project, "mine.stage", STAGE)
    before = code_digest("mine.stage")
    write(
        project,
        "mine.helper",
        '"""New words."""\n\n\ndef twice(x):\n    """More words."""\n    return (2\n        * x)\n',
    )
    write(project, "mine.stage", STAGE.replace("# a comment", "# another").replace("What it does", "It does this"))
    assert code_digest("mine.stage") == before


def test_a_changed_line_in_an_imported_module_counts_and_is_named(project: Path) -> None:
    write(project, "mine.helper", "def twice(x):\n    return 2 * x\n\ndef other(x):\n    return x\n")
    write(project, "mine.stage", STAGE)
    before = code.code_of("mine.stage").parts
    write(project, "mine.helper", "def twice(x):\n    return x + x\n\ndef other(x):\n    return x\n")
    assert keys.code_changes(before, code.code_of("mine.stage").parts) == ["mine.helper (twice)"]


def test_imports_inside_functions_count_and_those_for_types_do_not(project: Path) -> None:
    write(project, "mine.lazy", "A = 1\n")
    write(project, "mine.hints", "B = 1\n")
    text = """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from mine.hints import B

        def main(job):
            from .lazy import A
            return A
    """
    write(project, "mine.stage", text)
    before = code_digest("mine.stage")
    write(project, "mine.hints", "B = 2\n")
    assert code_digest("mine.stage") == before
    write(project, "mine.lazy", "A = 2\n")
    assert code_digest("mine.stage") != before


def test_a_neutral_module_does_not_count_nor_what_only_it_imports(project: Path) -> None:
    write(project, "mine.deep", "A = 1\n")
    write(project, "mine.watch", 'RESULT_NEUTRAL = "only watches"\nfrom mine import deep\n')
    write(project, "mine.stage", "from mine import watch\n\ndef main(job):\n    return watch\n")
    before = code_digest("mine.stage")
    write(project, "mine.deep", "A = 2\n")
    write(project, "mine.watch", 'RESULT_NEUTRAL = "only watches"\nfrom mine import deep\nprint(1)\n')
    assert code_digest("mine.stage") == before


def test_a_definition_that_moves_to_another_module_changes_nothing(project: Path) -> None:
    helper = "import math\n\nFACTOR = 2\n\ndef twice(x):\n    return FACTOR * math.floor(x)\n"
    write(project, "mine.helper", helper)
    write(project, "mine.stage", "from mine.helper import twice\n\ndef main(job):\n    return twice(job)\n")
    before = code.code_of("mine.stage")
    write(project, "mine.moved", helper)
    write(project, "mine.helper", "from mine.moved import twice\n")  # as a re-export
    assert code_digest("mine.stage") == before.digest
    write(project, "mine.stage", "def main(job):\n    from mine.moved import twice\n    return twice(job)\n")
    after = code.code_of("mine.stage")
    assert after.digest == before.digest
    assert keys.code_changes(before.parts, after.parts) == []


def test_what_is_not_reached_does_not_count(project: Path) -> None:
    write(project, "mine.helper", "def twice(x):\n    return 2 * x\n\ndef other(x):\n    return x\n")
    stage = """
        from mine.helper import other, twice

        def main(job):
            return twice(job)

        def estimate(params):
            return other(params)
    """
    write(project, "mine.stage", stage)
    before = code_digest("mine.stage")
    write(project, "mine.helper", "def twice(x):\n    return 2 * x\n\ndef other(x):\n    return -x\n")
    write(project, "mine.stage", stage.replace("other(params)", "3"))
    assert code_digest("mine.stage") == before


def test_which_of_two_definitions_a_name_means_counts(project: Path) -> None:
    write(project, "mine.a", "def f(x):\n    return x\n")
    write(project, "mine.b", "def f(x):\n    return -x\n")
    text = "from mine.{} import f\nfrom mine.{} import f as g\n\ndef main(job):\n    return f(job) + 2 * g(job)\n"
    write(project, "mine.stage", text.format("a", "b"))
    before = code_digest("mine.stage")
    write(project, "mine.stage", text.format("b", "a"))
    assert code_digest("mine.stage") != before


def test_a_module_that_is_used_as_a_value_counts_whole(project: Path) -> None:
    write(project, "mine.helper", "def twice(x):\n    return 2 * x\n")
    write(project, "mine.stage", "from mine import helper\n\ndef main(job):\n    return getattr(helper, job)()\n")
    before = code_digest("mine.stage")
    write(project, "mine.helper", "def twice(x):\n    return 3 * x\n")
    assert code_digest("mine.stage") != before


@pytest.mark.parametrize(
    "register",
    [
        "KNOWN['a'] = 1\n",
        "@remember\nclass Task:\n    size = 1\n",
        "TASK = remember(1)\n",
        "if True:\n    KNOWN['a'] = 1\n",
    ],
)
def test_what_an_imported_module_does_counts(project: Path, register: str) -> None:
    write(project, "mine.registry", "KNOWN = {}\n\ndef remember(what):\n    KNOWN['b'] = what\n    return what\n")
    top = "from mine.registry import KNOWN, remember\n\n"
    write(project, "mine.tasks", top + register)
    stage = "import mine.tasks\nfrom mine.registry import KNOWN\n\ndef main(job):\n    return KNOWN\n"
    write(project, "mine.stage", stage)
    before = code_digest("mine.stage")
    write(project, "mine.tasks", top + register.replace("1", "2"))
    assert code_digest("mine.stage") != before


def test_which_name_of_an_installed_package_is_used_counts(project: Path) -> None:
    write(project, "mine.stage", "from math import sin as f\n\ndef main(job):\n    return f(job)\n")
    before = code_digest("mine.stage")
    write(project, "mine.stage", "from math import cos as f\n\ndef main(job):\n    return f(job)\n")
    assert code_digest("mine.stage") != before


MESSAGES = """
    import math
    from mine.errors import Wrong, Special

    def main(job):
        job.say("started")
        self.job.say(f"{job} of 3")
        if job.bad:
            raise Wrong("is wrong: " + f"{job.x:.2f} is not 1")
        if job.worse:
            raise Special(f"is {job.x}", "Set another.") from None
        if job.other:
            raise ValueError("x")
        job.log("kept")
        return math.log(2), "a prompt"
"""


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("started", "has started", False),
        ("of 3", "of three", False),
        ("is wrong: ", "wrong: ", False),
        ("is not 1", "is not one", False),
        ("Set another.", "Choose another.", False),
        (":.2f", ":.3f", False),
        ("is {job.x}", "is {job.y}", True),
        ("{job} of", "{job.done} of", True),
        ('ValueError("x")', 'ValueError("y")', True),
        ('log("kept")', 'log("changed")', True),
        ("math.log(2)", "math.log(3)", True),
        ("a prompt", "another prompt", True),
        ("raise Special", "raise Wrong", True),
    ],
)
def test_a_corrected_message_does_not_count_and_all_else_does(project: Path, old: str, new: str, counts: bool) -> None:
    errors = "class Wrong(Exception):\n    cause = 'config'\n\nclass Special(Wrong):\n    pass\n"
    write(project, "mine.errors", errors)
    write(project, "mine.stage", MESSAGES)
    before = code_digest("mine.stage")
    assert old in MESSAGES
    write(project, "mine.stage", MESSAGES.replace(old, new))
    assert (code_digest("mine.stage") != before) == counts


def test_an_edit_while_a_run_goes_on_is_seen(project: Path) -> None:
    write(project, "mine.stage", "def main(job):\n    return 1\n")
    before = code_digest("mine.stage")
    (project / "mine" / "stage.py").write_text("def main(job):\n    return 22\n")
    assert code_digest("mine.stage") != before


def test_a_module_that_params_name_counts(project: Path) -> None:
    write(project, "mine.stage", "def main(job):\n    return 1\n")
    write(project, "mine.task", "class Mine:\n    baseline = 0.25\n")
    params = {"mixture": [{"task": "mine.task.Mine"}]}
    before = code_digest("mine.stage", params)
    assert before != code_digest("mine.stage", {"mixture": []})
    write(project, "mine.task", "class Mine:\n    baseline = 0.5\n")
    assert code_digest("mine.stage", params) != before


def test_serialised_trees_are_the_same_on_every_python() -> None:
    """Golden digest of a text that uses what the syntax trees of Python 3.11 to 3.13 treat differently."""
    text = textwrap.dedent('''
        """Words."""
        import os.path as p
        from a import (b, c as d)

        @dec(1, *x, **y)
        async def f(a, /, b=1, *args: int, c=None, **kw) -> "T":
            """Words."""
            async with q as r, s:
                return f"{a!r:>{b}} {c=}" "tail" f'{d["e"]}'

        class K(Base, metaclass=M):
            x: int = 0
            def m(self): ...

        match p:
            case {"k": [1, *_], **rest} if rest: pass
            case K(x=None) | (1 | 2): pass
        try:
            x = lambda *a, b=...: (yield)
        except* ValueError as e:
            del x[1:2, ...]
        y = {**a, "b": 1e400, b"c": 1_000, 'd': -0.0, 'e': 2j, 'f': u"u"}
    ''')
    assert keys.digest(code.serialise(ast.parse(text))) == "d0918924d8801f31"


@dataclasses.dataclass
class Inner:
    lr: float = 0.02
    path: str | None = dataclasses.field(default=None, metadata={"file": True})


@dataclasses.dataclass
class Outer:
    inner: Inner
    names: list[str]


def test_files_enter_by_content_not_by_path() -> None:
    one = keys.canonical(Outer(Inner(path="/a/x"), []), lambda path: "abc")
    two = keys.canonical(Outer(Inner(path="/b/y"), []), lambda path: "abc")
    assert one == two
    assert one["inner"]["path"] == {"sha256": "abc"}


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, object(), {1: 2}])
def test_a_value_without_a_stable_form_is_an_error(value: object) -> None:
    with pytest.raises(UserError, match=r"params\.x"):
        keys.canonical({"x": value}, str)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(JSON, JSON)
def test_equal_values_and_only_they_have_equal_digests(a: object, b: object) -> None:
    same = repr_sorted(a) == repr_sorted(b)
    assert (keys.digest(a) == keys.digest(b)) == same


def repr_sorted(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{repr_sorted(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(repr_sorted, value)) + "]"
    return repr(value)


def test_the_same_key_in_another_process_folder_and_hash_seed(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline.plan import code, keys
content = code.code_of("pipeline.stages.download").digest
print(keys.stage_key("pipeline.stages.download", {{"n": 3}}, {{"b": "1", "a": "2"}}, None, content))
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for folder, seed in ((tmp_path, "1"), (ROOT, "2"))
    }
    assert len(found) == 1


def test_differences_are_named_with_both_values() -> None:
    old = {"params": {"lr": 0.02, "m": [1, 2]}, "inputs": {"model": "aaaa"}, "identity": None, "code": {}}
    new = {"params": {"lr": 0.05, "m": [1, 3]}, "inputs": {"model": "bbbb"}, "identity": None, "code": {}}
    assert keys.differences(old, new) == ["lr 0.02 -> 0.05", "m[1] 2 -> 3", "input model aaaa -> bbbb"]
