"""`python -m dashboards.deploy STUDY --as llama.cpp`: the recommended trial as what runs elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from streamllm.errors import UsageError, shown
from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.printing import say
from streamllm.terminal.program import command, program

from .deployment import TARGETS, Trial
from .loading import load
from .recommendation import recommended
from .tables.formats import write_file

_EXAMPLES = """examples:
  python -m dashboards.deploy testbed-testbed-default > stream.py                    a script; what it lacks is in it
  python -m dashboards.deploy STUDY --as custom-generate --output streaming          a folder for model.generate
  python -m dashboards.deploy STUDY --trial 5 --as llama.cpp                         a command line
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    study = load(arguments.study)
    files = TARGETS[arguments.target](Trial.of(study, _row(study, arguments.trial)))
    if arguments.output is None and len(files) == 1:
        say("".join(files.values()).rstrip("\n"))
        return 0
    folder = arguments.output or study.folder / arguments.target
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    say(" ".join(("written:", *(str(folder / name) for name in files))))
    return 0


def _row(study: StudyResults, trial: str | None) -> AnyRow:
    """That trial, or the recommended one. Raises UsageError."""
    if study.is_matrix:
        raise UsageError(f"study {study.name!r}: a matrix has no front to deploy from; name a sweep's study")
    if trial is None:
        found = recommended(study, study.front)
        if found.row is None:
            raise UsageError(f"study {study.name!r}: no trial is on its front; name one with --trial")
        return found.row
    complete = {str(row["trial"]): row for row in study.trials if row.get("state") == "complete"}
    if trial not in complete:
        known = ", ".join(complete) or "none"
        raise UsageError(f"trial {shown(trial)}: must be one that is complete, of {known}")
    return complete[trial]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog=program("dashboards.deploy"),
        description="The recommended trial of a study as what runs elsewhere, with what that does not do of it.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("study", metavar="STUDY", help="a name under sweeps/, or the path of an output folder")
    parser.add_argument("--trial", metavar="N", help="another trial than the recommended one")
    parser.add_argument(
        "--as",
        dest="target",
        choices=TARGETS,
        default="streaming-cache",
        help="streaming-cache: a script for transformers; custom-generate: a folder for its generate; llama.cpp: a "
        "command line (streaming-cache)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where files are written (custom-generate: in the study's folder; the others are printed)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
