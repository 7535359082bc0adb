"""What no client of ours sends: each request is answered with what is wrong, and the server says nothing."""

import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_app import running

from pipeline.ui.chat import LARGEST_SEED, MOST_CHARACTERS, MOST_MESSAGES
from pipeline.ui.gate import BODY_BYTES
from tests.conftest import tries

HI = {"messages": [{"role": "user", "content": "hi"}]}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
roles = st.sampled_from(["user", "assistant", "system", "tool"]) | values
parts = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "python"]) | values, "text": values}))
messages = st.fixed_dictionaries({"role": roles, "content": st.text(max_size=9) | parts | values})
names = ["model", "stream", "temperature", "top_k", "top_p", "max_tokens", "seed", "tools", ""]
bodies = st.one_of(
    values,
    st.fixed_dictionaries({"messages": st.lists(messages, max_size=3) | values}),
    st.builds(lambda name, value: {**HI, name: value}, st.sampled_from(names), values),
).map(lambda body: json.dumps(body).encode())
gradio = st.fixed_dictionaries(
    {},
    optional={
        "batched": values,
        "data": st.lists(values) | values,
        "fn_index": values,
        "session_hash": values,
        "event_data": values,
    },
).map(lambda body: json.dumps(body).encode())


# As the page sends them, but for a value or two.
given_values = st.lists(st.sampled_from([None, "aaaa1111", "hi", 0.6, 50]) | values, max_size=9)
details = st.fixed_dictionaries({"index": st.integers() | values, "value": values | st.just({"text": "hi"})})
events = st.fixed_dictionaries(
    {"data": given_values, "fn_index": st.integers(-1, 14), "session_hash": st.just("tab")},
    optional={"event_data": details | values},
).map(lambda body: json.dumps(body).encode())
sent = st.builds(
    lambda number, system, temperature, detail: json.dumps(
        {
            "data": ["hi"] * (number == 0) + [None, "aaaa1111", system, temperature, 50, 1.0, 64, ""],
            "fn_index": number,
            "session_hash": "tab",
            "event_data": detail,
        }
    ).encode(),
    st.integers(0, 6),
    st.text(max_size=5),
    st.floats(-1, 3),
    details,
)


@pytest.fixture(scope="module")
def app():
    """One of its own: nothing on its stderr is checked at the end."""
    with running() as app:
        yield app


TRIED = settings(max_examples=tries(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@TRIED
@given(body=bodies | st.binary() | bodies.map(lambda body: body[:-1]))
def test_no_body_makes_the_api_fail(app, body):
    status, said = app.send("/api/chat", body)

    assert status in (200, 400)
    assert status == 200 or json.loads(said)["error"]


@TRIED
@given(path=st.sampled_from(["queue/join", "cancel", "reset"]), body=gradio | bodies | st.binary())
def test_no_body_makes_a_route_of_gradio_fail(app, path, body):
    assert app.send(f"/gradio_api/{path}", body)[0] < 500


@TRIED
@given(body=events | sent)
def test_an_event_that_no_page_sends_is_refused_before_gradio_works_on_it(app, body):
    assert app.send("/gradio_api/queue/join", body)[0] in (200, 400)


HEADS = [
    b"",
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://[\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: =;;;\xff=\xfe\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: \xff\r\n\r\n",
    b"GET /?token=%ff%00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET http://evil/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /assets/../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /assets/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9e9\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n",
    b"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
def test_no_request_line_or_header_makes_the_server_fail(app, head):
    host, port = app.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head)
        connection.shutdown(socket.SHUT_WR)
        said = connection.recv(100)

    assert said == b"" or b" 4" in said[:12]
    assert app.send("/api/models")[0] == 200


def chunked(app, path, chunks, **headers):
    """Send without an announced length."""
    host, port = app.address.removeprefix("http://").split(":")
    sent = {"Host": host, "Transfer-Encoding": "chunked", "Content-Type": "application/json", **headers}
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        try:
            for chunk in chunks:
                connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        except ConnectionError:
            pass
        return connection.recv(100)


@pytest.mark.parametrize("path", ["/api/chat", "/gradio_api/queue/join"])
def test_a_body_that_is_too_long_is_refused_by_what_it_announces_and_while_it_arrives(app, path):
    assert app.send(path, b"[" + b" " * BODY_BYTES)[0] == 413

    endless = (b" " * 65536 for _ in range(BODY_BYTES // 65536 + 1))
    assert b" 413 " in chunked(app, path, endless, Authorization=f"Bearer {app.token}")


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": [user("hi")] * (MOST_MESSAGES + 1)}, "Send 10,000 at most"),
        ({"messages": [user("x" * (MOST_CHARACTERS + 1))]}, "Shorten it to 100,000 at most"),
        (b'{"messages": [{"role": "user", "content": [' + b"0," * MOST_CHARACTERS + b"0]}]}", "Shorten it"),
        (HI | {"seed": LARGEST_SEED + 1}, "seed"),
        (HI | {"temperature": 10**400}, "temperature"),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
    ],
    ids=["messages", "characters", "parts", "seed", "temperature", "depth", "half a surrogate pair"],
)
def test_what_is_beyond_all_bounds_is_named(app, body, said):
    status, answer = app.send("/api/chat", body)

    assert status == 400
    assert said in json.loads(answer)["error"] and len(answer) < 500
