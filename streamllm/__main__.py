"""`python -m streamllm COMMAND`: every file in `commands/` is one."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from .environment import HELP, read_env_file
from .errors import UsageError
from .terminal.arguments import check_values


def main() -> int:
    try:
        read_env_file()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        prog="python -m streamllm",
        description="StreamingLLM on any rotary language model.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for path in sorted((Path(__file__).parent / "commands").glob("[a-z]*.py")):
        command = import_module(f".commands.{path.stem}", __package__)
        subparser = commands.add_parser(
            path.stem,
            help=command.HELP,
            description=command.HELP,
            epilog=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args()
    try:
        check_values(arguments)
        return int(arguments.run(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
