"""The parser of a command: options by argparse, then names, and settings for Hydra anywhere between them."""

import argparse
from typing import Any, NoReturn

from pipeline.commands.cli import COMMANDS
from pipeline.config.quoting import quote
from pipeline.errors import UserError
from pipeline.runner import machine
from pipeline.runner.environment import user_path


class Parser(argparse.ArgumentParser):
    """names: how the help shows the names that the command takes, `least` to `most` of them (None: any number).

    Errors are one line, with exit code 2.
    """

    def __init__(self, command: str, names: str = "", least: int = 0, most: int | None = 0):
        prog, description = f"python flows.py {command}", COMMANDS[command][1]
        usage = " ".join(filter(None, [prog, names, "[options] [SETTING=VALUE ...]"]))
        settings = "`python flows.py plan --config` shows all settings."
        super().__init__(prog=prog, usage=usage, description=description, epilog=settings)
        self.command, self.names, self.least, self.most = command, names, least, most
        self.add_argument(
            "--config-dir", metavar="DIR", help="also find recipes and the like there: DIR/recipe/NAME.yaml"
        )

    def flag(self, *words: str, help: str) -> None:
        self.add_argument(*words, action="store_true", help=help)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """The options, and: names, given (settings on the line), overrides (settings that fit this machine, and given).

        Raises UserError for an unknown option, and for too many or too few names.
        """
        flags, rest = self.parse_known_args(arguments)
        if flags.config_dir:
            rest.insert(0, f"hydra.searchpath=[{quote(str(user_path(flags.config_dir).absolute()))}]")
        flags.given = [a for a in rest if "=" in a or (a.startswith(("~", "+")) and not a.startswith("~/"))]
        flags.names = [a for a in rest if a not in flags.given]
        fix = f"Run `{self.prog} --help` to see what it takes."
        most = len(flags.names) if self.most is None else self.most
        if unknown := [name for name in flags.names if name.startswith("-")] or flags.names[most:]:
            raise UserError(f"unrecognised argument {unknown[0]!r}", self.command, fix)
        if len(flags.names) < self.least:
            raise UserError(f"needs {self.names}", self.command, fix)
        flags.overrides = [*machine.launch_overrides(flags.given), *flags.given]
        return flags

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Let an option take the next argument even if that begins with a dash, as in --prompt "-5+3?"."""
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
