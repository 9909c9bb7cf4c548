"""`streamllm COMMAND`, also `python -m streamllm COMMAND`: every file in `commands/` is one, and the sweep's and the
dashboards' commands are."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from . import __version__
from .environment import HELP, read_env_file
from .terminal.arguments import check_values
from .terminal.parser import CommandParser
from .terminal.program import COMMANDS, command, program


def script() -> int:
    """What the installed `streamllm` calls."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # what lies in the working directory is no module of ours
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else [*argv]
    if arguments and arguments[0] in COMMANDS:
        module, _ = COMMANDS[arguments[0]]
        return int(import_module(module).main(arguments[1:]))
    return _run(arguments)


@command
def _run(argv: Sequence[str] | None) -> int:
    read_env_file()
    parser = CommandParser(
        prog=program("streamllm"),
        description="StreamingLLM on any rotary language model.",
        epilog=HELP,
    )
    parser.add_argument("--version", action="version", version=f"streamllm-sweep {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for path in sorted((Path(__file__).parent / "commands").glob("[a-z]*.py")):
        module = import_module(f".commands.{path.stem}", __package__)
        subparser = commands.add_parser(
            path.stem,
            help=module.HELP,
            description=module.HELP,
            epilog=module.__doc__,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    for name, (_, about) in COMMANDS.items():
        commands.add_parser(name, help=about)
    arguments = parser.parse_args(argv)
    check_values(arguments)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
