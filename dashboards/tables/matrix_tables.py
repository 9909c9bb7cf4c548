"""The tables and figures of a matrix: a table for each protocol, a row for each cell, what failed with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamllm.measuring.reference_time import ReferencePool
from streamllm.results.schema import POLICY_WORDS, AnyRow, Row, words_of

from ..drawing.ablations import LETTERS
from ..drawing.comparisons import Group, Series, bars
from ..drawing.style import CYCLE, new_figure, save, style
from ..summarize import EVALUATION_COLUMNS
from .columns import BY_KEY, POLICY_COLUMNS, Column, bytes_differ
from .content import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (
    "main_comparison",
    "fixed_eval_speedup",
    "fixed_eval_ppl_comparison",
    "fixed_eval_ppl_increase",
    "fixed_eval_runtime",
    "fixed_eval_first_token_latency",
    "decode_loop_runtime_comparison",
    "decode_loop_ppl_comparison",
    "backend_comparison",
)
"""The source documents' figures, of which those are drawn that there is data for."""

_SETTINGS = (
    Column("configuration", "configuration", words=True),
    *map(Column.of, ("dataset", "dtype", "quantization", "method")),
    Column("backend_requested", "attention", words=True),
    Column("backend", "kernel", words=True),
    BY_KEY["execution"],
    *POLICY_COLUMNS,
    *(BY_KEY[field.name] for field in POLICY_WORDS),
)
_MEASURES = {
    column.key: column for column in (*EVALUATION_COLUMNS, *map(Column.of, ("runtime_change_percent", "decode_sec")))
}
_ALWAYS = {"dataset", "method"}
_NOTES = {
    "decode_sec": "Total time is that of the tokens after the cache is full.",
    "ppl_increase_percent": "Intervals are 95%; PPL increase is paired with the baseline, by way of strict "
    "StreamingLLM where the baseline is known at a sample of tokens.",
    "tpot_ms": "Milliseconds are ratios to strict StreamingLLM, timed in turn with it, times its median time.",
}
"""On a column."""
_UNSAID = ("", None, "eager", "none", "compact", 0)
"""Values that go without saying where all rows have them."""
_STATE = Column("note", "", words=True)
_CHUNKS_RUNTIME = Column("runtime_sec", "runtime of a chunk", "s", 3)
_DRAWN = ("tpot_ms", "decode_toks_per_sec", "avg_attn_ms", "perplexity", "peak_memory_mb")
_ABOUT = {
    "fast": "Protocol fast: all losses in a few block forwards, ms/token in the steady state of a full cache.",
    "decode-loop": "Protocol decode-loop: every token decoded one by one; runtime is that of the whole text, ms/token "
    "that of its part with a full cache.",
    "chunked": "Protocol chunked: chunks of a prefill, one compression and a short continuation; runtime is a chunk's, "
    "and not comparable with a decode loop's.",
}


def matrix_rows(documents: Sequence[Mapping[str, Any]]) -> list[AnyRow]:
    """A row per measurement: a baseline once, before the first that is compared with it; cells without a result too."""
    found: list[tuple[AnyRow, dict[str, Any]]] = []
    baselines = set()
    for document in documents:
        settings = document["settings"]
        shared = {name: settings[name] for name in ("configuration", "quantization")}
        if document["state"] != "complete":
            more = {name: document[name] for name in ("state", "reason")}
            found.append((settings, {"backend_requested": settings["attn_backend"], **more}))
            continue
        baseline = Row.from_json(document["baseline"], str(document.get("cell")))
        identity = tuple(str(baseline[name]) for name in _IDENTITY)
        if identity not in baselines:
            baselines.add(identity)
            found.append((_measured(baseline, baseline), {**shared, "configuration": "", "baseline": True}))
        if "streaming" in document:
            found.append((_measured(Row.from_json(document["streaming"], str(document.get("cell"))), baseline), shared))
    pool = ReferencePool(row for row, _ in found)
    timed = [(pool.with_time(row) if isinstance(row, Row) else row, more) for row, more in found]
    return [{**words_of(row), **row, **more} for row, more in timed]


_IDENTITY = (
    "model_digest", "text_digest", "protocol", "method", "dtype", "backend_requested", "n_sink", "window_size",
    "compress_every",
)  # fmt: skip


def _measured(row: Row, baseline: Row) -> Row:
    row = row | {"state": "complete"}
    if row.runtime_sec is None:  # protocol fast decodes no whole text
        return row
    change = 100 * (row.runtime_sec / baseline["runtime_sec"] - 1)
    return row | {"decode_sec": row.runtime_sec - row["prefill_sec"], "runtime_change_percent": change}


def matrix_tables(
    name: str, description: str, documents: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[str]]
) -> dict[str, Table]:
    """Tables by the suffix of the file's name: one per protocol. `columns`: protocol -> measures."""
    rows = matrix_rows(documents)
    protocols = list(dict.fromkeys(str(row["protocol"]) for row in rows))
    tables = {}
    for protocol in protocols:
        suffix = f"-{protocol}" if len(protocols) > 1 else ""
        own = [row for row in rows if row["protocol"] == protocol]
        tables[suffix] = _table(f"{name}, {protocol}" if suffix else name, description, own, columns[protocol])
    return tables


