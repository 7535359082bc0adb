"""The command line: `python flows.py [COMMAND] [options] [SETTING=VALUE ...]`, installed as `chatmill`.

A command is a function in a module of this folder. It is imported when it is asked for, so that planning and looking
stay fast.
"""

import importlib
import io
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from data.errors import did_you_mean
from data.trust import printable
from pipeline.artifacts import disk
from pipeline.errors import FOR_USERS, Guarded, Interrupted, UserError
from pipeline.runner import environment

EXIT_SECONDS = 4.0
USER_ERROR, FAILURE, GUARD, STOPPED = 2, 1, 3, 130

# Command: (its module in this folder and the function in it, what it does)
COMMANDS = {
    "run": ("run.run", "train what the config describes, reusing artifacts (the default)"),
    "plan": ("plan.plan", "show what would run, why, and its time and cost; changes nothing"),
    "graph": ("graph.graph", "draw the stages, what each reads and its state; --mermaid"),
    "why": ("plan.why", "explain the key of each stage, or of one: why [STAGE]"),
    "accept": ("plan.accept", "keep artifacts despite changed code: accept STAGE... --why TEXT"),
    "status": ("status.status", "show running and unfinished work, and how to continue it"),
    "log": ("status.log", "print the log of a stage: log STAGE [-f]"),
    "report": ("status.report", "print the newest report; --open shows it in a browser"),
    "ls": ("store.ls", "list artifacts, newest first: ls [STAGE...]"),
    "show": ("store.show", "print everything known about an artifact: show NAME"),
    "rm": ("store.rm", "delete artifacts, or unfinished work by its key: rm NAME..."),
    "verify": ("store.verify", "hash stored files against their manifests: verify [NAME...]"),
    "gc": ("store.gc", "delete damaged artifacts, leftover work and unused files"),
    "chat": ("chat.chat", "open the chat app; --prompt TEXT answers once, --cli chats here"),
    "eval": ("evaluate.evaluate", "evaluate any model: eval MODEL 'tasks=[ARC-Easy,core,bpb]'"),
    "export": ("export.export", "write a model for other tools: export MODEL DIR"),
    "verify-resume": ("verify_resume.verify_resume", "kill and resume a training, and compare the bits"),
    "bench": ("bench.bench", "measure this machine and what runs on it: bench [NAME...]"),
    "doctor": ("doctor.doctor", "check this machine and this installation"),
    "completion": ("completion.completion", "print a script that completes command lines in bash"),
}

SETTINGS = """\
Settings: recipe=tiny|d12|d20|d26|d32, data=..., mixture=..., run.name=NAME,
  STAGE.params.NAME=VALUE, STAGE.pin=KEY, launch.NAME=VALUE, until=STAGE,
  only=[STAGE,...], force=[STAGE,...]. `plan --config` prints all of them and
  what they mean, `--cfg job` as plain YAML. --config-dir DIR adds recipes.
`python flows.py COMMAND --help` shows the options of a command."""


def program() -> NoReturn:
    """Run the command line and exit, also where Prefect's threads hang on a server that does not answer."""
    # Processes that multiprocessing starts import the file of __main__ again: flows.py, and with it Prefect.
    vars(sys.modules["__main__"]).pop("__file__", None)
    code = FAILURE
    try:
        code = main()
    finally:
        if "prefect" in sys.modules:  # its services send what is left before Python ends
            end = threading.Timer(EXIT_SECONDS, os._exit, [code])
            end.daemon = True
            end.start()
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 success, 1 failure, 2 user error, 3 guard, 130 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end a run
    try:
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # for modules of the user's own
        environment.prepare_proxies()
        if arguments[:1] and arguments[0] in ("-h", "--help", "help"):
            print(_help())
            return 0
        return carry_out(*split(arguments))
    except Guarded as error:
        return _complain(str(error), GUARD)
    except (Interrupted, KeyboardInterrupt) as error:
        stopped = f"stopped. {error}\nRun the same command to continue from there."
        return _complain(stopped.replace(". \n", ".\n"), STOPPED)
    except BrokenPipeError:  # the reader of a pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return 0  # rich noticed it first
        raise
    except OSError as error:
        return _complain(disk.told(error), FAILURE)
    except FOR_USERS as error:  # others are bugs, which need their traceback
        return _complain(str(error), USER_ERROR if error.cause == "config" else FAILURE)


def split(arguments: list[str]) -> tuple[str, list[str]]:
    """The command and the rest of the line. Settings may precede the command; without one it is `run`."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(f"{argument!a} is not UTF-8", fix="Set LC_ALL=C.UTF-8, or use other characters.")
    place = next((i for i, argument in enumerate(arguments) if "=" not in argument), len(arguments))
    if place == len(arguments) or arguments[place].startswith(("-", "~", "+")):
        return "run", arguments
    command = arguments[place]
    if command not in COMMANDS:
        fix = did_you_mean(command, COMMANDS, "Run `python flows.py help` to list the commands.")
        raise UserError(f"there is no command {command!r}", fix=fix)
    return command, arguments[:place] + arguments[place + 1 :]


def carry_out(command: str, arguments: list[str]) -> int:
    module, _, function = COMMANDS[command][0].partition(".")
    return int(getattr(importlib.import_module(f"pipeline.commands.{module}"), function)(arguments))


def _complain(text: str, code: int) -> int:
    with suppress(OSError):  # a terminal that has hung up
        print(printable(text), file=sys.stderr, flush=True)
    return code


def _help() -> str:
    usage = "usage: python flows.py [COMMAND] [SETTING=VALUE ...]   (installed as: chatmill)"
    return "\n".join([usage, "", *(f"  {name:<13} {what}" for name, (_, what) in COMMANDS.items()), "", SETTINGS])


if __name__ == "__main__":
    program()
