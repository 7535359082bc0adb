"""Who may use the app: hosts, origins, routes and the secret."""

import json
import signal
import urllib.error
import urllib.request

import pytest
from fastapi import FastAPI
from serve_app import running, serve
from starlette.testclient import TestClient

from pipeline.config.settings import AppConfig
from pipeline.errors import UserError
from pipeline.ui.gate import Access, Gate, Tries

ASK = {"messages": [{"role": "user", "content": "hi"}], "stream": False}
HTML = {"accept": "text/html"}


def client(app: AppConfig, delay: float = 0.0, **changes: object) -> TestClient:
    """A browser at a gate with nothing but a page and an API behind it."""
    access = Access.of(app)
    access.delay = delay
    for name, value in changes.items():
        setattr(access, name, value)
    inner = FastAPI(openapi_url=None)
    inner.get("/")(lambda: "the page")
    inner.post("/api/chat")(lambda: "an answer")
    gate = Gate(inner, access, "cookie", lambda body: None)
    return TestClient(gate, base_url="http://127.0.0.1:7860", follow_redirects=False)


@pytest.mark.parametrize(
    "path", ["/api/chat", "/api/models", "/", "/gradio_api/queue/join", "/assets/x.js", "/theme.css"]
)
def test_without_the_token_nothing_is_given_and_nothing_done(app, path):
    body = ASK if path.startswith(("/api/chat", "/gradio")) else None

    status, said = app.send(path, body, authorization="")
    assert status == 401 and "Bearer" in json.loads(said)["error"]
    assert app.send(path, body, authorization="Bearer wrong")[0] == 401


@pytest.mark.parametrize("path", ["/favicon.ico?", "/login#"])
def test_a_host_with_a_path_in_it_opens_no_other_route(app, path):
    assert app.send("/api/models", host=f"localhost{path}", authorization="")[0] in (400, 403)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "10.0.0.7", "[::1", ""]
)
def test_a_foreign_host_is_refused_on_loopback(app, host):
    assert app.send("/api/models", host=host)[0] in (400, 403)
    assert app.send("/gradio_api/queue/join", {}, host=host)[0] in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:80", "[::1]:7860", "127.1.2.3"])
def test_any_name_of_the_machine_itself_is_answered_to_whatever_port_leads_here(app, host):
    assert app.send("/api/models", host=host)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "x"])
@pytest.mark.parametrize("path", ["/api/chat", "/gradio_api/queue/join", "/gradio_api/cancel"])
def test_a_foreign_origin_is_refused_even_with_the_token(app, path, origin):
    status, said = app.send(path, ASK, origin=origin)

    assert status == 403 and "app.origins" in json.loads(said)["error"]


def test_the_own_origin_is_taken(app):
    assert app.send("/api/chat", ASK, origin=app.address)[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_any_page_can_post_without_asking_is_refused(app, kind):
    assert app.send("/api/chat", ASK, **{"content-type": kind})[0] == 415
    assert app.send("/gradio_api/queue/join", {}, **{"content-type": kind})[0] == 415


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/gradio_api/upload", {}),
        ("/gradio_api/upload_progress?upload_id=x", None),
        ("/gradio_api/file=/etc/passwd", None),
        ("/gradio_api/file/etc/passwd", None),
        ("/gradio_api/proxy=http://127.0.0.1/", None),
        ("/gradio_api/run/predict", {"data": []}),
        ("/gradio_api/call/send", {"data": []}),
        ("/gradio_api/component_server", {}),
        ("/gradio_api/process_recording", {}),
        ("/gradio_api/vibe-code", None),
        ("/gradio_api/stream/x", {}),
        ("/gradio_api/info", None),
        ("/assets/../gradio_api/info", None),
        ("/monitoring", None),
        ("/config", None),
        ("/docs", None),
        ("/openapi.json", None),
    ],
)
def test_routes_that_a_chat_does_not_need_are_closed(app, path, body):
    assert app.send(path, body)[0] == 404
    assert app.send(path, body, authorization="")[0] == 404


def test_the_link_opens_the_page_by_a_cookie_that_scripts_and_other_sites_cannot_use():
    browser = client(AppConfig(password="mill"))
    opened = browser.get("/?token=mill", headers=HTML)

    assert "url=./" in opened.text and "mill" not in opened.text.lower().replace("chatmill", "")
    cookie = opened.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and "mill;" not in cookie
    assert browser.get("/").json() == "the page"
    assert browser.get("/?token=mill").headers["location"] == "./"


