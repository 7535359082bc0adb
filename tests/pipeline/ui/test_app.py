import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_app import serve


def post(app, body):
    return app.send("/api/chat", body)


def ask(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def test_the_api_streams_an_answer_line_by_line(app):
    status, body = post(app, ask("3+4"))

    lines = [json.loads(line) for line in body.splitlines()]
    assert status == 200
    assert [line["type"] for line in lines] == ["text", "tool_call", "tool_output", "text", "end"]
    assert lines[-1]["reason"] == "end" and lines[-1]["message"]["role"] == "assistant"


def test_the_api_answers_at_once_when_asked_to(app):
    status, body = post(app, ask("hi", stream=False, model="bbbb"))

    assert status == 200
    assert json.loads(body)["message"] == {"role": "assistant", "content": "You said: hi"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (ask("hi", temprature=1), "Did you mean temperature?"),
        (ask("hi", top_p=7), "top_p"),
        (ask("hi", model="zzzz"), "no model 'zzzz'"),
        (ask("x" * 500), "Shorten it"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"message": "hi"}, "list of messages"),
        ({"messages": ["hi"]}, "role and a content"),
        (ask("hi", model=5), "key of a model"),
        (b"{", "not JSON"),
        (b"\xff{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(app, body, said):
    status, answer = post(app, body)

    assert status == 400
    assert said in json.loads(answer)["error"]


def test_a_reader_who_leaves_frees_the_model_for_the_next(app):
    with app.open("/api/chat", ask("forever")) as endless:
        endless.readline()

    assert post(app, ask("3+4"))[0] == 200


def leave(app, body):
    """Send a request and hang up as soon as it is there."""
    host, port = app.address.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /api/chat HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {app.token}\r\n"
        connection.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
        )


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_the_first_word_frees_the_model_too(app, stream):
    for _ in range(50):  # more than there are threads
        leave(app, ask("forever", stream=stream))

    assert post(app, ask("3+4"))[0] == 200


def test_those_who_wait_do_not_keep_an_answer_from_going_on(app):
    with ThreadPoolExecutor(60) as pool:
        with app.open("/api/chat", ask("forever")) as endless:
            waiting = [pool.submit(post, app, ask("3+4")) for _ in range(60)]  # more than there are threads
            time.sleep(2)
            for _ in range(5000):  # more than is on its way already
                assert endless.readline()
        assert {future.result()[0] for future in waiting} == {200}


def test_the_models_to_choose_from_are_listed(app):
    assert [m["key"] for m in json.loads(app.send("/api/models")[1])] == ["aaaa1111", "bbbb2222"]


def test_the_page_loads_nothing_from_outside_and_tells_nobody(app):
    _, page = app.send("/")
    config = json.loads(re.search(r"window\.gradio_config = (.*?);</script>", page)[1])

    outside = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', page)
    assert [url for url in outside if not url.startswith(app.address)] == []
    assert config["analytics_enabled"] is False
    assert config["stylesheets"] == []


def test_a_taken_port_is_named_with_the_setting_that_changes_it(app):
    port = int(app.address.rpartition(":")[2])
    process = serve(port=port)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 1 and out == ""
    assert (
        err.strip() == f"app.port: port {port} on 127.0.0.1 is in use. Choose another, for example app.port={port + 1}."
    )
