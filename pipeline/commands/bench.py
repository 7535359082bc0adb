"""`bench`: measures this machine and what runs on it. The measurements are in pipeline/bench."""

from pipeline.commands.parser import Parser


def bench(arguments: list[str]) -> int:
    from pipeline.bench import command

    flags = Parser("bench", "[NAME...]", most=None).parse(arguments)
    return command.run(flags.names, flags.overrides)
