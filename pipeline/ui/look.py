"""The look of the chat app: theme, pieces of HTML, style.css, and scripts for what must not wait for the server.

Fonts are the system's, so that nothing is fetched from other servers.
"""

import html
from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, sizes

from pipeline.ui.models import ModelChoice

SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

# The second viewport takes effect: the page shrinks for a phone's keyboard.
HEAD = """<meta name="robots" content="noindex">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">"""

CSS = Path(__file__).with_name("style.css").read_text()
# Side bar: on a narrow screen it would cover the conversation, so it starts closed.
# Scrolling: the conversation follows its end until somebody scrolls up, and again once they are back at the end.
# Gradio's own autoscroll pulls readers down again while an answer is being written.
ON_LOAD = """() => {
    if (innerWidth < 800) document.querySelector('#side .toggle-button')?.click()
    const page = window.chatmill = {sent: null, typed: '', follow: true}
    const panel = () => document.querySelector('#chat .bubble-wrap')
    let last = 0
    document.addEventListener('scroll', event => {
        if (event.target !== panel()) return
        const {scrollTop, scrollHeight, clientHeight} = event.target
        if (scrollHeight - scrollTop - clientHeight < 40) page.follow = true
        else if (scrollTop < last) page.follow = false
        last = scrollTop
    }, true)
    const toEnd = () => { if (page.follow && panel()) panel().scrollTop = panel().scrollHeight }
    new MutationObserver(toEnd).observe(document.body, {childList: true, subtree: true, characterData: true})
    addEventListener('resize', toEnd)
    document.addEventListener('keydown', event => {
        if (event.key === 'Enter' && event.target.matches('#box textarea')) page.sent = event.target.value
    }, true)
    document.addEventListener('click', () => { page.sent = null }, true)
    document.addEventListener('input', event => {
        if (event.isTrusted && event.target.matches('#box textarea')) page.typed = event.target.value
    }, true)
}"""

# The box is emptied here and not by the server, whose answer may come when the next message is being typed. The text
# sent is what the box held when Enter was pressed, as Gradio calls this a little later.
ON_SEND = """(current, ...given) => {
    const box = document.querySelector('#box textarea'), text = window.chatmill.sent ?? current
    box.value = box.value.startsWith(text) ? box.value.slice(text.length) : ''
    box.dispatchEvent(new Event('input', {bubbles: true}))
    Object.assign(window.chatmill, {sent: null, typed: box.value, follow: true})
    return [text, ...given]
}"""

# A message that could not be answered returns to the box and replaces what was typed since: keep both.
AFTER_SEND = """(text) => {
    const typed = window.chatmill.typed
    return typed && !text.includes(typed) ? [text + '\\n' + typed] : []
}"""


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=colors.teal,
        secondary_hue=colors.teal,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_lg,
        spacing_size=sizes.spacing_sm,
        font=SANS,
        font_mono=MONO,
    )


def header_html() -> str:
    return '<div class="brand">Chatmill</div>'


def model_html(model: ModelChoice) -> str:
    parts = [f"<span>{html.escape(part)}</span>" for part in (*model.facts.split(" · "), f"key {model.key}")]
    return f'<div class="facts">{" · ".join(parts)}</div>'


def welcome_html(model: ModelChoice) -> str:
    name = html.escape(model.label)
    return f'<div class="welcome"><h2>What would you like to ask?</h2><p>You are chatting with {name}</p></div>'


def status_html(text: str, busy: bool = False) -> str:
    return f'<div class="status">{html.escape(text) or ("writing …" if busy else "&nbsp;")}</div>'
