import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from echo_model import ByteTokenizer

from pipeline.ui.chat import ChatSession, ChatSettings, End, Text, ToolCall, ToolOutput
from pipeline.ui.terminal import answer_once, talk

ROOT = Path(__file__).resolve().parents[3]


def lines(*texts):
    waiting = list(texts)

    def read(prompt):
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return read


def converse(session, *texts):
    out = io.StringIO()
    talk(session, ChatSettings(), title="tiny", read=lines(*texts), out=out)
    return out.getvalue()


def test_one_answer_is_all_that_goes_to_stdout(session, capsys):
    assert answer_once(session, "3+4", ChatSettings()) == 0

    captured = capsys.readouterr()
    assert captured.out == "It is 7.\n"
    assert captured.err == ""


def test_a_conversation_remembers_and_shows_tool_calls(session, model):
    said = converse(session, "hello", "3+4")

    assert "You said: hello" in said and "It is [3+4 = 7] 7." in said
    assert session._tokenizer.decode(model.prompts[1]).startswith("helloYou said: hello")


def test_reset_and_system_begin_a_new_conversation(session, model):
    converse(session, "hello", "/reset", "again", "/system Be brief.", "once more")

    assert [session._tokenizer.decode(p) for p in model.prompts] == ["hello", "again", "Be brief.\n\nonce more"]


def test_retry_answers_the_last_message_again(session, model):
    converse(session, "hello", "/retry")

    assert model.prompts[0] == model.prompts[1]


def test_temperature_is_set_and_nonsense_is_not(session, model):
    said = converse(session, "/temp 0", "a", "/temp hot", "b", "/temp -3", "c")

    assert [s.temperature for s in model.settings] == [0.0, 0.0, 0.0]
    assert said.count("for example /temp 0.8") == 2


@pytest.mark.parametrize("command", ["/help", "/nonsense", "/retry"])
def test_a_command_never_reaches_the_model(session, model, command):
    said = converse(session, command)

    assert model.prompts == []
    assert "/help" in said or "/system" in said


def test_a_message_that_is_too_long_is_forgotten(session, model):
    said = converse(session, "x" * 500, "short")

    assert "Shorten it." in said
    assert session._tokenizer.decode(model.prompts[0]) == "short"


def test_quit_and_end_of_input_leave(session, model):
    converse(session, "/quit", "never read")

    assert model.prompts == []


ENDLESS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
sys.path[:0] = [{root!r}, {here!r}]
from echo_model import ByteTokenizer, EchoModel
from pipeline.ui.chat import ChatSession, ChatSettings
from pipeline.ui.terminal import answer_once, talk
session = ChatSession(EchoModel(), ByteTokenizer(), 400)
{call}
"""


def start(call, **options):
    code = ENDLESS.format(root=str(ROOT), here=str(Path(__file__).parent), call=call)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], bufsize=0, **pipes)


def read_until(process, wanted):
    seen = b""
    while not seen.endswith(wanted):
        character = process.stdout.read(1)
        assert character, f"ended after {seen[-100:]!r}"
        seen += character


def test_ctrl_c_stops_the_answer_and_not_the_conversation():
    process = start("talk(session, ChatSettings())")
    process.stdin.write(b"talk forever\n")
    process.stdin.flush()
    read_until(process, b"on and on")
    process.send_signal(signal.SIGINT)
    read_until(process, b"(stopped)")
    out, err = process.communicate(b"3+4\n", timeout=20)

    assert b"It is [3+4 = 7] 7." in out
    assert process.returncode == 0 and err == b""


def test_ctrl_c_ends_a_single_answer_with_exit_code_130():
    process = start("sys.exit(answer_once(session, 'forever', ChatSettings()))")
    read_until(process, b"on and on")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)

    assert process.returncode == 130 and err == b""


class Painter:
    """Writes what a terminal would obey, a sequence in two pieces included."""

    def __call__(self, prompt, settings, should_stop):
        yield from (Text("red\x1b"), Text("[31m \x9b2J\x07"), ToolCall("\x1b]0;t\x07"), ToolOutput("\x1b[5m"))
        yield End("end", 4, 0.1)


def test_a_model_cannot_steer_the_terminal(capsys):
    session = ChatSession(Painter(), ByteTokenizer(), 400)
    answer_once(session, "hi", ChatSettings())
    assert capsys.readouterr().out == "red␛[31m \ufffd2J␇\n"

    out = io.StringIO()
    out.isatty = lambda: True
    talk(session, ChatSettings(), title="a\x1b[5m", read=lines("hi", "\x1b[5m"), out=out)
    said = out.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "")  # our own
    assert not {"\x1b", "\x07", "\x9b"} & set(said)
