"""The picture of what caches forget: recall against distance, a panel for each task and a line for each policy, and
perplexity along a text and after prunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..figure_style import CYCLE, MARKERS, new_figure, save, style
from ..tasks.texts import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3


def draw_recall(policies: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Writes a PNG. policies: as `recall --json` has them."""
    tasks = list(policies[0]["tasks"])
    panels = [*tasks, "position", *(["prunes"] if any(policy["after_prunes"] for policy in policies) else [])]
    rows = -(-len(panels) // _COLUMNS)
    with style():
        figure = new_figure(4 * _COLUMNS, 2.7 * rows + 0.8)
        axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
        for panel, place in zip(panels, axes, strict=False):
            for number, policy in enumerate(policies):
                look = {"color": CYCLE[number % len(CYCLE)], "marker": MARKERS[number % len(MARKERS)]}
                if panel in tasks:
                    _recall(place, panel, policy, look)
                else:
                    _losses(place, panel, policy, look)
            _label(place, panel)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        save(figure, path.with_suffix(""), [path.suffix[1:]])


def _recall(axes: Axes, task: str, policy: Mapping[str, Any], look: Mapping[str, Any]) -> None:
    """Filled: all that was asked for was in the cache; hollow: none or not all of it was."""
    of = "place" if TASKS[task].asked == "first" else "distance"
    points = policy["tasks"][task][f"by_{of}"]
    x = [point[f"mean_{of}"] for point in points]
    y = [100 * point["recall"] for point in points]
    axes.plot(x, y, color=look["color"], label=policy["name"], linewidth=1.2)
    for filled in (True, False):
        chosen = [place for place, point in enumerate(points) if (point["cached"] == 1) is filled]
        axes.plot(
            [x[place] for place in chosen], [y[place] for place in chosen], linestyle="", **look,
            markerfacecolor=look["color"] if filled else "white", markersize=5,
        )  # fmt: skip
    if of == "place":
        axes.axvspan(1, max(policy["n_sink"], 1), color=look["color"], alpha=0.12, linewidth=0)
    elif policy["compress_every"]:
        axes.axvline(policy["n_sink"] + policy["window_size"], color=look["color"], linewidth=1, linestyle=":")


def _losses(axes: Axes, panel: str, policy: Mapping[str, Any], look: Mapping[str, Any]) -> None:
    if panel == "position":
        points = policy["perplexity_by_position"]
        x, y = [(point["from"] + point["to"]) / 2 for point in points], [point["perplexity"] for point in points]
    else:
        points = policy["after_prunes"]
        x, y = [(point["from"] + point["to"]) / 2 + 1 for point in points], [point["excess_nats"] for point in points]
    axes.plot(x, y, **look, markersize=3, linewidth=1.2)


def _label(axes: Axes, panel: str) -> None:
    if panel == "position":
        axes.set(title="perplexity along a text", xlabel="token of the text", ylabel="perplexity")
        return
    if panel == "prunes":
        axes.set(
            title="after a prune", xlabel="tokens since the prune, from 1", ylabel="loss above the reference, nats"
        )
        axes.set_xscale("log", base=2)
        return
    is_first = TASKS[panel].asked == "first"
    where = "place in the stream, tokens (shaded: sinks)" if is_first else "distance, tokens (dotted: sinks + window)"
    axes.set(title=f"{panel}: {TASKS[panel].about}", xlabel=where, ylabel="recall, %", ylim=(-4, 104))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
