"""What the source documents published of experiments that are matrices here, beside the cells as they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamllm.results.schema import AnyRow

from .summarize import EVALUATION_COLUMNS
from .tables.columns import Column
from .tables.content import Table
from .tables.matrix_tables import matrix_rows

_COLUMNS = {column.key: column for column in EVALUATION_COLUMNS}
_DATASET, _METHOD, _ATTENTION = (
    Column.of("dataset"),
    Column.of("method"),
    Column("backend_requested", "attention", words=True),
)

_SHIM = "_shim"
"""Of the matrix and of the method by which their kvpress runs on their model."""


@dataclass(frozen=True)
class PublishedTable:
    """One of their tables; `theirs` has a tuple of figures, as they printed them, for each of its rows."""

    title: str
    about: str
    protocol: str
    """Ours, of the cells beside it."""
    names: tuple[Column, ...]
    """What a row is found by."""
    ours: tuple[str, ...]
    """Measures of the cells."""
    figures: tuple[str, ...]
    """Headers of theirs."""
    theirs: Mapping[tuple[str, ...], tuple[str, ...]]


_PYTHIA_70M = "Theirs: published by the source documents, Pythia-70M in float16; not measured here."
_OF_CHUNKS = ("PPL", "runtime (s)", "speedup (×)")
TABLES = {
    "comprehensive": (
        PublishedTable(
            "The source documents' decode loop",
            _PYTHIA_70M,
            "decode-loop",
            (_DATASET, _METHOD),
            ("perplexity", "ppl_increase_percent", "runtime_sec", "runtime_change_percent"),
            ("PPL", "PPL increase %", "runtime (s)", "runtime change %"),
            {
                ("wikitext", "recompute"): ("36.72", "0", "18.80", "0"),
                ("wikitext", "ours"): ("36.79", "0.19", "10.95", "-41.8"),
                ("wikitext", "mit"): ("36.79", "0.19", "12.10", "-35.7"),
                ("wikitext", "kvpress"): ("39.14", "6.6", "10.04", "-46.6"),
                ("pg19", "recompute"): ("57.68", "0", "23.79", "0"),
                ("pg19", "ours"): ("57.99", "0.54", "13.75", "-42.2"),
                ("pg19", "mit"): ("57.99", "0.54", "14.99", "-37.0"),
                ("pg19", "kvpress"): ("69.51", "20.5", "12.77", "-46.3"),
            },
        ),
        PublishedTable(
            "The source documents' table of eval_streaming_llm.py",
            _PYTHIA_70M + " They call it chunked; but for kvpress, whose figures are its official ones, it has the "
            "perplexities of their decode loop.",
            "fast",
            (_DATASET, _METHOD),
            ("perplexity", "tpot_ms", "speedup"),
            _OF_CHUNKS,
            {
                ("wikitext", "recompute"): ("36.72", "17.64", "1.00"),
                ("wikitext", "ours"): ("36.79", "11.93", "1.55"),
                ("wikitext", "mit"): ("36.79", "10.96", "1.68"),
                ("wikitext", "kvpress"): ("40.46", "0.041", "7.79"),
                ("pg19", "recompute"): ("57.68", "23.81", "1.00"),
                ("pg19", "ours"): ("57.99", "13.94", "1.67"),
                ("pg19", "mit"): ("57.99", "15.31", "1.52"),
                ("pg19", "kvpress"): ("58.04", "0.045", "7.03"),
            },
        ),
        PublishedTable(
            "The source documents' table of kvpress' own evaluation",
            _PYTHIA_70M
            + " Their baseline's runtime is a whole text's, kvpress' a chunk's; their speedup is of neither.",
            "chunked",
            (_DATASET, _METHOD),
            ("perplexity", "runtime_sec", "speedup"),
            _OF_CHUNKS,
            {
                ("wikitext", "recompute"): ("36.72", "17.64", "1.00"),
                ("wikitext", "kvpress"): ("40.46", "0.041", "7.79"),
                ("pg19", "recompute"): ("57.68", "23.81", "1.00"),
                ("pg19", "kvpress"): ("58.04", "0.045", "7.03"),
            },
        ),
    ),
    "attention_report": (
        PublishedTable(
            "The source documents' attention report",
            "Theirs: published by the source documents, Pythia-2.8B in bfloat16, 8 sinks and a window of 256; not "
            "measured here. Their SDPA is attention auto.",
            "decode-loop",
            (_DATASET, _METHOD, _ATTENTION),
            ("perplexity", "decode_toks_per_sec", "avg_attn_ms", "decode_sec", "peak_memory_mb"),
            ("PPL", "tokens/s", "avg attention (ms)", "total time (s)", "peak memory (GB)"),
            {
                ("wikitext", "dense", "eager"): ("7.23", "18.49", "356.66", "27.05", "5.48"),
                ("wikitext", "ours", "eager"): ("12.11", "18.59", "331.74", "26.90", "5.35"),
                ("wikitext", "dense", "auto"): ("7.03", "25.57", "125.72", "19.55", "5.48"),
                ("wikitext", "ours", "auto"): ("11.57", "30.77", "70.29", "16.25", "5.31"),
            },
        ),
    ),
}
"""By the name of the matrix."""


def published_cells(matrix: str, documents: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """Their tables, by the suffix of the file's name, blank where a cell was not measured; those that none was measured
    of are left out. documents: of the cells."""
    rows = [row for row in matrix_rows(documents) if row["state"] == "complete"]
    tables = TABLES.get(matrix.removesuffix(_SHIM), ())
    found = {f"-{one.protocol}" if len(tables) > 1 else "": _table(one, rows) for one in tables}
    return {suffix: table for suffix, table in found.items() if table is not None}


def _table(published: PublishedTable, rows: Sequence[AnyRow]) -> Table | None:
    own: dict[tuple[str, ...], AnyRow] = {}
    for row in rows:
        if row["protocol"] == published.protocol:
            own.setdefault(tuple(_name(row, column.key) for column in published.names), row)
    if not own.keys() & published.theirs.keys():
        return None
    measures = [_COLUMNS.get(name) or Column.of(name) for name in published.ours]
    theirs = [Column(f"published_{number}", f"theirs: {title}", words=True)
              for number, title in enumerate(published.figures)]  # fmt: skip
    shown = [
        {
            **own.get(names, {}),
            **{column.key: name for column, name in zip(published.names, names, strict=True)},
            **{column.key: figure for column, figure in zip(theirs, figures, strict=True)},
        }
        for names, figures in published.theirs.items()
    ]
    missing = [" ".join(names) for names in published.theirs if names not in own]
    notes = [published.about, "All other columns: measured by this study. Intervals are 95%."]
    if missing:
        notes.append(f"Not measured by this study: {', '.join(missing)}.")
    done = next(iter(own.values()))
    return Table(published.title, (f"{done['model']}, {done['device']}, protocol {published.protocol}",),
                 (*published.names, *measures, *theirs), shown, notes=tuple(notes))  # fmt: skip


def _name(row: AnyRow, key: str) -> str:
    """Of a data set without the book, split and join of it; of a method with their shim as they call it."""
    return str(row[key]).partition("-")[0] if key == "dataset" else str(row[key]).removesuffix(_SHIM)
