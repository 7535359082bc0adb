"""What tests share: a store of their own, the command line as a process, the public sample data where it is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shared_hub() -> Path:
    """Real public data in the hub's layout, beside the checkout; the test is skipped without it."""
    folder = ROOT.parent / "shared" / "hub"
    if not folder.is_dir():
        pytest.skip("needs the sample data in ../shared/hub")
    return folder


class Chatmill:
    """The command line in processes of their own, on one store."""

    def __init__(self, store: Path):
        self.store = store

    def start(self, *arguments: str, **env: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "flows.py", *arguments],
            cwd=ROOT,
            env=os.environ | {"CHATMILL_STORE": str(self.store), "COLUMNS": "200"} | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0, **env: str) -> str:
        """The command's output; the test fails when its exit code is not `code`."""
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=600)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in out + err, out + err
        return out + err


@pytest.fixture
def chatmill(tmp_path: Path) -> Chatmill:
    return Chatmill(tmp_path / "store")


settings.register_profile("untimed", deadline=None)  # no test depends on how busy the machine is
settings.load_profile("untimed")
