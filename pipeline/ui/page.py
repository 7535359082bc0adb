"""The page of the chat app: its components, and what happens when something is pressed.

The conversation is kept apart from its display (shown and position, at the end of this file), so that editing, retrying
and undoing work on messages rather than on what a browser shows of them.
"""

import html
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import gradio as gr
from gradio.components.chatbot import ExampleMessage

from data.errors import DataError
from model.errors import ModelError
from pipeline.errors import UserError
from pipeline.ui.chat import ChatSettings, Draft, Message
from pipeline.ui.look import AFTER_SEND, ON_LOAD, ON_SEND, header_html, model_html, status_html, welcome_html
from pipeline.ui.models import ModelChoice, Sessions

MAX_TOKENS = 2048  # end of the slider


class Page:
    """The components of one page and their handlers.

    Handlers that answer are generators of (conversation, chatbot, box, status).
    """

    def __init__(self, sessions: Sessions):
        self.sessions = sessions
        self.stopping: set[str] = set()  # browser sessions whose answer is to end
        self.answering: dict[str, object] = {}  # the answer that each of them waits for; an older one is not shown
        with gr.Blocks(title="Chatmill", analytics_enabled=False, fill_height=True) as self.blocks:
            self._lay_out()
            self._connect()

    # --- components

    def _lay_out(self) -> None:
        first = self.sessions.models[0]
        self.conversation = gr.State([])
        with gr.Sidebar(width=320, elem_id="side"):
            gr.HTML(header_html())
            self.new = gr.Button("New chat", elem_id="new-chat", size="md")
            names = [(m.label, m.key) for m in self.sessions.models]
            self.model = gr.Dropdown(names, value=first.key, label="Model", filterable=len(names) > 8, elem_id="model")
            self.facts = gr.HTML(model_html(first), padding=False)
            self.system = gr.Textbox(label="System prompt", placeholder="None", lines=2, max_lines=8)
            self._lay_out_settings()
        with gr.Column(elem_id="talk"):
            self.chatbot = gr.Chatbot(  # without autoscroll: see look.py
                show_label=False, elem_id="chat", scale=1, height="100%", autoscroll=False, layout="bubble",
                editable="user", buttons=["copy"], latex_delimiters=[], examples=_examples(first.prompts),
                placeholder=welcome_html(first),
            )  # fmt: skip
            self.box = gr.Textbox(
                placeholder="Ask something", show_label=False, autofocus=True, lines=1, max_lines=8, submit_btn=True,
                elem_id="box",
            )  # fmt: skip
            self.status = gr.HTML(status_html(""), elem_id="status", padding=False)

    def _lay_out_settings(self) -> None:
        usual = ChatSettings()
        self.settings = [
            gr.Slider(0, 2, usual.temperature, step=0.05, label="Temperature"),
            gr.Slider(0, 200, usual.top_k, step=1, label="Top-k (0: all)"),
            gr.Slider(0.05, 1, usual.top_p, step=0.05, label="Top-p"),
            gr.Slider(1, MAX_TOKENS, usual.max_tokens, step=1, label="Max tokens"),
            gr.Textbox(label="Seed", placeholder="Another answer each time", max_lines=1),
        ]

    # --- events

    def _connect(self) -> None:
        shown = [self.conversation, self.chatbot, self.box, self.status]
        given = [self.conversation, self.model, self.system, *self.settings]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        sent = self.box.submit(self.send, [self.box, *given], shown, js=ON_SEND, **quiet)
        sent.then(None, [self.box], [self.box], js=AFTER_SEND)
        answers: list[Any] = [  # Gradio declares them as dictionaries
            sent,
            self.chatbot.example_select(self.send_example, given, shown, **quiet),
            self.chatbot.retry(self.retry, given, shown, **quiet),
            self.chatbot.edit(self.edit, given, shown, **quiet),
        ]
        # Answers are cancelled, or a piece that is still on its way would restore the old conversation.
        self.chatbot.undo(self.undo, [self.conversation], shown, cancels=answers, **quiet)
        gr.on([self.chatbot.clear, self.new.click], self.clear, None, shown, cancels=answers, **quiet)
        self.box.stop(self.stop, None, None, concurrency_limit=None, **quiet)
        self.model.change(self.choose, [self.model], [self.facts, self.chatbot, self.status], **quiet)
        self.blocks.load(None, None, None, js=ON_LOAD)
        self.blocks.unload(self.leave)

    def send(self, request: gr.Request, text: str, conversation: list[Message], *given: Any) -> Iterator[Any]:
        if not text.strip():
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        yield from self._answer(request, [*conversation, _user(text)], given)

    def send_example(
        self, request: gr.Request, chosen: gr.SelectData, conversation: list[Message], *given: Any
    ) -> Iterator[Any]:
        yield from self._answer(request, [*conversation, _user(chosen.value["text"])], given)

    def retry(
        self, request: gr.Request, event: gr.RetryData, conversation: list[Message], *given: Any
    ) -> Iterator[Any]:
        """Generate an answer again; what followed it is dropped."""
        kept = conversation[: position(conversation, _index(event)) + 1]
        if kept and kept[-1]["role"] == "assistant":
            kept = kept[:-1]
        yield from self._answer(request, kept, given)

    def edit(self, request: gr.Request, event: gr.EditData, conversation: list[Message], *given: Any) -> Iterator[Any]:
        """Answer a changed message; what followed it is dropped."""
        kept = conversation[: position(conversation, _index(event))]
        yield from self._answer(request, [*kept, _user(str(event.value))], given)

    def undo(self, request: gr.Request, event: gr.UndoData, conversation: list[Message]) -> tuple[Any, ...]:
        """Return a message to the box and drop what followed it."""
        at = position(conversation, _index(event))
        text = conversation[at]["content"] if at < len(conversation) else ""
        return self._quiet(request, conversation[:at], text)

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        return self._quiet(request, [], "")

    def _quiet(self, request: gr.Request, kept: list[Message], text: str) -> tuple[Any, ...]:
        """The outputs for a conversation without an answer in progress, and the content of the box."""
        self.answering.pop(str(request.session_hash), None)
        return kept, shown(kept), gr.update(value=text, submit_btn=True, stop_btn=False), status_html("")

    def stop(self, request: gr.Request) -> None:
        self.stopping.add(str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        """Stop the answer that a closed page was waiting for."""
        self.answering.pop(str(request.session_hash), None)

    def choose(self, key: str) -> tuple[Any, ...]:
        """Load a model when it is chosen, rather than at its first question."""
        chosen = self.sessions.choice(key)
        try:
            self.sessions.get(key)
        except (UserError, ModelError, DataError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        return model_html(chosen), _greeting(chosen), status_html("")

    def _answer(self, request: gr.Request, conversation: list[Message], given: tuple[Any, ...]) -> Iterator[Any]:
        """Stream the answer to the last message. If it is stopped or fails, what was generated so far stays."""
        key, system, *values = given
        who, this = str(request.session_hash), object()
        self.answering[who] = this
        self.stopping.discard(who)

        def wanted() -> bool:
            return self.answering.get(who) is this

        box = gr.update(submit_btn=False, stop_btn=True)
        yield conversation, shown(conversation), box, status_html("", busy=True)
        draft = Draft()
        try:
            prompt = [{"role": "system", "content": system}] if system.strip() else []
            session = self.sessions.get(key)
            stop = lambda: who in self.stopping or not wanted()  # noqa: E731
            events = session.reply([*prompt, *conversation], _settings(values), stop)
            with closing(events):  # the tab may be closed in the middle
                for event in events:
                    if not wanted():
                        break
                    draft.add(event)
                    grown = [*conversation, draft.message]
                    yield grown, shown(grown, pending=True), gr.skip(), gr.skip()
        except (UserError, ModelError, DataError) as error:
            gr.Warning(str(error))
        finally:
            last = wanted()
            if last:
                del self.answering[who]
                self.stopping.discard(who)
        if not last:
            return
        box = gr.update(submit_btn=True, stop_btn=False)
        if draft.parts or draft.end:
            whole = [*conversation, draft.message]
        else:  # a message without an answer returns to the box: a conversation cannot continue after it
            whole = conversation[:-1]
            box["value"] = conversation[-1]["content"] if conversation else ""
        note = draft.end.describe() if draft.end else ""
        yield whole, shown(whole), box, status_html(note)


def build_page(sessions: Sessions) -> gr.Blocks:
    """The page, not yet served."""
    return Page(sessions).blocks


def _settings(values: list[Any]) -> ChatSettings:
    """Raises UserError for a seed that is not a whole number, and for an empty field."""
    if None in values:
        raise UserError("a number is missing", "settings", "Fill in every field in the sidebar.")
    temperature, top_k, top_p, max_tokens, seed = values
    try:
        number = int(seed) if seed.strip() else None
    except ValueError:
        raise UserError(f"{seed!r} is not a whole number", "Seed") from None
    return ChatSettings(temperature, int(top_k), top_p, int(max_tokens), number)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _index(event: Any) -> int:
    """The position of an event in the list of shown entries."""
    return event.index[0] if isinstance(event.index, (list, tuple)) else event.index


def _greeting(model: ModelChoice) -> Any:
    return gr.update(examples=_examples(model.prompts), placeholder=welcome_html(model))


def _examples(prompts: tuple[str, ...]) -> list[ExampleMessage]:
    return [{"text": prompt, "display_text": prompt} for prompt in prompts]


# --- display of a conversation


def shown(conversation: Sequence[Message], pending: bool = False) -> list[dict[str, Any]]:
    """The conversation as entries of gradio.Chatbot; each tool call is an entry of its own that unfolds.

    pending: the last answer is still being generated.
    """
    return [entry for _, entry in _entries(conversation, pending)]


def position(conversation: Sequence[Message], index: int) -> int:
    """The index of the message that the shown entry `index` belongs to."""
    owners = [owner for owner, _ in _entries(conversation, pending=False)]
    return owners[max(0, min(index, len(owners) - 1))] if owners else 0


def _entries(conversation: Sequence[Message], pending: bool) -> list[tuple[int, dict[str, Any]]]:
    entries = []
    for i, message in enumerate(conversation):
        open_end = pending and i == len(conversation) - 1
        if isinstance(message["content"], str):
            entries.append((i, _entry(message["role"], message["content"])))
        else:
            entries += [(i, entry) for entry in _answer(message["content"], open_end)]
    return entries


def _answer(parts: Sequence[dict[str, str]], pending: bool) -> list[dict[str, Any]]:
    """One entry for each run of text, and one for each call with its result."""
    entries: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        if part["type"] == "text":
            if part["text"].strip():
                entries.append(_entry("assistant", part["text"]))
        elif part["type"] == "python":
            result = parts[i + 1]["text"] if i + 1 < len(parts) and parts[i + 1]["type"] == "python_output" else None
            entries.append(_tool(part["text"], result, pending and result is None))
    return entries or [_entry("assistant", "")]


def _tool(call: str, result: str | None, pending: bool) -> dict[str, Any]:
    outcome = f" = {result}" if result is not None else "" if pending else " (no result)"
    body = f"<pre>{html.escape(call)}</pre>" + (f"<pre>{html.escape(result)}</pre>" if result is not None else "")
    title = f"Calculator: `{(call + outcome).replace('`', chr(39))}`"  # titles are Markdown
    return _entry("assistant", body) | {"metadata": {"title": title, "status": "pending" if pending else "done"}}


def _entry(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
