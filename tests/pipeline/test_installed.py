"""Chatmill installed among other packages, as `pip install .` does it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "model", "data", "evals", "conf")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with a Chatmill that was built and installed into it."""
    pytest.importorskip("setuptools", reason="needs setuptools to build Chatmill")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("packages")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("flows.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    how = ["--no-deps", "--no-build-isolation", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, str(source)], check=True, capture_output=True)
    return target


def chatmill(packages: Path, here: Path, *arguments: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "CHATMILL_STORE"}
    env |= {"PYTHONPATH": str(packages), "COLUMNS": "200"}
    program = "import sys; from pipeline.commands.cli import main; sys.exit(main())"
    line = [sys.executable, "-c", program, *arguments]
    return subprocess.run(line, cwd=here, env=env, check=True, capture_output=True, text=True).stdout


def test_the_store_is_in_the_working_directory_and_not_among_the_packages(packages: Path, tmp_path: Path) -> None:
    said = chatmill(packages, tmp_path, "plan")

    assert "stages would run" in said and f"Store: {tmp_path / 'store'}" in said
    assert not (packages / "store").exists()


def test_a_store_that_was_named_is_used(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()

    assert f"Store: {tmp_path / 'other'}" in chatmill(
        packages, tmp_path / "here", "plan", f"store.root={tmp_path}/other"
    )


@pytest.mark.parametrize("room", ["report", "ui"])
def test_templates_style_sheets_and_pages_are_installed_too(packages: Path, room: str) -> None:
    installed = {path.name for path in (packages / "pipeline" / room).iterdir() if path.suffix != ".py"}
    source = {path.name for path in (ROOT / "pipeline" / room).iterdir() if path.suffix != ".py"}

    assert source - {"__pycache__"} <= installed