def test_a_browser_without_the_link_is_asked_for_the_password():
    browser = client(AppConfig(password="mill & co"))

    page = browser.get("/", headers=HTML)
    assert page.status_code == 401 and 'type="password"' in page.text
    wrong = browser.post("/login", data={"password": "mill"}, headers=HTML)
    assert wrong.status_code == 401 and "not the password" in wrong.text
    right = browser.post("/login", data={"password": "mill & co"}, headers=HTML)
    assert (right.status_code, right.headers["location"]) == (303, "./")
    assert browser.get("/").json() == "the page"


def test_a_login_form_is_no_longer_than_a_password_may_be():
    browser = client(AppConfig(password="mill"))
    assert browser.post("/login", data={"password": "x" * 5000}).status_code == 413
    assert browser.post("/login", data={"password": "mill"}).status_code == 303


def test_a_password_is_good_for_programs_and_its_case_matters():
    program = client(AppConfig(password="Mühle"))

    assert program.post("/api/chat", json={}, headers={"authorization": "Bearer Mühle".encode()}).status_code == 401
    program = client(AppConfig(password="Mill"))
    assert program.post("/api/chat", json={}, headers={"authorization": "bearer Mill"}).json() == "an answer"
    assert program.post("/api/chat", json={}, headers={"authorization": "bearer mill"}).status_code == 401


def test_after_ten_wrong_passwords_none_is_looked_at_for_a_minute():
    now = [0.0]
    browser = client(AppConfig(password="mill"), tries=Tries(clock=lambda: now[0]))
    said = [browser.get(f"/?token={i}").status_code for i in range(12)]
    assert said == [401] * 10 + [429] * 2
    assert browser.get("/?token=mill").status_code == 429
    now[0] = 61.0
    assert browser.get("/?token=mill").status_code == 200


def test_tries_are_bounded_in_total_whatever_addresses_they_come_from():
    tries = Tries(clock=lambda: 0.0)
    for i in range(Tries.TOTAL):
        assert not tries.used_up(f"10.0.0.{i}")
        tries.record(f"10.0.0.{i}")
    assert tries.used_up("10.0.1.1")


def test_a_cookie_still_opens_while_no_password_is_looked_at():
    browser = client(AppConfig(password="mill"))
    browser.get("/?token=mill")
    for i in range(12):
        browser.get("/", headers={"authorization": f"Bearer {i}"})
    assert browser.get("/").json() == "the page"


def test_without_any_password_hosts_and_origins_are_still_checked():
    browser = client(AppConfig(insecure=True))

    assert browser.get("/").json() == "the page"
    assert browser.get("/", headers={"host": "evil.example"}).status_code == 403
    assert browser.post("/api/chat", json={}, headers={"origin": "http://evil.example"}).status_code == 403


def test_named_hosts_and_origins_are_answered():
    named = AppConfig(hosts=["Chat.Example.org"], origins=["https://Chat.Example.org/"], insecure=True)
    browser = client(named)

    assert browser.get("/", headers={"host": "chat.example.org"}).json() == "the page"
    there = {"origin": "https://chat.example.org"}
    assert browser.post("/api/chat", json={}, headers=there).json() == "an answer"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_beyond_loopback_a_secret_is_asked_for_and_any_name_answered_to(host):
    browser = client(AppConfig(host=host))
    assert browser.get("/", headers={"host": "gpu.example.org"}).status_code == 401
    browser = client(AppConfig(host=host, insecure=True))
    assert browser.get("/", headers={"host": "gpu.example.org"}).status_code == 403
    assert browser.get("/", headers={"host": "192.0.2.7:7860"}).status_code == 200


def test_each_start_makes_another_secret():
    secrets = {Access.of(AppConfig()).secret for _ in range(5)}
    assert len(secrets) == 5 and all(len(secret) >= 32 for secret in secrets)


def test_a_password_that_would_not_be_asked_for_is_a_mistake():
    with pytest.raises(UserError, match=r"app\.insecure"):
        Access.of(AppConfig(password="mill", insecure=True))


def test_a_chosen_password_is_not_printed():
    with running(password="grindstone") as app:
        assert "grindstone" not in app.link
        app.token = "grindstone"
        assert app.send("/api/models")[0] == 200


def test_every_answer_forbids_what_other_servers_hold(app):
    with app.open("/") as page:
        policy = page.headers["content-security-policy"]
    assert "img-src 'self' data: blob:;" in policy and "default-src 'self';" in policy
    with pytest.raises(urllib.error.HTTPError) as refused:
        app.open("/nothing")
    assert refused.value.headers["content-security-policy"] == policy


def test_ctrl_c_ends_it_at_once_and_says_nothing_in_the_middle_of_an_answer():
    process = serve()
    link = process.stdout.readline().strip()
    address, _, token = link.partition("/?token=")
    body = json.dumps({"messages": [{"role": "user", "content": "forever"}]}).encode()
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/api/chat", body, headers), timeout=30) as endless:
        endless.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)

    assert (process.returncode, out, err) == (0, "", "")
