"""Pareto tables: `python -m dashboards.pareto STUDY --format md,csv`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamllm.errors import UsageError

from .columns import Column, shown_columns
from .formats import FORMATS, Table
from .front import Row
from .study import StudyResults, load_study
from .table import pareto_table

if TYPE_CHECKING:
    import rich.table

_EXAMPLES = """examples:
  python -m dashboards.pareto testbed-testbed-default --knee
  python -m dashboards.pareto STUDY --format latex,parquet --all
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
        content = FORMATS[name].write(table)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise UsageError(f"output {str(path)!r}: cannot be written ({error.strerror})") from error
        paths.append(path)
    return paths


def print_table(study: StudyResults, everything: bool = False) -> None:
    """The table on stdout, the baseline as its last row; as wide as it needs to be where stdout is no terminal."""
    rows = study.trials if everything else study.front
    what = f"{len(rows)} trials" if everything else f"Pareto front: {len(rows)} of {len(study.trials)} trials"
    show(pareto_table([study], everything), what)


def rich_table(rows: Sequence[Row], title: str, columns: Sequence[Column] | None = None) -> rich.table.Table:
    """For a terminal."""
    columns = shown_columns(rows) if columns is None else columns
    return _rich_table([[column.text(row) for column in columns] for row in rows], title, columns)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        formats = parse_formats(arguments.format)
        studies = [load_study(study) for study in arguments.study]
        table = pareto_table(studies, arguments.all, arguments.where, arguments.knee)
        here = studies[0].folder if len(studies) == 1 else Path()
        paths = write(table, formats, arguments.output or here)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(table, "\n".join(table.summary))
    print(*table.notes, sep="\n")
    print("written:", *paths)
    return 0


def parse_formats(names: str) -> list[str]:
    """Raises UsageError."""
    formats = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"format {name!r}: must be one of {', '.join(FORMATS)}")
    return formats


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dashboards.pareto",
        description="Export the Pareto tables of studies.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "study", nargs="+", metavar="STUDY", help="a name under sweeps/, or the path of an output folder"
    )
    parser.add_argument("--format", default="md,csv", metavar="LIST", help=f"of {', '.join(FORMATS)} (md,csv)")
    parser.add_argument(
        "--all", action="store_true", help="every finished trial, with the one of the front that dominates it"
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="only trials such as backend = 'flash' and ppl_increase_percent < 3; the front is theirs",
    )
    parser.add_argument("--knee", action="store_true", help="mark the recommended point, say why and how to repeat it")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where files are written (the study's folder; of several, here)"
    )
    return parser.parse_args(argv)


def show(table: Table, title: str) -> None:
    """On stdout; as wide as it needs to be where that is no terminal."""
    from rich.console import Console

    cells = table.cells
    if len(table.rows) > _SHOWN:
        cells = cells[:_SHOWN] + cells[len(table.rows) :]
        title += f"; the first {_SHOWN} of {len(table.rows)} rows, all are in the files"
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(_rich_table(cells, title, table.columns))


def _rich_table(cells: Sequence[Sequence[str]], title: str, columns: Sequence[Column]) -> rich.table.Table:
    import rich.table
    from rich import box
    from rich.text import Text

    table = rich.table.Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_style="italic"
    )
    for column in columns:
        header = column.header.replace(", ", ",\n") + (f"\n({column.unit})" if column.unit else "")
        table.add_column(
            Text(header), justify="left" if column.words else "right", no_wrap=column.key != "compress_every"
        )
    for line in cells:
        table.add_row(*(Text(text) for text in line))
    return table


if __name__ == "__main__":
    sys.exit(main())
