import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import CHROMIUM, Browser
from serve_app import running

from tests.services import service

pytest.importorskip("websockets")
pytestmark = service("Chromium", CHROMIUM)

READY = "!!document.querySelector('#box textarea') && document.querySelectorAll('#chat .example').length > 0"
DONE = "document.querySelector('#status').innerText.includes('tokens/s')"
WRITING = "document.querySelector('#chat').innerText.includes('on and on and')"


def chat_says(text):
    return f"document.querySelector('#chat').innerText.includes({text!r})"


def press(name):
    return f"#chat button[aria-label={name}]"


def test_a_conversation_with_tools_stop_retry_edit_and_undo(app):
    with Browser() as tab:
        tab.open(app.link, READY)
        tab.say("3+4")
        tab.wait(chat_says("Calculator: 3+4 = 7"))
        tab.wait(DONE)

        tab.say("talk forever")
        tab.wait(WRITING)
        tab.click("#box .stop-button")
        tab.wait("document.querySelector('#status').innerText.includes('stopped')")
        tab.click(press("Retry"))
        tab.wait("document.querySelector('#status').innerText.includes('writing')")
        tab.wait(WRITING)
        tab.click("#box .stop-button")
        tab.wait("document.querySelector('#status').innerText.includes('stopped')")

        tab.click(press("Edit"))  # the first message: what came after it goes
        tab.wait("!!document.querySelector('#chat textarea')")
        tab.js(
            "{const box = document.querySelector('#chat textarea'); box.value = 'hello';"
            " box.dispatchEvent(new Event('input', {bubbles: true}))}"
        )
        tab.wait("!document.querySelector('#chat button[aria-label=Submit]').disabled")
        tab.click(press("Submit"))
        tab.wait(chat_says("You said: hello"))
        tab.wait(f"{DONE} && !{chat_says('forever')}")
        tab.click(press("Undo"))
        tab.wait("document.querySelector('#box textarea').value == 'hello'")

        outside = [url for url in tab.requests if not url.startswith((app.address, "data:", "blob:"))]
        assert outside == []


def test_an_example_is_asked_at_a_click_and_the_other_model_can_be_chosen(app):
    with Browser() as tab:
        tab.open(app.link, READY)
        tab.click("#chat .example")
        tab.wait(chat_says("Calculator: What is 3+4? = 7"))
        tab.click("#new-chat")
        tab.wait("document.querySelectorAll('#chat .example').length > 0")
        tab.press("#model input")
        tab.press("[role=option][aria-posinset='2']")
        tab.wait("document.querySelector('#side').innerText.includes('bbbb2222')")


SIZES = [(1440, 900), (820, 1180), (390, 844)]

PANEL = "document.querySelector('#chat .bubble-wrap')"
WHOLE_PAGE = """(() => {
    const page = document.documentElement, box = document.querySelector('#box').getBoundingClientRect()
    return page.scrollHeight <= innerHeight && page.scrollWidth <= innerWidth && box.top > 0
        && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth
})()"""
NEWEST = """(() => {
    const text = [...document.querySelectorAll('#chat .bot.message')].at(-1).getBoundingClientRect()
    const box = document.querySelector('#box').getBoundingClientRect()
    return text.bottom > 0 && text.bottom <= box.top
})()"""


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_box_and_the_newest_text_are_in_the_window_after_ten_turns_and_while_an_answer_grows(app, width, height):
    with Browser(width, height) as tab:
        tab.open(app.link, READY)
        tab.wait(f"document.querySelector('#side').classList.contains('open') == {str(width > 800).lower()}")
        tab.wait(WHOLE_PAGE)
        for turn in range(10):
            tab.say(f"turn {turn} of many")
            tab.wait(f"{chat_says(f'You said: turn {turn} of many')} && {DONE}")
            assert tab.js(WHOLE_PAGE)
            tab.wait(NEWEST)

        tab.say("slowly")
        for line in (30, 60, 90):
            tab.wait(chat_says(f"line {line}"))
            assert tab.js(WHOLE_PAGE)
            tab.wait(NEWEST)
        tab.scroll("#chat", -600)  # somebody reads what was above, and is left alone
        tab.wait(f"!{NEWEST}")
        at = tab.js(f"{PANEL}.scrollTop")
        tab.wait(chat_says("line 150"))
        assert tab.js(f"{PANEL}.scrollTop") == at and tab.js(WHOLE_PAGE)
        tab.click("#box .stop-button")
        tab.wait("document.querySelector('#status').innerText.includes('stopped')")


