"""The picture of a diagnosis: the excess loss around a prune, the cache beneath it, and both along the text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..figure_style import BLUE, GREY, VERMILLION, new_figure, save, style
from .diagnosis import Spike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_MOST_MEANS = 120
"""Along the text."""


def draw_diagnosis(spike: Spike, table: pd.DataFrame, trained_length: int | None, title: str, path: Path) -> None:
    """Writes a PNG."""
    with style():
        figure = new_figure(11, 4.8)
        places = [["around", "along"], ["cache", "along"]]
        axes: dict[str, Any] = figure.subplot_mosaic(places, width_ratios=[3, 2], height_ratios=[3, 1])
        _around(axes["around"], spike)
        _cache(axes["cache"], spike, table, trained_length)
        _along(axes["along"], spike, table)
        axes["cache"].sharex(axes["around"])
        axes["around"].tick_params(labelbottom=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        save(figure, path.with_suffix(""), [path.suffix[1:]])


def _around(axes: Axes, spike: Spike) -> None:
    band = "95% band, bootstrap over prunes"
    axes.fill_between(spike.offsets, spike.low, spike.high, color=BLUE, alpha=0.2, linewidth=0, label=band)
    axes.plot(spike.offsets, spike.curve, color=BLUE, label=f"mean of {spike.prunes} prunes")
    axes.axhline(spike.level.value, color=GREY, linewidth=1, linestyle="--", label="level before the prune")
    axes.axhline(0, color="0.3", linewidth=1)
    axes.axvline(-0.5, color=VERMILLION, linewidth=1, label="a prune begins")
    axes.set_ylabel("loss above the reference, nats")
    axes.legend(fontsize=8)


def _cache(axes: Axes, spike: Spike, table: pd.DataFrame, trained_length: int | None) -> None:
    """Around a prune in the middle of the text."""
    starts = np.flatnonzero(table["prune"])
    start = int(starts[len(starts) // 2])
    keys = table["keys"].to_numpy()[start - spike.before : start + spike.interval]
    axes.plot(np.arange(-spike.before, len(keys) - spike.before), keys, color="0.3", drawstyle="steps-mid")
    if trained_length is not None and keys.max() > trained_length + 1:
        axes.axhline(trained_length, color=GREY, linewidth=1, linestyle=":")
        words, across = f"trained on {trained_length}", axes.get_yaxis_transform()
        axes.text(1, trained_length, words, transform=across, ha="right", va="bottom", fontsize=8)
    axes.axvline(-0.5, color=VERMILLION, linewidth=1)
    axes.margins(y=0.15)
    axes.set_ylabel("keys\nattended to")
    axes.set_xlabel("tokens since the prune began")


def _along(axes: Axes, spike: Spike, table: pd.DataFrame) -> None:
    """Means over whole intervals, so that what is drawn is the text and not the prune."""
    width = -(-len(table) // _MOST_MEANS // spike.interval) * spike.interval
    tokens, excess = table["token"].to_numpy(), table["excess"].to_numpy()
    whole = len(table) // width * width
    means = excess[:whole].reshape(-1, width).mean(axis=1)
    axes.bar(tokens[:whole:width], means, width=width, align="edge", color=BLUE, alpha=0.6)
    axes.axhline(excess.mean(), color="0.3", linewidth=1, linestyle="--", label=f"mean {excess.mean():+.4f}")
    axes.set_xlabel(f"token of the text (means of {width})")
    axes.set_ylabel("loss above the reference, nats")
    axes.legend(fontsize=8)
