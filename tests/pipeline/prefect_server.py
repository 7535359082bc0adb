"""A Prefect server as a user starts it, and what its API says of runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import ROOT


class PrefectApi:
    def __init__(self, url: str):
        self.url = url

    def answers(self) -> bool:
        with suppress(OSError):
            return bool(urllib.request.urlopen(f"{self.url}/health", timeout=5).read())
        return False

    def ask(self, path: str, content: Any = None) -> Any:
        """The answer of the API: to GET, or to POST where there is content to send."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}/{path}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def runs(self) -> list[dict[str, Any]]:
        """The newest run first."""
        return list(self.ask("flow_runs/filter", {"sort": "START_TIME_DESC"}))

    def tasks(self, run: dict[str, Any]) -> dict[str, str]:
        """The state of each task of a run, by its name."""
        found = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        return {task["name"]: task["state_name"] for task in found}

    def logs(self, run: dict[str, Any]) -> list[str]:
        wanted = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "sort": "TIMESTAMP_ASC"}
        return [line["message"] for line in self.ask("logs/filter", wanted)]

    def artifact(self, key: str) -> Any:
        """What the newest artifact of this key shows."""
        found = self.ask("artifacts/latest/filter", {"artifacts": {"key": {"any_": [key]}}})
        return found[0]["data"]


class PrefectServer(PrefectApi):
    """`prefect server start` with a home of its own, on a free port that it keeps when it is started again."""

    def __init__(self, home: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.home = home
        super().__init__(f"http://127.0.0.1:{self.port}/api")
        self.env = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        self.process = self.prefect("server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        while not self.answers():
            assert self.process.poll() is None, "the Prefect server ended"

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def prefect(self, *arguments: str, cwd: Path = ROOT, **env: str) -> "subprocess.Popen[bytes]":
        """Start a command of Prefect that uses this server."""
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=cwd,
            env=os.environ | self.env | {"PREFECT_API_URL": self.url} | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