def test_letters_typed_right_after_enter_stay_in_the_box_on_a_slow_link(app):
    with Browser() as tab:
        tab.open(app.link, READY)
        slow = {"offline": False, "latency": 1000, "downloadThroughput": -1, "uploadThroughput": -1}
        tab.command("Network.emulateNetworkConditions", **slow)
        tab.type("hello there")
        tab.enter()
        tab.type("and then")
        tab.wait(f"{chat_says('You said: hello there')} && {DONE}")

        assert tab.js("document.querySelector('#box textarea').value") == "and then"


def test_a_message_that_cannot_be_answered_goes_back_before_what_was_typed_since(app):
    with Browser() as tab:
        tab.open(app.link, READY)
        tab.type("x" * 500)
        tab.enter()
        tab.type("and then")
        tab.wait("document.body.innerText.includes('Shorten it')")  # the page says why
        tab.wait(f"document.querySelector('#box textarea').value == {'x' * 500 + chr(10) + 'and then'!r}")


@pytest.fixture
def elsewhere():
    """The address of another server, and what was asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


FOREIGN = """
![a](URL/markdown.png) ![b][ref] <img src="URL/tag.png" onerror="window.ran=1"> <img src=x onerror="window.ran=2">
[c](javascript:window.ran=3) <a href="javascript:window.ran=4">d</a> <a href="JaVa&#10;Script:window.ran=5">e</a>
<svg onload="window.ran=6"><image href="URL/svg.png"/></svg> <script>window.ran=7</script>
<iframe src="URL/frame"></iframe> <iframe srcdoc="<script>parent.ran=8</script>"></iframe>
<style>@import url(URL/style.css); body { background: url(URL/background.png) }</style>
<link rel="stylesheet" href="URL/link.css"> <link rel="prefetch" href="URL/prefetch"> <video src="URL/v.mp4"></video>
<div style="position: fixed; inset: 0; background: url(URL/cover.png)" onclick="window.ran=9">cover</div>
<form action="URL/form"><button>f</button></form> <object data="URL/object"></object> $$\\href{javascript:ran=10}{x}$$

[ref]: URL/reference.png

the end
"""


def test_what_a_model_writes_fetches_nothing_and_runs_nothing(elsewhere, app):
    there, asked = elsewhere
    with running(context=9000) as own, Browser() as tab:
        tab.open(own.link, READY)
        tab.say(FOREIGN.replace("URL", there))
        tab.wait(f"{chat_says('You said:')} && {DONE}")
        tab.js("document.querySelectorAll('#chat .message *').forEach(part => part.tagName == 'A' || part.click())")
        tab.say("hello")
        tab.wait(chat_says("You said: hello"))

        assert tab.js("document.querySelectorAll('#chat .bot.message').length") >= 2
        assert asked == []
        assert tab.js("String(window.ran)") == "undefined"
        links = tab.js("[...document.querySelectorAll('#chat a, #chat form')].map(a => a.href || a.action || '')")
        assert [link for link in links if "script" in link.lower()] == []
        assert tab.js(WHOLE_PAGE)  # nothing lies over it


def test_a_page_that_is_closed_frees_the_model(app):
    with Browser() as tab:
        tab.open(app.link, READY)
        tab.say("slowly")
        tab.wait(chat_says("line 5"))
    assert app.send("/api/chat", {"messages": [{"role": "user", "content": "3+4"}]})[0] == 200


def test_the_password_opens_the_page_in_a_browser_that_was_not_given_the_link(app):
    with Browser() as tab:
        tab.open(app.address, "!!document.querySelector('input[type=password]')")
        tab.js(f"document.querySelector('input[type=password]').value = {app.token!r}")
        tab.click("button")
        tab.wait(READY)
        assert tab.js("location.pathname + location.search + document.cookie") == "/"
