"""A hub of data sets on loopback with a few small files, and faults that come exactly when a test wants them."""

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40
Answer = tuple[int, dict[str, str], Iterable[bytes]]


class SmallHub:
    """Serves root/datasets/ORG/NAME/... as a hub does, and root/files/NAME as they are.

    faults: by the last part of a path, what happens to its next GETs: "error" (503), "limit" (429), "limit 7"
    (429 with Retry-After: 7), "drop" (half, then the connection closes), "corrupt" (one byte flipped), "ok"; by "api",
    of questions about repositories.
    requests: (method, path, range) in order. tokens: the Authorization headers that came, in order.
    sha256_etags: whether files carry their sha256 as ETag.
    answers: by path, what is answered instead, whatever is asked: (status, headers, parts of the body). The connection
    closes after it; without a Content-Length the body goes on until the parts end or nobody listens any more.
    """

    def __init__(self, root: Path):
        self.root = root
        self.commit = COMMIT
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str, str | None]] = []
        self.sha256_etags = True
        self.tokens: list[str] = []
        self.answers: dict[str, Answer] = {}
        self.url = ""

    def add(self, path: str, content: bytes) -> str:
        """Put a file below root; returns its sha256."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def gets(self, name: str) -> int:
        return sum(method == "GET" and path.endswith(name) for method, path, _ in self.requests)

    @contextmanager
    def serving(self) -> Iterator["SmallHub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(hub: SmallHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.serve()

        def do_GET(self) -> None:
            self.serve()

        def serve(self) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            if "Authorization" in self.headers:
                hub.tokens.append(self.headers["Authorization"])
            path = self.path.split("?")[0]
            if path in hub.answers:
                self.send_instead(*hub.answers[path])
                return
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                self.describe("/".join(parts[2:4]), "tree" in parts)
            elif parts[0] == "datasets" and len(parts) > 5:
                self.send_file(hub.root / "datasets" / parts[1] / parts[2] / "/".join(parts[5:]))
            else:
                self.send_file(hub.root / "/".join(parts))

        def send_instead(self, status: int, headers: dict[str, str], body: Iterable[bytes]) -> None:
            self.send_response(status)
            for name, value in ({"Connection": "close"} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):
                for part in body if self.command == "GET" else []:
                    self.wfile.write(part)
            self.close_connection = True

        def describe(self, repo_id: str, tree: bool) -> None:
            repo = hub.root / "datasets" / repo_id
            if self.refuses(self.next_fault("api")):
                return
            if not repo.is_dir():
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            files = [(p.relative_to(repo).as_posix(), p.read_bytes()) for p in sorted(repo.rglob("*")) if p.is_file()]
            entries = [_entry(name, content) for name, content in files]
            found: Any = entries if tree else {"_id": "1", "id": repo_id, "sha": hub.commit, "siblings": []}
            self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def send_file(self, path: Path) -> None:
            if not path.is_file():
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest() if hub.sha256_etags else "not-a-digest"
            headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            fault = self.next_fault(path.name) if self.command == "GET" else "ok"
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            body = bytearray(content[start:])
            if self.refuses(fault):
                return
            if fault == "corrupt":
                body[len(body) // 2] ^= 0xFF
            self.answer(206 if start else 200, bytes(body), headers, cut=fault == "drop")

        def refuses(self, fault: str) -> bool:
            kind, _, seconds = fault.partition(" ")
            if kind in ("error", "limit"):
                self.answer(503 if kind == "error" else 429, b"", {"Retry-After": seconds} if seconds else {})
            return kind in ("error", "limit")

        def next_fault(self, name: str) -> str:
            return hub.faults[name].pop(0) if hub.faults[name] else "ok"

        def answer(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

    return Handler


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """Large files are kept aside under their sha256, small ones by git itself, as on the real hub."""
    digest = hashlib.sha256(content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
    if not path.endswith(".json"):
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry
