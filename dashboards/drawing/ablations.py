"""The effect of one knob: lines through trials that differ in nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from streamllm.files import Scalar
from streamllm.results.schema import POLICY_KNOBS, AnyRow, knobs_in_short, number, words_of

from ..recommendation import COSTS, QUALITIES
from .style import CYCLE, LABELS, MARKERS, NoDataError, grid, interval_errors, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LETTERS = {field.name: field.symbol for field in POLICY_KNOBS}
KNOBS = tuple(LETTERS)
_TIMES = ("tpot_ms", "runtime_sec")
"""What a line's times may be, the first that makes one: the source documents' own ablations have the latter only."""
_LINES = 4
"""Shown at most: those with the most values."""


def ablation(rows: Sequence[AnyRow], knob: str) -> Figure:
    """Time and perplexity over the knob's values, a line for each setting of the others. Raises NoDataError."""
    time, lines = _drawn(rows, knob)
    if not lines:
        raise NoDataError(f"no two trials that differ in {knob} alone")
    every = [row for _, line in lines for row in line]
    quality = next((name for name in QUALITIES if all(name in row for row in every)), COSTS[-1])
    figure = new_figure(8.4, 3.4, panels=2)
    panels = figure.subplots(*grid(2))
    for metric, axes in zip((time, quality), panels, strict=True):
        for (label, line), color, marker in zip(lines, CYCLE, MARKERS, strict=False):
            _draw(axes, line, knob, metric, color, marker, label)
        values = sorted({row[knob] for _, line in lines for row in line})
        if values[-1] > 8 * max(values[0], 1):
            axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.set_xlabel(LABELS[knob])
        axes.set_title(LABELS[metric] + _untold([line for _, line in lines], metric))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=grid(2)[1])
    return figure


def _drawn(rows: Sequence[AnyRow], knob: str) -> tuple[str, list[tuple[str, list[AnyRow]]]]:
    """The measure of time, and the lines; of an unchanging total if there are any, else of an unchanging window."""
    for time in _TIMES:
        for of_total in (True, False):
            if lines := ablation_lines(rows, knob, time, of_total):
                return time, lines
    return "", []


def ablation_lines(
    rows: Sequence[AnyRow], knob: str, time: str = "tpot_ms", of_total: bool = True
) -> list[tuple[str, list[AnyRow]]]:
    """The longest lines with their labels, each in the knob's order. of_total: the window is no setting of its own but
    what the others leave of the total, unless it is the knob."""
    settings: dict[tuple[Scalar, ...], dict[int, AnyRow]] = defaultdict(dict)
    for row in rows:
        if _complete(row, knob, time) and row.get("method") != "recompute":
            settings[_others(row, knob, of_total)][row[knob]] = row
    longest = sorted((line for line in settings.values() if len(line) > 1), key=lambda line: -len(line))[:_LINES]
    untold = {knob} | ({"window_size"} if of_total else set())
    return [(_label(next(iter(line.values())), untold), [line[value] for value in sorted(line)]) for line in longest]


def _untold(lines: Sequence[Sequence[AnyRow]], metric: str) -> str:
    """Says so where no two points of any line can be told apart: their intervals share a value."""

    def told(line: Sequence[AnyRow]) -> bool:
        known = [row for row in line if number(row, metric) is not None]
        lows, highs = ([row.get(f"{metric}_{end}", row[metric]) for row in known] for end in ("low", "high"))
        return bool(known) and max(lows) > min(highs)

    return "" if any(told(line) for line in lines) else "\nno difference beyond the intervals"


def _others(row: AnyRow, knob: str, of_total: bool) -> tuple[Scalar, ...]:
    names = ("model", "dataset", "protocol", "method", "backend", "execution", "quantization", *KNOBS)
    total = row["n_sink"] * of_total + row["window_size"] + row.get("cache_slack", 0) * of_total
    held = total if knob != "window_size" else None
    return held, *words_of(row).values(), *(row.get(name) for name in names if name not in (knob, "window_size"))


def _complete(row: AnyRow, knob: str, time: str) -> bool:
    """Whether it has a place in a line; a knob that it says nothing of is a setting like another."""
    named = ("n_sink", "window_size", knob, time)
    return row.get("state") == "complete" and all(number(row, name) is not None for name in named)


def _label(row: AnyRow, untold: Set[str]) -> str:
    others = {name: row[name] for name in KNOBS if name not in untold and name in row}
    knobs = knobs_in_short(others | words_of(row), symbols=True)
    how = [str(row[name]) for name in ("method", "backend") if name in row]
    how += [str(row[name]) for name in ("execution", "quantization") if row.get(name) not in ("eager", "none", None)]
    return " ".join([*how, knobs])


def _draw(axes: Axes, line: Sequence[AnyRow], knob: str, metric: str, color: str, marker: str, label: str) -> None:
    line = [row for row in line if number(row, metric) is not None]
    axes.errorbar(
        [row[knob] for row in line], [row[metric] for row in line], yerr=interval_errors(line, metric), color=color,
        marker=marker, markersize=5, linewidth=1.2, elinewidth=0.7, capsize=2, label=label,
    )  # fmt: skip
