"""Chromium without a window, steered over its debugging protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-port=0"
)
PATIENCE = 60.0  # seconds


class Browser:
    """One tab. `requests` are the addresses it asked for, `complaints` what its console shows."""

    def __init__(self, width: int = 1280, height: int = 900):
        from websockets.sync.client import connect

        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        line = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        address = next(text for text in self.process.stderr if "DevTools listening on" in text)
        with urllib.request.urlopen(f"http://{address.split('//')[1].split('/')[0]}/json") as answer:
            tab = next(t for t in json.load(answer) if t["type"] == "page")
        self.socket = connect(tab["webSocketDebuggerUrl"], max_size=None)
        self.numbers, self.requests, self.complaints = itertools.count(1), [], []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):  # before it has answered
            self.command("Browser.close")
        self.socket.close()
        try:
            self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.profile.cleanup()

    def command(self, method: str, patience: float = PATIENCE, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=patience))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            elif message.get("method") == "Log.entryAdded":
                entry = message["params"]["entry"]
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")
            elif message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))

    def js(self, expression: str) -> Any:
        """The value of an expression; None where it throws, as it may while a page is still loading, and where the
        page that was asked has gone without an answer."""
        try:
            answer = self.command("Runtime.evaluate", 5.0, expression=expression, returnByValue=True)
        except TimeoutError:
            return None
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.js(expression):
            assert time.monotonic() < end, f"never true: {expression}"

    def shot(self, path: Path) -> None:
        """A picture of the window."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def open(self, address: str, until: str) -> None:
        self.command("Page.navigate", url=address)
        self.wait(until)

    def click(self, selector: str) -> None:
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{found}")
        self.js(f"{found}.click()")

    def press(self, selector: str) -> None:
        """A click of a real mouse, for what listens to more than clicks."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{found}")
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def scroll(self, selector: str, by: int) -> None:
        """A turn of a real mouse wheel."""
        x, y = self.js(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect())"
        )
        self.command("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=by)

    def type(self, text: str) -> None:
        """Type into the chat app's box."""
        self.js("document.querySelector('#box textarea').focus()")
        self.command("Input.insertText", text=text)

    def enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r")

    def say(self, text: str) -> None:
        """Type and send. Until the last answer has wholly ended, the text stays in the box for another Enter."""
        self.type(text)
        end = time.monotonic() + PATIENCE
        self.enter()
        while text in str(self.js("document.querySelector('#box textarea').value")):
            assert time.monotonic() < end, f"never sent: {text}"
            self.enter()
