"""Figures of a study, for people who would rather look than read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .front import Row, confirmed
from .study import StudyResults

_LABELS = {
    "tpot_ms": "time per output token, ms",
    "speedup": "speedup over re-computation",
    "perplexity": "perplexity",
    "ppl_increase_percent": "perplexity increase over re-computation, %",
    "peak_kv": "largest number of keys attended to",
}
_FRONT, _OTHERS = "#0072b2", "0.6"


def pareto_figure(study: StudyResults, path: Path) -> Path:
    """All trials in the plane of the first two objectives, with intervals; the front joined, numbered and listed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x, y = list(study.objectives)[:2]
    front = [confirmed(row) for row in study.front]
    on_front = {row["trial"] for row in front}
    others = [confirmed(row) for row in study.trials if row["state"] == "complete" and row["trial"] not in on_front]
    figure, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    _scatter(axes, others, x, y, _OTHERS, "o", "dominated")
    _scatter(axes, front, x, y, _FRONT, "D", "Pareto front")
    axes.plot([row[x] for row in front], [row[y] for row in front], color=_FRONT, linewidth=1, drawstyle="steps-post")
    for row in front:
        axes.annotate(f"{row['trial']}", (row[x], row[y]), xytext=(5, 5), textcoords="offset points", fontsize=9)
    listing = "\n".join(_describe(row) for row in front)
    axes.text(1.02, 1, f"on the front\n\n{listing}", transform=axes.transAxes, va="top", fontsize=8, family="monospace")
    if y == "ppl_increase_percent":
        axes.axhline(0, color="#d55e00", linewidth=1, linestyle="--", label="re-computation (baseline)")
    _limit(axes, [*front, *others], x, y)
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel(_LABELS[y])
    axes.set_title(study.configuration["summary"], fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(1.01, 0))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _scatter(axes: Any, rows: Sequence[Row], x: str, y: str, color: str, marker: str, label: str) -> None:
    if rows:
        axes.errorbar(
            [row[x] for row in rows],
            [row[y] for row in rows],
            xerr=_errors(rows, x),
            yerr=_errors(rows, y),
            fmt=marker,
            color=color,
            markersize=6,
            elinewidth=0.7,
            alpha=0.9,
            label=label,
        )


def _limit(axes: Any, rows: Sequence[Row], x: str, y: str) -> None:
    """The axes span the points, not the widest interval; far points bend the axis instead of flattening it."""
    if not rows:
        return
    for values, set_limits in (([row[x] for row in rows], axes.set_xlim), ([row[y] for row in rows], axes.set_ylim)):
        margin = 0.08 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
        set_limits(min(values) - margin, max(values) + margin)
    size = sorted(abs(row[y]) for row in rows)
    usual = max(size[len(size) // 2], 1e-9)
    if size[-1] > 10 * usual:
        from matplotlib.ticker import ScalarFormatter

        axes.set_yscale("symlog", linthresh=3 * usual, linscale=2)
        axes.set_ylim(min(min(row[y] for row in rows) - usual, 0), 1.5 * size[-1])
        axes.yaxis.set_major_formatter(ScalarFormatter())


def _errors(rows: Sequence[Row], name: str) -> list[list[float]] | None:
    if any(f"{name}_low" not in row for row in rows):
        return None
    return [
        [max(row[name] - row[f"{name}_low"], 0) for row in rows],
        [max(row[f"{name}_high"] - row[name], 0) for row in rows],
    ]


def _describe(row: Row) -> str:
    return (
        f"{row['trial']:>3}  {row['method']} {row['backend']}  S={row['n_sink']} W={row['window_size']} "
        f"R={row['compress_every']}\n     slack={row['cache_slack']} drop={row['max_drop']}  "
        f"{row['tpot_ms']:.2f} ms  {row['ppl_increase_percent']:+.1f}%"
    )
