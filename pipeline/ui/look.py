"""How the chat app looks: system fonts only, so that nothing is fetched from outside, and small pieces of HTML."""

import html

import gradio as gr
from gradio.themes.utils import colors, sizes

from pipeline.ui.models import ModelChoice

SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

# The second viewport is the one that counts: the page shrinks for a phone's keyboard.
HEAD = """<meta name="robots" content="noindex">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">"""

CSS = """
/* The page is as high as the window. Of what is in it, the conversation scrolls, and the box stays below it. */
html { height: 100dvh; min-height: 0 !important; overflow: hidden; overscroll-behavior: none; }
body, gradio-app, .gradio-container, .gradio-container .main, .gradio-container .wrap.sidebar-parent,
.gradio-container .contain, .gradio-container .contain > .column, #talk { min-height: 0 !important; }
.gradio-container .main { padding: 12px 20px 4px; }
#chat { flex: 1 1 0 !important; height: auto !important; min-height: 0; overflow: hidden !important; }
#chat .wrapper { min-height: 0; }
#chat .bubble-wrap { flex: 1 1 0; min-height: 0; overscroll-behavior: contain; }
#chat .bubble-wrap { scrollbar-width: thin; scrollbar-color: var(--border-color-primary) transparent; }
#talk > .form, #status { flex: none; }
#side .sidebar-content { overflow-y: auto; }
@media (max-width: 640px) {
  .gradio-container .main { padding: 8px 12px 2px; }
  #box textarea { font-size: 16px; }
}
/* What a model writes stays within its message, and wide words and pictures within its width. */
#chat .message { contain: paint; overflow-wrap: anywhere; }
#chat .message :is(img, video, svg) { max-width: 100%; }
footer { display: none !important; }
.gradio-container { max-width: none !important; }
#talk { max-width: 820px; margin: 0 auto; width: 100%; gap: 6px; }
#chat { border-style: none !important; background: transparent; }
#chat .bubble-wrap { background: transparent; }
#chat .placeholder-content { justify-content: safe center; min-height: 100%; }
#chat .placeholder { flex-grow: 0; height: auto; }
#chat .examples { display: grid; flex: 0 0 auto; height: auto; width: 100%; max-width: 540px; margin: 0 auto; }
#chat .examples { grid-template-columns: repeat(auto-fit, minmax(min(220px, 100%), 1fr)); }
#chat .example { padding: 12px 14px; }
#chat .user.message { background: color-mix(in srgb, var(--secondary-100) 70%, white); border-color: transparent; }
.dark #chat .user.message { background: var(--secondary-900); }
#chat .bot.message { background: transparent; border-color: transparent; box-shadow: none; padding-left: 0; }
#chat .bot.message > .message { padding-left: 0; }
#chat .thought-group { margin: 6px 0; border-radius: 10px; }
#chat .thought-group .title code { font-size: 0.95em; }
#talk .form { background: transparent; border: none; box-shadow: none; overflow: visible; }
#box { border: 1px solid var(--border-color-primary) !important; border-radius: 24px !important; }
#box { padding: 8px 8px 8px 12px; box-shadow: 0 1px 8px rgb(0 0 0 / 8%) !important; }
#box textarea { background: transparent; }
#box .submit-button, #box .stop-button { background: var(--primary-600); color: white; }
#model input { text-overflow: ellipsis; }
.brand { font-size: 1.3rem; font-weight: 650; letter-spacing: -0.01em; }
.facts, .status { color: var(--body-text-color-subdued); font-size: 0.8rem; line-height: 1.5; }
.facts { padding: 0 2px; }
.facts span { white-space: nowrap; color: inherit; }
.status { min-height: 1.2rem; text-align: center; padding-bottom: 4px; }
.welcome { text-align: center; }
.welcome h2 { font-size: 1.5rem; font-weight: 600; margin: 0 0 4px; }
.welcome p { color: var(--body-text-color-subdued); margin: 0 0 14px; }
"""


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
    return f'<div class="welcome"><h2>What would you like to ask?</h2><p>You talk to {name}</p></div>'


def status_html(text: str, busy: bool = False) -> str:
    return f'<div class="status">{html.escape(text) or ("writing …" if busy else "&nbsp;")}</div>'
