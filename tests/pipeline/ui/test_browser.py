import pytest
from browser import CHROMIUM, Browser

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


@pytest.mark.parametrize("width", [480, 1280])
def test_the_page_fits_its_window(app, width):
    with Browser(width) as tab:
        tab.open(app.link, READY)
        tab.wait(f"document.querySelector('#side').classList.contains('open') == {str(width > 800).lower()}")
        tab.wait("document.documentElement.scrollWidth <= innerWidth")
        tab.wait("document.querySelector('#box').getBoundingClientRect().bottom <= innerHeight")
