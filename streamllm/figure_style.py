"""How figures look: colours that the colour-blind can tell apart (Okabe and Ito 2008), and print; saving."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, BLACK, GREY = "#56b4e9", "#cc79a7", "#000000", "#999999"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vPX"


HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "oo", "||||", "++", "**")
"""Bars in this order are told apart without colour."""
SHAPES = {"ours": "o", "mit": "^", "ring": "D", "kvpress": "X", "kvpress_shim": "X", "window": "v", "dense": "P"}
SHAPES |= {"recompute": "s", "streaming": "o"}
"""Methods' marks; any other has a star."""
_LEAST_SHRINK = 0.7
"""How much of its height a figure keeps on paper at least: its text hardly shrinks."""


@dataclass(frozen=True, slots=True)
class Medium:
    """What a figure is made for."""

    width: float | None = None
    """Inches; None for a screen, where each figure has its own, its title and its listing."""
    suffix: str = ""
    """Of the files' names."""

    @property
    def is_paper(self) -> bool:
        return self.width is not None

    @property
    def is_narrow(self) -> bool:
        return self.width is not None and self.width < 5


SCREEN = Medium()
PAPER = (Medium(3.3, "-3.3in"), Medium(7.0, "-7in"))
"""A column and the page of most papers with two columns."""
_medium = ContextVar("medium", default=SCREEN)


def medium() -> Medium:
    """What figures are drawn for now."""
    return _medium.get()


@contextmanager
def style(made_for: Medium = SCREEN) -> Iterator[None]:
    """Figures are drawn and saved inside."""
    import matplotlib

    size, small = (8, 7) if made_for.is_paper else (9, 9)
    settings = {
        "font.size": size,
        "axes.titlesize": size,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": small,
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "hatch.linewidth": 0.8,
        "pdf.fonttype": 42,  # letters stay letters
        "svg.hashsalt": "streamllm-sweep",  # the same figure, the same bytes
    }
    before = _medium.set(made_for)
    try:
        with matplotlib.rc_context(settings):
            yield
    finally:
        _medium.reset(before)


def new_figure(width: float, height: float, panels: int = 1) -> Figure:
    """In inches, as on a screen; its layout is made when it is saved. On paper it is as wide as that, and where panels
    of a pair stand one below the other (`grid`) it is twice as high."""
    from matplotlib.figure import Figure

    if (there := medium().width) is not None:
        height *= min(max(there / width, _LEAST_SHRINK), 1) * grid(panels)[0] / math.ceil(panels / 2)
        width = there
    return Figure(figsize=(width, height), layout="constrained")


def grid(panels: int) -> tuple[int, int]:
    """Rows and columns of so many panels: two beside each other, but in a column of a paper."""
    columns = 1 if medium().is_narrow else min(panels, 2)
    return math.ceil(panels / columns), columns


def save(figure: Figure, stem: Path, suffixes: Sequence[str], title: str = "") -> list[Path]:
    """Writes STEM.SUFFIX for each of png, pdf and svg; the same figure gives the same bytes. Their metadata say the
    title, what the figure shows (its label, as far as it has one) and what made it."""
    paths = [stem.with_name(f"{stem.name}{medium().suffix}.{suffix}") for suffix in suffixes]
    if medium().is_paper:
        _wrap_words(figure)
    said = {"Title": title or stem.name, "Creator": f"streamllm-sweep {__version__}"}
    about = str(figure.get_label())
    more: dict[str, dict[str, str | None]] = {
        ".pdf": {"Subject": about, "CreationDate": None},
        ".svg": {"Description": about, "Date": None},
        ".png": {"Description": about},
    }
    for path in paths:
        metadata = {name: value for name, value in more[path.suffix].items() if value != ""}
        figure.savefig(path, dpi=_DPI[medium().is_paper], metadata=said | metadata)
    return paths


_DPI = {False: 150, True: 300}
"""On paper or not."""
_LETTER = 0.53
"""Width of a letter, in its size: the mean of a text in DejaVu Sans."""


def _wrap_words(figure: Figure) -> None:
    """Breaks titles and labels of axes that are longer than what they stand at."""
    figure.draw_without_rendering()  # type: ignore[no-untyped-call]
    for axes in figure.axes:
        place = axes.get_window_extent()
        width, height = place.width / figure.dpi, place.height / figure.dpi
        for location in ("left", "center"):
            if title := axes.get_title(location):
                axes.set_title(_in_lines(title, width), loc=location)
        axes.set_xlabel(_in_lines(axes.get_xlabel(), width))
        axes.set_ylabel(_in_lines(axes.get_ylabel(), height))


def _in_lines(text: str, inches: float) -> str:
    """In the current size of text."""
    import matplotlib

    letters = max(int(72 * inches / (_LETTER * matplotlib.rcParams["font.size"])), 10)
    return "\n".join(part for line in text.split("\n") for part in wrap(line, letters))
