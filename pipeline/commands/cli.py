"""The front door: `python flows.py [VERB] [flags] [overrides]`, installed as `chatmill`.

The verb and its own flags are taken off the line; what is left are Hydra overrides. Nothing heavy is imported before it
is needed, so that planning and looking stay fast.
"""

import argparse
import io
import os
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn

from data.trust import printable
from pipeline.artifacts import disk
from pipeline.config.renamed import did_you_mean
from pipeline.errors import FOR_USERS, Guarded, Interrupted, UserError
from pipeline.runner import environment

EXIT_SECONDS = 4.0
USER_ERROR, FAILURE, GUARD, STOPPED = 2, 1, 3, 130

VERBS = {
    "run": "train what the config asks for, from cache where it can (the default; -m sweeps)",
    "plan": "say what would run, why, how long and for how much; changes nothing",
    "why": "explain the key of each stage, or of one: why STAGE",
    "status": "what runs now, and where it is; what is unfinished, and how it goes on",
    "log": "show the log of a stage: log STAGE [-f]",
    "show": "everything known about an artifact: show NAME",
    "ls": "list what the store holds",
    "rm": "remove artifacts by name or key, unfinished work by key: rm NAME...",
    "report": "print the newest report; --open shows it in a browser",
    "verify": "hash every file of the store, or of the artifacts named, against its manifest",
    "gc": "delete damaged artifacts, left-over work and files nothing refers to",
    "accept": "declare the old artifact of a stage equal after a change of code: accept STAGE... --why TEXT",
    "chat": "open the chat app; --prompt TEXT answers once, --cli talks here: chat [MODEL]",
    "verify-resume": "train a stage for a few steps, killed and resumed, and compare: verify-resume STAGE [--steps N]",
    "eval": "measure a model outside a pipeline: eval MODEL 'tasks=[ARC-Easy,core,bpb]' [--out FILE.json]",
    "export": "write a model for other tools: export MODEL [--format hf|nanochat] DIR",
    "bench": "measure this machine and what runs on it: bench [NAME...] [bench.out=FILE.json]",
    "doctor": "check this machine and this installation",
}


def program() -> NoReturn:
    """Run the command line and exit, also where Prefect's threads hang on a server that does not answer."""
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
    """Run one command; returns the exit code: 0 fine, 1 a failure, 2 a user's mistake, 3 a guard, 130 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that does not know a character ends no run
    try:
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # modules of the user's own lie where the command is given
        environment.prepare_proxies()
        return _dispatch(arguments)
    except Guarded as error:
        return _complain(str(error), GUARD)
    except (Interrupted, KeyboardInterrupt) as error:
        return _complain(f"stopped. {error}\nThe same command goes on from there.".replace(". \n", ".\n"), STOPPED)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return 0  # rich has seen it first
        raise
    except OSError as error:
        return _complain(disk.told(error), FAILURE)
    except FOR_USERS as error:  # others are mistakes of ours: their traceback is what helps
        return _complain(str(error), USER_ERROR if error.cause == "config" else FAILURE)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] and arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(f"{argument!a} is not UTF-8", fix="Set LC_ALL=C.UTF-8, or name it in other letters.")
    verb, place = "run", next((i for i, argument in enumerate(arguments) if "=" not in argument), len(arguments))
    if place < len(arguments) and not arguments[place].startswith(("-", "~", "+")):  # settings may come before it
        verb = arguments.pop(place)
        if verb not in VERBS:
            fix = did_you_mean(verb, VERBS, "`python flows.py help` lists the verbs.")
            raise UserError(f"there is no verb {verb!r}", fix=fix)
    from pipeline.commands import verbs

    return int(verbs.run_verb(verb, arguments))


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one line, exit code 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Let a flag take what follows it even if that begins with a dash, as in --prompt "-5+3?"."""
        flags = {text: action for action in self._actions for text in action.option_strings}
        given, joined = list(args or []), []
        while given:
            argument = given.pop(0)
            takes = argument in flags and flags[argument].nargs is None
            if takes and given and given[0].startswith("-") and given[0] not in flags:
                argument = f"{argument}={given.pop(0)}"
            joined.append(argument)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, self.prog)


def _complain(text: str, code: int) -> int:
    with suppress(OSError):  # a terminal that has hung up
        print(printable(text), file=sys.stderr, flush=True)
    return code


def _help() -> str:
    lines = [f"  {name:<13} {text}" for name, text in VERBS.items()]
    return (
        "usage: python flows.py [VERB] [NAME=VALUE ...]     (installed as: chatmill)\n\n"
        + "\n".join(lines)
        + "\n\nSettings: recipe=tiny|d12|d20|d26|d32, data=..., mixture=..., STAGE.params.NAME=VALUE, STAGE.pin=KEY,"
        + "\n  until=STAGE, only=[...], force=[...], run.name=NAME, launch.NAME=VALUE; plan --config prints them all."
    )


if __name__ == "__main__":
    program()
