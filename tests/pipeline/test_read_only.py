"""A store that cannot be written serves everything that only reads; `plan` and `why` write nothing to any store."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.commands.cli import main
from tests.pipeline.small_store import small_store
from tests.pipeline.test_small_files import carry_out, declare

TOYS = ["store.min_free_gb=0", "pipeline.stages=[a]", declare("a", n=4)]


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Everything below `root`, with what changes when it is written."""
    return {str(path): (found.st_mtime_ns, found.st_size) for path in root.rglob("*") for found in [path.lstat()]}


@pytest.mark.parametrize("there", [True, False], ids=["a store", "no store yet"])
def test_plan_and_why_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """Not even what local files hashed to, or data sources were found to be."""
    monkeypatch.setenv("CHATMILL_STORE", str(tmp_path / "store"))
    text = tmp_path / "mine.jsonl"
    text.write_text('{"text": "One."}\n{"text": "Two."}\n')
    talk = tmp_path / "talk.jsonl"
    talk.write_text('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]\n')
    own = ["data=local", f"data.paths=[{text}]", f"mixture.identity.file={talk}"]
    if there:
        carry_out(TOYS)
    before = listing(tmp_path)
    lines = [["plan", *own], ["why", "sft", *own], ["plan", *TOYS], ["why", "a", *TOYS], ["plan"], ["plan", "--config"]]
    for line in lines:
        assert main(line) == 0
    assert listing(tmp_path) == before


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A finished store of toys and models on a file system that is then mounted read-only."""
    root = tmp_path / "store"
    root.mkdir()
    monkeypatch.setenv("CHATMILL_STORE", str(root))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", str(root)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here ({mounted.stderr.strip()})")
    try:
        small_store(root)
        carry_out(TOYS)
        for path in root.rglob("verified.json"):
            path.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        yield root
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def test_everything_that_only_reads_works_on_a_read_only_store(
    sealed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = listing(sealed)
    lines = [
        ["run", *TOYS],
        ["ls"],
        ["status"],
        ["show", "sft"],
        ["plan", *TOYS],
        ["plan"],
        ["why", "a", *TOYS],
        ["verify"],
        ["log", "a"],
        ["chat", "sft", "--prompt", "Hi", "--max-tokens", "4"],
        ["export", "sft", str(tmp_path / "exported")],
        ["eval", "sft", "tasks=[Arithmetic,bpb]", "max_per_task=4", "max_new_tokens=4", "bpb_tokens=256"],
    ]
    for line in lines:
        assert main(line) == 0, line
    told = capfd.readouterr()
    assert "Nothing to do" in told.out and "Traceback" not in told.out + told.err
    assert "Arithmetic" in told.out and (tmp_path / "exported" / "config.json").exists()
    assert listing(sealed) == before


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (["run", "store.min_free_gb=0", "pipeline.stages=[a]", declare("a", n=5)], "but making stages requires it"),
        (["run", *TOYS, "force=[a]"], "but making stages requires it"),
        (["rm", "sft"], "cannot be written (Read-only file system)"),
        (["accept", "a", "--why", "so", "pipeline.stages=[a]", declare("a", n=5)], "more than code differs"),
    ],
)
def test_what_must_write_says_so_in_a_line(
    sealed: Path, capfd: pytest.CaptureFixture[str], line: list[str], complaint: str
) -> None:
    assert main(line) in (1, 2)
    told = capfd.readouterr()
    assert complaint in told.err and told.err.count("\n") == 1, told.err


def test_damage_on_a_read_only_store_is_named_and_not_used(sealed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(sealed)], check=True)
    (weights,) = sealed.glob("artifacts/finetune/*/model.safetensors")
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    subprocess.run(["mount", "-o", "remount,ro", str(sealed)], check=True)
    assert main(["chat", "sft", "--prompt", "Hi"]) == 1
    assert f"{weights} is not what was published" in capfd.readouterr().err
    assert main(["verify"]) == 1
    told = capfd.readouterr()
    assert f"{weights} is not what was published" in told.out and "quarantine" not in told.out
    assert weights.exists()
