"""Figures of a study, for people who would rather look than read."""

from __future__ import annotations

from pathlib import Path

from .study import StudyResults

_LABELS = {
    "tpot_ms": "time per output token, ms",
    "speedup": "speedup over re-computation",
    "perplexity": "perplexity",
    "ppl_increase_percent": "perplexity increase over re-computation, %",
    "peak_kv": "largest number of keys attended to",
}


def pareto_figure(study: StudyResults, path: Path) -> Path:
    """All trials in the plane of the first two objectives, with intervals; the front joined and labelled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x, y = list(study.objectives)[:2]
    front = study.front
    others = [row for row in study.trials if row["state"] == "complete" and row not in front]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for rows, color, marker, label in (
        (others, "0.6", "o", "trials"),
        (front, "#0072b2", "D", "Pareto front"),
    ):
        if rows:
            errors = [_errors(rows, name) for name in (x, y)]
            axes.errorbar(
                [row[x] for row in rows],
                [row[y] for row in rows],
                xerr=errors[0],
                yerr=errors[1],
                fmt=marker,
                color=color,
                markersize=6,
                elinewidth=0.8,
                label=label,
                zorder=3 if rows is front else 2,
            )
    axes.plot(
        [row[x] for row in front], [row[y] for row in front], color="#0072b2", linewidth=1, drawstyle="steps-post"
    )
    for row in front:
        label = f"{row['method']} S={row['n_sink']} R={row['compress_every']}"
        axes.annotate(label, (row[x], row[y]), xytext=(6, 6), textcoords="offset points", fontsize=8)
    values = [abs(row[y]) for row in [*front, *others]]
    if values and max(values) > 20 * max(min(values), 1):
        axes.set_yscale("symlog", linthresh=max(10 * min(values), 5))
    if y == "ppl_increase_percent":
        axes.axhline(0, color="#d55e00", linewidth=1, linestyle="--", label="re-computation baseline (quality)")
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel(_LABELS[y])
    axes.set_title(study.configuration["summary"], fontsize=9, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _errors(rows: list, name: str) -> list[list[float]] | None:  # type: ignore[type-arg]
    if any(f"{name}_low" not in row for row in rows):
        return None
    return [
        [max(row[name] - row[f"{name}_low"], 0) for row in rows],
        [max(row[f"{name}_high"] - row[name], 0) for row in rows],
    ]
