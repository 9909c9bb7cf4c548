"""`python -m dashboards.published STUDY`: the source documents' tables, measured here, beside their own figures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streamllm.errors import UsageError
from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.printing import say
from streamllm.terminal.program import command, program

from .loading import load
from .pareto import parse_formats, show, write
from .published_cells import TABLES, published_cells
from .tables.columns import BY_KEY, POLICY_COLUMNS, SPEEDUP, Column
from .tables.content import Table
from .tables.formats import FORMATS
from .tables.matrix_html import documents_of

_COLUMNS = (
    Column("label", "method", words=True),
    *POLICY_COLUMNS,
    BY_KEY["tpot_ms"],
    SPEEDUP,
    BY_KEY["perplexity"],
    BY_KEY["ppl_increase_percent"],
    Column("published_speedup", "theirs: speedup", "×", words=True),
    Column("published_increase", "theirs: PPL increase %", words=True),
)


@dataclass(frozen=True)
class Entry:
    """A row of their table (section 6 of their guide to reproduction, with the results of sections 1 to 4)."""

    label: str
    knobs: Mapping[str, str | int]
    """None: the baseline."""
    figures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Data set -> published speedup and perplexity increase; empty where they give none."""


def _knobs(method: str, n_sink: int, compress_every: int, slack: int = 0, drop: int = 0) -> dict[str, str | int]:
    knobs = {"n_sink": n_sink, "compress_every": compress_every, "cache_slack": slack, "max_drop": drop}
    return {"method": method, **knobs}


ENTRIES = (
    Entry("Baseline", {}, {"pg19": ("1", "0"), "wikitext": ("1", "0")}),
    Entry(
        "MIT StreamingLLM", _knobs("mit", 4, 1), {"pg19": ("6.2 to 7.3", "1 to 3"), "wikitext": ("3 to 5", "2 to 4")}
    ),
    Entry("Ours (Standard)", _knobs("ours", 4, 1), {"pg19": ("as MIT's", ""), "wikitext": ("as MIT's", "")}),
    Entry("Ours (Lazy Prune)", _knobs("ours", 4, 32), {"pg19": ("", "5 to 6")}),
    Entry("Ours (Best)", _knobs("ours", 32, 64, 16, 32), {"pg19": ("7.03 to 7.11", "2.19 to 2.55")}),
    Entry("Ours (Quality first)", _knobs("ours", 32, 32, 16, 32), {"pg19": ("6.94 to 7.07", "2.18 to 2.19")}),
)


def published_table(study: StudyResults) -> Table:
    """Their rows as the study measured them; blank where it did not."""
    dataset = "wikitext" if "wikitext" in str(study.configuration.get("source", {}).get("dataset_name")) else "pg19"
    rows = [_row(study, entry, dataset) for entry in ENTRIES]
    missing = [str(row["label"]) for row in rows if "tpot_ms" not in row]
    text, tokens = ("PG19", "20,000") if dataset == "pg19" else ("WikiText-103", "4,096")
    notes = [
        f"Theirs, in the last two columns: published by the source documents, Pythia-2.8B on an NVIDIA A800, {tokens} "
        f"tokens of {text}, a total of 2048; not measured here.",
        "All other columns: measured by this study. Intervals are 95%.",
    ]
    if missing:
        notes.append(f"Not among this study's trials: {', '.join(missing)}.")
    return Table(f"The source documents' main table, {study.name}", (study.configuration["summary"],), _COLUMNS, rows,
                 notes=tuple(notes))  # fmt: skip


def published_tables(study: StudyResults) -> dict[str, Table]:
    """By the suffix of the file's name. Raises UsageError for a matrix that has nothing of theirs."""
    if not study.is_matrix:
        return {"": published_table(study)}
    found = published_cells(study.configuration["space"]["name"], documents_of(study))
    if not found:
        raise UsageError(
            f"study {study.name!r}: none of its cells is in a table of the source documents; those are of WikiText and "
            f"PG19, by --space {' or '.join(TABLES)}"
        )
    return found


def write_published(
    study: StudyResults, formats: Sequence[str] = ("md", "latex"), folder: Path | None = None
) -> list[Path]:
    """`published.SUFFIX` in the study's folder, or another. Raises UsageError if it cannot be written."""
    return [
        path
        for suffix, table in published_tables(study).items()
        for path in write(table, formats, folder or study.folder, f"published{suffix}")
    ]


def _row(study: StudyResults, entry: Entry, dataset: str) -> AnyRow:
    """With flash attention, if the study has that, as theirs."""
    speedup, increase = entry.figures.get(dataset, ("", ""))
    common = {"label": entry.label, **entry.knobs, "published_speedup": speedup, "published_increase": increase}
    if not entry.knobs:
        return common | (dict(study.baseline) if study.baseline is not None else {})
    found = [row for row in study.trials if row["state"] == "complete" and entry.knobs.items() <= row.items()]
    found.sort(key=lambda row: row.get("backend_requested") != "flash")
    return common | (dict(found[0]) if found else {})


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog=program("dashboards.published"),
        description="The source documents' tables as a study measured them, beside the figures that they published: "
        f"the main one (--space paper has all of it), and of the matrices {' and '.join(TABLES)} theirs.",
    )
    parser.add_argument("study", metavar="STUDY", help="a name under sweeps/, or the path of an output folder")
    parser.add_argument(
        "--format", default="md,latex", metavar="LIST", help=f"formats, of {', '.join(FORMATS)} (md,latex)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where files are written (the study's folder)")
    arguments = parser.parse_args(argv)
    formats, study = parse_formats(arguments.format), load(arguments.study)
    paths = write_published(study, formats, arguments.output)
    for table in published_tables(study).values():
        show(table, table.title, (*table.notes, ""))
    say(" ".join(("written:", *map(str, paths))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
