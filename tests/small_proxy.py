"""Proxies on loopback that lead every host name to one server, and remember which hosts they were asked for."""

import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Proxy:
    url: str
    hosts: list[str] = field(default_factory=list)


@contextmanager
def small_proxy(scheme: str, server: str) -> Iterator[Proxy]:
    """scheme: http or socks5. server: the URL behind all names."""
    target = (urlsplit(server).hostname, urlsplit(server).port)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            begun = self.greet_socks() if scheme == "socks5" else self.take_request_line()
            with socket.create_connection(target) as there:
                there.sendall(begun)
                relay(self.request, there)

        def greet_socks(self) -> bytes:
            """RFC 1928: no authentication, CONNECT to a name."""
            self.request.recv(1 + 1 + self.request.recv(2, socket.MSG_PEEK)[1])
            self.request.sendall(b"\x05\x00")
            asked = self.request.recv(512)
            assert asked[3] == 3, "the client has resolved the name by itself"
            proxy.hosts.append(asked[5 : 5 + asked[4]].decode())
            self.request.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            return b""

        def take_request_line(self) -> bytes:
            """GET http://HOST/PATH becomes GET /PATH."""
            line, _, rest = self.request.recv(1 << 16).partition(b"\r\n")
            method, url, version = line.decode().split()
            proxy.hosts.append(urlsplit(url).hostname or "")
            path = urlsplit(url)._replace(scheme="", netloc="").geturl()
            head, _, body = rest.partition(b"\r\n\r\n")
            return f"{method} {path} {version}\r\nConnection: close\r\n".encode() + head + b"\r\n\r\n" + body

    listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy = Proxy(f"{scheme}://127.0.0.1:{listener.server_address[1]}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def relay(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes both ways until either side closes."""
    while True:
        for ready in select.select([one, other], [], [])[0]:
            try:
                data = ready.recv(1 << 16)
                (other if ready is one else one).sendall(data)
            except OSError:
                return
            if not data:
                return
