"""Pareto tables: `python -m dashboards.pareto STUDY --format md,csv`."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from streamllm.errors import UsageError
from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults
from streamllm.terminal.arguments import percent
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.printing import say
from streamllm.terminal.program import command, program

from .loading import load_all
from .tables import kinds
from .tables.columns import shown_columns
from .tables.conditions import GRAMMAR
from .tables.content import Table
from .tables.formats import FORMATS, write_file
from .tables.table import dispensable, pareto_table
from .tables.terminal import Line, View, lines, wrapped

_EXAMPLES = """examples:
  python -m dashboards.pareto testbed-testbed-default --max-ppl-increase 3
  python -m dashboards.pareto STUDY --format latex,parquet --all
  python -m dashboards.pareto STUDY --trace 5                       where the numbers of trial 5 come from
  python -m dashboards.pareto STUDY OTHER --joint                   one front of both
  python -m dashboards.pareto STUDY OTHER --output tables --where "backend = 'flash' and ppl_increase_percent < 3"
"""
_SHOWN = 60
"""Rows that a terminal gets at most."""


def export(study: StudyResults, formats: Sequence[str], everything: bool = False) -> list[Path]:
    """Writes `pareto.SUFFIX` into the study's folder; the front, or with `everything` all trials. Returns the files."""
    return write(pareto_table([study], everything), formats, study.folder)


def write(table: Table, formats: Sequence[str], folder: Path, stem: str = "pareto") -> list[Path]:
    """Writes `STEM.SUFFIX` into the folder. Returns the files. Raises UsageError if it cannot be written to."""
    paths = []
    for name in formats:
        path = folder / f"{stem}.{FORMATS[name].suffix}"
        write_file(path, FORMATS[name].write(table))
        paths.append(path)
    return paths


def print_table(study: StudyResults, everything: bool = False) -> None:
    """The table on stdout, the recommended row marked, the baseline as its last."""
    rows = study.trials if everything else study.front
    what = f"{len(rows)} trials" if everything else f"Pareto front: {len(rows)} of {len(study.trials)} trials"
    table = pareto_table([study], everything)
    show(table, what, table.notes)


def rich_table(rows: Sequence[AnyRow], title: str, objectives: Collection[str] = ()) -> View:
    """For a live view."""
    timed_on = kinds.letters([rows])
    columns = (*shown_columns(rows, objectives), *([kinds.TIMED_ON] if timed_on else []))
    title = "\n".join([title, *kinds.notes(timed_on)])
    return View(Table(title, (), columns, kinds.marked(rows, timed_on), dispensable=dispensable(objectives)))


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    formats = parse_formats(arguments.format)
    studies = load_all(arguments.study)
    if arguments.trace is not None:
        say(_traced(studies, arguments.trace))
        return 0
    if any(study.is_matrix for study in studies) and not arguments.joint:
        return _matrix_tables(studies, formats, arguments.output)
    limit = None if arguments.max_ppl_increase is None else percent(arguments.max_ppl_increase)
    if arguments.joint:
        from .joint import joint_table

        table, stem = joint_table(studies, arguments.all, arguments.where, limit), "pareto_joint"
    else:
        table, stem = pareto_table(studies, arguments.all, arguments.where, limit), "pareto"
    here = studies[0].folder if len(studies) == 1 else Path()
    paths = write(table, formats, arguments.output or here, stem)
    show(table, "\n".join(table.summary), table.notes)
    say(" ".join(("written:", *map(str, paths))))
    return 0


def _matrix_tables(studies: Sequence[StudyResults], formats: Sequence[str], output: Path | None) -> int:
    """A matrix has a table per protocol, and no front. Raises UsageError for one beside other studies."""
    from .tables.matrix_html import tables_of

    if len(studies) > 1:
        name = next(study.name for study in studies if study.is_matrix)
        raise UsageError(f"study {name!r}: a matrix, whose cells are in no table with other studies; name it alone")
    (study,) = studies
    paths: list[Path] = []
    for suffix, table in tables_of(study).items():
        show(table, "\n".join((table.title, *table.summary)), (*table.notes, ""))
        paths += write(table, formats, output or study.folder, f"{study.configuration['space']['name']}{suffix}")
    say(" ".join(("written:", *map(str, paths))))
    return 0


def _traced(studies: Sequence[StudyResults], trial: str) -> str:
    """Raises UsageError."""
    if len(studies) > 1:
        raise UsageError(f"trace {trial!r}: follows a trial of one study, {len(studies)} are given; name one")
    from .tables.trace import trace

    return trace(studies[0], trial)


def parse_formats(names: str) -> list[str]:
    """Raises UsageError."""
    formats = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"format {name!r}: must be one of {', '.join(FORMATS)}")
    return formats


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog=program("dashboards.pareto"),
        description="Export the Pareto tables of studies.",
        epilog="\n\n".join((_EXAMPLES.rstrip(), *(textwrap.fill(text, 100) for text in GRAMMAR))),
    )
    parser.add_argument(
        "study", nargs="+", metavar="STUDY", help="a name under sweeps/, or the path of an output folder"
    )
    parser.add_argument("--format", default="md,csv", metavar="LIST", help=f"formats, of {', '.join(FORMATS)} (md,csv)")
    parser.add_argument(
        "--all", action="store_true", help="every finished trial, with the one of the front that dominates it"
    )
    parser.add_argument(
        "--joint",
        action="store_true",
        help="one front of all the studies: of the same model, text, total KV and device",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="only trials that meet it, such as backend = 'flash' and ppl_increase_percent < 3; the front is theirs",
    )
    parser.add_argument(
        "--max-ppl-increase",
        metavar="PERCENT",
        help="recommend the fastest whose perplexity is at most so much above re-computation's",
    )
    parser.add_argument(
        "--trace",
        metavar="TRIAL",
        help="write nothing; print where the values of that trial, baseline or strict come from: entries of the store, "
        "rounds, versions, hardware, commit",
    )
    parser.add_argument("--knee", action="store_true", help="changes nothing: the recommended point is always marked")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where files are written (the study's folder; of several, here)"
    )
    return parser.parse_args(argv)


def show(table: Table, title: str, notes: Sequence[str] = ()) -> None:
    """On stdout: on a terminal the first rows, as wide as that is; elsewhere all, as wide as they need to be."""
    from rich.console import Console
    from rich.text import Text

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    if terminal and len(table.rows) > _SHOWN:
        title += f"; the first {_SHOWN} of {len(table.rows)} rows, all are in the files"
        table = replace(table, rows=table.rows[:_SHOWN])
    text = [
        *(Line(line, "italic") for line in wrapped(title, width)),
        *lines(table, width),
        Line(""),
        *(Line(line) for note in notes for line in wrapped(note, width)),
    ]
    console = Console(highlight=False, markup=False)
    with console.capture() as captured:  # a console that prints ends the process where nobody reads
        for line in text:
            console.print(Text(line.text, line.style), soft_wrap=True)
    say(captured.get().rstrip("\n") + "\n" * (not notes))


if __name__ == "__main__":
    sys.exit(main())
