"""`python -m pipeline.bench [NAME...] [--out FILE] [NAME=VALUE ...]`: works where Hydra and Prefect are missing."""

import argparse
import sys

from pipeline.bench import command
from pipeline.bench.registry import MEASUREMENTS
from pipeline.errors import FOR_USERS


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench", description=__doc__)
    parser.add_argument("words", nargs="*", help=f"measurements ({', '.join(MEASUREMENTS)}) and settings NAME=VALUE")
    parser.add_argument("--out", help="the same as bench.out=FILE")
    flags = parser.parse_args(argv)
    names = [word for word in flags.words if "=" not in word]
    settings = [word for word in flags.words if "=" in word] + ([f"bench.out={flags.out}"] if flags.out else [])
    try:
        return command.run(names, settings)
    except FOR_USERS as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
