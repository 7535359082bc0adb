"""Chat on the terminal: one answer to one prompt, or a conversation."""

import dataclasses
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from data.trust import printable
from pipeline.errors import UserError
from pipeline.ui.chat import ChatSession, ChatSettings, Draft, End, Message, Text, ToolCall, ToolOutput

HELP = """\
/system TEXT   set the system prompt and start again (without TEXT: remove it)
/temp NUMBER   temperature: 0 always gives the same answer, 1 varies
/retry         answer the last message again
/reset         forget the conversation
/quit          leave (so does Ctrl-D)
Ctrl-C stops an answer."""


def answer_once(
    session: ChatSession, prompt: str, settings: ChatSettings, system: str = "", out: TextIO | None = None
) -> int:
    """Write the answer to `out` (stdout) as it arrives, and nothing else. Returns the exit code: 130 after Ctrl-C."""
    out = out or sys.stdout
    messages = [*_system(system), {"role": "user", "content": prompt}]
    code = 0
    try:
        for event in session.reply(messages, settings):
            if isinstance(event, Text):
                out.write(printable(event.text))
                out.flush()
            elif isinstance(event, End) and event.reason == "length":
                print(f"\n({event.describe()})", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    out.write("\n")
    out.flush()
    return code


def talk(
    session: ChatSession,
    settings: ChatSettings,
    system: str = "",
    title: str = "",
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
) -> int:
    """Chat until Ctrl-D or /quit; returns the exit code. `read` reads a line, or raises EOFError at the end."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() arrow keys and history
    _Talk(session, settings, system, out or sys.stdout).run(title, read)
    return 0


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


class _Talk:
    def __init__(self, session: ChatSession, settings: ChatSettings, system: str, out: TextIO):
        self.session, self.settings, self.system, self.out = session, settings, system, out
        self.history: list[Message] = []
        self.color = out.isatty()

    def run(self, title: str, read: Callable[[str], str]) -> None:
        self._note(f"{title}  /help shows commands." if title else "/help shows commands.")
        while True:
            try:
                line = read("\n> ").strip()
            except EOFError:
                self.out.write("\n")
                return
            except KeyboardInterrupt:
                self._note("\nCtrl-D leaves.")
                continue
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line:
                self.history.append({"role": "user", "content": line})
                self._answer()

    def _answer(self) -> None:
        """Answer the last message. The beginning of a stopped answer stays."""
        draft = Draft()
        events = self.session.reply([*_system(self.system), *self.history], self.settings)
        try:
            for event in events:
                draft.add(event)
                if isinstance(event, Text):
                    self._write(printable(event.text))
                elif isinstance(event, ToolCall):
                    self._dim(f"[{event.text}")
                elif isinstance(event, ToolOutput):
                    self._dim(f" = {event.text}] ")
        except KeyboardInterrupt:
            self._dim(" (stopped)")
        except UserError as error:
            self.history.pop()
            self._note(str(error))
            return
        self.history.append(draft.message)
        self._write("\n")
        if draft.end:
            self._note(draft.end.describe())

    def _obey(self, line: str) -> bool:
        """Carry out a command; False to leave."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit", "/q"):
            return False
        if command == "/reset":
            self.history = []
            self._note("new conversation")
        elif command == "/system":
            self.system, self.history = rest, []
            self._note(f"new conversation, {'with this' if rest else 'without a'} system prompt")
        elif command == "/temp":
            self._set_temperature(rest)
        elif command == "/retry" and self.history:
            if self.history[-1]["role"] == "assistant":
                self.history.pop()
            self._answer()
        elif command == "/help":
            self._note(HELP)
        else:
            self._note(f"There is no command {command}. /help shows the commands.")
        return True

    def _set_temperature(self, text: str) -> None:
        try:
            changed = dataclasses.replace(self.settings, temperature=float(text))
            changed.check()
        except (ValueError, UserError):
            self._note(f"The temperature is {self.settings.temperature:g}. Set it from 0 to 10, for example /temp 0.8.")
            return
        self.settings = changed
        self._note(f"temperature {changed.temperature:g}")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _dim(self, text: str) -> None:
        shown = printable(text)
        self._write(f"\x1b[2m{shown}\x1b[0m" if self.color else shown)

    def _note(self, text: str) -> None:
        self._dim(text + "\n")
