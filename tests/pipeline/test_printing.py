"""Names, logs and errors from elsewhere reach a terminal as text that it does not obey, and a pipe likewise."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from pipeline.printing import PlainConsole
from pipeline.runner.console import RunView

ROOT = Path(__file__).resolve().parents[2]
EVIL = "a\x1b]0;title\x07\x1b[31mb\x9b2J\u202ec[red]d[/red][link=https://evil.example]e[/link]:smile:"
SHOWN = "a␛]0;title␛[31mb\ufffd2J\ufffdc[red]d[/red][link=https://evil.example]e[/link]:s"  # rich drops the bell


def terminal() -> PlainConsole:
    return PlainConsole(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)


def table():
    made = Table(box=None)
    made.add_column("name")
    made.add_row(EVIL)
    return made


@pytest.mark.parametrize("thing", [EVIL, Text(EVIL), table()], ids=["text", "Text", "table"])
def test_a_text_is_shown_as_it_is_written(thing):
    console = terminal()
    console.print(thing)

    said = console.file.getvalue()
    assert SHOWN in re.sub(r"\x1b\[[\d;]*m", "", said)  # without our own colours
    assert not {"\x07", "\x9b", "\u202e"} & set(said) and "\x1b]" not in said and "\x1b[31m" not in said


def test_our_own_colours_stay():
    console = terminal()
    console.print("fine", style="green")
    assert console.file.getvalue() == "\x1b[32mfine\x1b[0m\n"


def test_a_live_view_of_a_run_shows_names_of_measurements_as_they_are():
    console = terminal()
    view = RunView(console)
    with view:
        view.on_start("sft[red]x[/red]", EVIL, Path("log"))
        view.on_progress(
            "sft[red]x[/red]", {"done": 1, "total": 2, "unit": "steps", "shown": {"[bold]loss": "\x1b[5m"}}
        )
        view.progress.refresh()
        view.on_say("sft[red]x[/red]", EVIL)

    said = console.file.getvalue()
    assert "\x1b[5m" not in said and "\x1b]0" not in said
    assert "[bold]loss ␛[5" in said and "sft[red]x[/red]" in said


@pytest.mark.parametrize(
    "line", [["log", "sft"], ["ls"], ["status"], ["show", "sft"], ["log", EVIL.replace("\x9b", "")]]
)
def test_commands_show_what_a_store_from_elsewhere_holds_and_a_terminal_obeys_none_of_it(tmp_path, line):
    folder = tmp_path / "artifacts" / "finetune" / "ffff111122223333"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(f"loss {EVIL}\n")
    record = {
        "module": "finetune", "key": "ffff111122223333", "stages": ["sft"], "inputs": {}, "params": {"name": EVIL},
        "metrics": {EVIL: 1.0}, "versions": {}, "files": {}, "finished": 1.0, "seconds": 1.0, "usd": 0.0,
        "device": "cpu", "nproc": 1,
    }  # fmt: skip
    (folder / "artifact.json").write_text(json.dumps(record))
    (tmp_path / "work" / "rl-aaaa111122223333").mkdir(parents=True)
    (tmp_path / "work" / "rl-aaaa111122223333" / "job.json").write_text(json.dumps({"stage": EVIL, "key": "aaaa"}))
    (tmp_path / "memory").mkdir()

    done = subprocess.run(
        [sys.executable, ROOT / "flows.py", *line],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
        env=os.environ | {"CHATMILL_STORE": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip

    said = done.stdout + done.stderr
    assert said and "Traceback" not in said
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(said)