def _table(title: str, description: str, rows: Sequence[AnyRow], measures: Sequence[str]) -> Table:
    protocol = str(rows[0]["protocol"])
    compared = [row for row in rows if not row.get("baseline")] or rows
    told = _ALWAYS | {column.key for column in _SETTINGS if len({row.get(column.key) for row in compared}) > 1}
    if any(row.get("backend") not in (row["backend_requested"], None) for row in rows):
        told.add("backend")
    shown = [column for column in _SETTINGS if column.key in told]
    same = compared[0]
    fixed = [f"{c.header} {same.get(c.key)}" for c in _SETTINGS if c not in shown and same.get(c.key) not in _UNSAID]
    done = next((row for row in rows if row["state"] == "complete"), None)
    where = [str(done["model"]), str(done["device"])] if done is not None else []
    noted, reasons = _noted(rows)
    about = [text for name, text in _NOTES.items() if name in measures]
    if "peak_kv_mib" not in measures and bytes_differ(rows):
        measures = [*measures, "peak_kv_mib"]
    measured = [_CHUNKS_RUNTIME if name == "runtime_sec" and protocol == "chunked" else _measure(name)
                for name in measures]  # fmt: skip
    return Table(
        title=title,
        summary=tuple(line for line in (description, ", ".join(where + fixed)) if line),
        columns=(*shown, *measured, *([_STATE] if reasons else [])),
        rows=noted,
        notes=(_ABOUT[protocol], *about, *_exactness(rows), *_warnings(rows), *reasons),
        data_columns=_data_columns(rows, measured),
    )


def _measure(name: str) -> Column:
    return _MEASURES.get(name) or Column.of(name)


def _noted(rows: Sequence[AnyRow]) -> tuple[list[AnyRow], list[str]]:
    """The rows, those without a result with a `note` that says where to read why; and the reasons."""
    reasons = list(dict.fromkeys(str(row["reason"]) for row in rows if row["state"] != "complete"))
    noted = [
        row if row["state"] == "complete" else {**row, "note": f"{row['state']} ({reasons.index(row['reason']) + 1})"}
        for row in rows
    ]
    return noted, [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]


def _exactness(rows: Sequence[AnyRow]) -> list[str]:
    told = [row for row in rows if "exactness" in row]
    return list(dict.fromkeys(f"Method {row['method']} in {row['dtype']}: {row['exactness']}." for row in told))


def _warnings(rows: Sequence[AnyRow]) -> list[str]:
    warned = [row for row in rows if "warning" in row]
    return list(dict.fromkeys(f"Warning, {row['configuration'] or row['method']}: {row['warning']}." for row in warned))


def _data_columns(rows: Sequence[AnyRow], measured: Sequence[Column]) -> tuple[Column, ...]:
    names = ("protocol", "model", "device", "n_tokens", "evaluated_tokens", "exactness", "state", "reason")
    every = [
        *_SETTINGS,
        *map(Column.of, names),
        BY_KEY["peak_kv"],
        BY_KEY["peak_kv_mib"],
        *measured,
        *_MEASURES.values(),
    ]
    columns = {column.key: column for column in every if any(column.key in row for row in rows)}
    return tuple(columns.values())


def matrix_figures(
    name: str, documents: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[str]], folder: Path
) -> list[Path]:
    """`NAME.png`, or one for each protocol: bars of what the table shows."""
    rows = [row for row in matrix_rows(documents) if row["state"] == "complete"]
    protocols = list(dict.fromkeys(str(row["protocol"]) for row in rows))
    paths = []
    with style():
        for protocol in protocols:
            own = [row for row in rows if row["protocol"] == protocol]
            measures = [measure for measure in _DRAWN if measure in columns[protocol]]
            stem = folder / (f"{name}-{protocol}" if len(protocols) > 1 else name)
            paths += save(_figure(own, measures), stem, ("png",))
    return paths


def _figure(rows: Sequence[AnyRow], measures: Sequence[str]) -> Figure:
    """A panel per measure, a group per data set and number format, a bar per cell."""
    compared = [row for row in rows if not row.get("baseline")] or rows
    varying = [column.key for column in _SETTINGS if len({row.get(column.key) for row in compared}) > 1]
    apart = ["dataset", *(key for key in ("dtype", "quantization") if key in varying)]
    told = ["method", *(key for key in varying if key not in (*apart, "method", "backend"))]
    if "configuration" in told:  # which says the knobs
        told = [key for key in told if key not in LETTERS]
    kinds = {_series(row, told): row for row in rows}
    colors = None  # methods and attention have theirs
    if set(told) - {"method", "backend_requested"}:
        colors = {kind: CYCLE[index % len(CYCLE)] for index, kind in enumerate(kinds)}
    grouped: dict[str, dict[Series, AnyRow]] = {}
    for row in rows:
        grouped.setdefault("\n".join(str(row[key]) for key in apart), {})[_series(row, told)] = row
    groups = [Group(title, own) for title, own in grouped.items()]
    width = max(3.4, 0.5 * sum(len(group.rows) for group in groups) + 1)
    figure = new_figure(len(measures) * width, 3.2 + 0.1 * len(kinds))
    for measure, axes in zip(measures, figure.subplots(1, len(measures), squeeze=False).flat, strict=True):
        bars(axes, groups, list(kinds), measure, colors)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=min(2 * len(measures), 4))
    return figure


def _series(row: AnyRow, told: Sequence[str]) -> Series:
    words = [str(row[key]) for key in told if key not in LETTERS and row.get(key)]
    knobs = [f"{LETTERS[key]}={row[key]}" for key in told if key in LETTERS and not row.get("baseline")]
    return Series(str(row["method"]), str(row["backend_requested"]), name=", ".join([*words, *knobs]))
