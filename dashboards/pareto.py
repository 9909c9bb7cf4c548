"""Pareto tables: `python -m dashboards.pareto STUDY --format md,csv`."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streamllm.errors import UsageError

from .front import Row
from .study import StudyResults, load_study

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Column:
    header: str
    key: str
    decimals: int | None = None
    """None for words and whole numbers."""
    interval: bool = False

    def text(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None or self.decimals is None:
            return "" if value is None else str(value)
        text = f"{value:.{self.decimals}f}"
        low, high = row.get(f"{self.key}_low"), row.get(f"{self.key}_high")
        if self.interval and low is not None and high is not None:
            text += f" [{low:.{self.decimals}f}, {high:.{self.decimals}f}]"
        return text


COLUMNS = (
    Column("#", "trial"),
    Column("method", "method"),
    Column("backend", "backend"),
    Column("execution", "execution"),
    Column("sinks", "n_sink"),
    Column("window", "window_size"),
    Column("prune every", "compress_every"),
    Column("slack", "cache_slack"),
    Column("max drop", "max_drop"),
    Column("peak KV", "peak_kv"),
    Column("ms/token", "tpot_ms", 2, interval=True),
    Column("speedup", "speedup", 1),
    Column("ms/token, confirmed", "confirmed_tpot_ms", 2, interval=True),
    Column("speedup, confirmed", "confirmed_speedup", 1),
    Column("P(front)", "front_probability", 2),
    Column("PPL", "perplexity", 2),
    Column("PPL increase %", "ppl_increase_percent", 1, interval=True),
)


_CONFIRMED = "confirmed_tpot_ms"


def _columns(rows: Sequence[Row]) -> list[Column]:
    """All but the execution where every row's is eager, confirmed values where there are none, and the search's where
    all are confirmed."""
    needless = set()
    if all(row.get("execution", "eager") == "eager" for row in rows):
        needless.add("execution")
    if not any(_CONFIRMED in row for row in rows):
        needless |= {_CONFIRMED, "confirmed_speedup", "front_probability"}
    elif all(_CONFIRMED in row for row in rows):
        needless |= {"tpot_ms", "speedup"}
    return [column for column in COLUMNS if column.key not in needless]


def markdown(study: StudyResults, rows: Sequence[Row]) -> str:
    columns = _columns(rows)
    lines = [
        f"# Pareto front of `{study.name}`",
        "",
        study.configuration["summary"],
        "",
        "| " + " | ".join(column.header for column in columns) + " |",
        "|" + "|".join("---" if column.decimals is None else "---:" for column in columns) + "|",
    ]
    baseline = [study.baseline] if study.baseline is not None else []
    lines += ["| " + " | ".join(column.text(row) for column in columns) + " |" for row in [*rows, *baseline]]
    lines += ["", "Intervals are 95%; PPL increase is paired with the re-computation baseline on the same tokens."]
    if any(_CONFIRMED in row for row in rows):
        lines.append(
            "Confirmed times are medians over rounds after the search; P(front) is the share of bootstrap draws, over "
            "rounds and tokens, in which no other candidate is better."
        )
    lines.append("")
    return "\n".join(lines)


def comma_separated(study: StudyResults, rows: Sequence[Row]) -> str:
    """The same rows with full precision, intervals in columns of their own."""
    keys = [
        key
        for column in COLUMNS
        if not column.key.startswith(("confirmed_", "front_")) or any(column.key in row for row in rows)
        for key in (column.key, *((f"{column.key}_low", f"{column.key}_high") if column.interval else ()))
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FORMATS: dict[str, Callable[[StudyResults, Sequence[Row]], str]] = {"md": markdown, "csv": comma_separated}
"""File ending -> what writes it."""


def rich_table(rows: Sequence[Row], title: str) -> Table:
    """For a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = _columns(rows)
    for column in columns:
        words = column.key in ("method", "backend", "execution")
        header = column.header.replace(", ", ",\n")
        table.add_column(header, justify="left" if words else "right", no_wrap=column.key != "compress_every")
    for row in rows:
        table.add_row(*(column.text(row) for column in columns))
    return table


def export(study: StudyResults, formats: Sequence[str], everything: bool = False) -> list[Path]:
    """Writes `pareto.FORMAT` into the study's folder; the front, or with `everything` all trials. Returns the files."""
    rows = study.trials if everything else study.front
    paths = []
    for name in formats:
        path = study.folder / f"pareto.{name}"
        path.write_text(FORMATS[name](study, rows), encoding="utf-8")
        paths.append(path)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dashboards.pareto", description="Export the Pareto table of a study."
    )
    parser.add_argument("study", metavar="STUDY", help="a name under sweeps/, or the path of an output folder")
    parser.add_argument("--format", default="md,csv", metavar="LIST", help=f"of {', '.join(FORMATS)} (md,csv)")
    parser.add_argument("--all", action="store_true", help="every finished trial, not only the front")
    arguments = parser.parse_args(argv)
    try:
        formats = [name.strip() for name in arguments.format.split(",")]
        for name in formats:
            if name not in FORMATS:
                raise UsageError(f"format {name!r}: must be one of {', '.join(FORMATS)}")
        study = load_study(arguments.study)
        paths = export(study, formats, arguments.all)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(study, everything=arguments.all)
    print("written:", *paths)
    return 0


def print_table(study: StudyResults, everything: bool = False) -> None:
    """The table on stdout, the baseline as its last row; as wide as it needs to be where stdout is no terminal."""
    from rich.console import Console

    rows = study.trials if everything else study.front
    what = f"{len(rows)} trials" if everything else f"Pareto front: {len(rows)} of {len(study.trials)} trials"
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(rich_table([*rows, *([study.baseline] if study.baseline is not None else [])], what))


if __name__ == "__main__":
    sys.exit(main())
