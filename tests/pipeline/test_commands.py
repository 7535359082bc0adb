"""The table of commands: help, names and what is wrong with a command line."""

import pytest

from pipeline.commands.cli import COMMANDS, main


def test_the_help_names_each_command_and_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2 : 2 + len(COMMANDS)]] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])

    assert ended.value.code == 0
    assert f"usage: python flows.py {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["grpah"], "there is no command 'grpah'. Did you mean graph?"),
        (["plan", "sft"], "plan: unrecognised argument 'sft'. Run `python flows.py plan --help`"),
        (["ls", "--long"], "ls: unrecognised argument '--long'"),
        (["show"], "show: needs NAME."),
        (["show", "a", "b"], "show: unrecognised argument 'b'"),
        (["accept", "sft"], "the following arguments are required: --why"),
        (["verify-resume", "sft", "--steps", "9"], "--steps: is 9. It must be at least 10."),
    ],
)
def test_a_wrong_command_line_is_a_mistake_of_the_users(
    line: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == 2
    assert said in capsys.readouterr().err
