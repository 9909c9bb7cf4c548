"""A scatter plot in a terminal, of braille dots: two columns and four rows of them in a character."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of the braille block, by column and row in a character."""
_WIDEST = 64
_FRONT, _OTHER, _AXES = Style(color="cyan", bold=True), Style(dim=True), Style()

Point = tuple[float, float]


@dataclass(frozen=True)
class Plot:
    """Dots for all points, diamonds for those of the front. Some points lie beyond the upper and right edge where they
    would flatten the rest; then it is said how many."""

    points: Sequence[Point]
    front: Sequence[Point]
    x_label: str
    y_label: str
    height: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for characters, style in self.rows(min(options.max_width - 12, _WIDEST)):
            yield Segment(characters, style)

    def rows(self, width: int) -> Iterator[tuple[str, Style]]:
        """Pieces of lines with their styles; a line ends with a piece "\\n"."""
        left, right = _span([x for x, _ in self.points], [x for x, _ in self.front])
        bottom, top = _span([y for _, y in self.points], [y for _, y in self.front])
        grid = [[0] * width for _ in range(self.height)]
        beyond = 0
        for x, y in self.points:
            column = _place(x, left, right, 2 * width)
            row = _place(y, bottom, top, 4 * self.height)
            if column is None or row is None:
                beyond += 1
            else:
                row = 4 * self.height - 1 - row
                grid[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
        marks = {(_place(x, left, right, width), _place(y, bottom, top, self.height)) for x, y in self.front}
        labels = {0: f"{top:.4g}", self.height - 1: f"{bottom:.4g}"}
        yield f"{self.y_label}{f'  ({beyond} trials are beyond the edge)' if beyond else ''}", _AXES
        yield "\n", _AXES
        for line, cells in enumerate(grid):
            yield f"{labels.get(line, ''):>8} ┤", _AXES
            for column, dots in enumerate(cells):
                if (column, self.height - 1 - line) in marks:
                    yield "◆", _FRONT
                else:
                    yield chr(0x2800 + dots) if dots else " ", _OTHER
            yield "\n", _AXES
        yield f"{'':>8} └{'─' * width}\n", _AXES
        ends = f"{left:.4g}", f"{right:.4g}"
        middle = self.x_label.center(width - len(ends[0]) - len(ends[1]))
        yield f"{'':>10}{ends[0]}{middle}{ends[1]}\n", _AXES


def _span(values: Sequence[float], front: Sequence[float]) -> tuple[float, float]:
    """From the least to the greatest; or to that of the front and the nearest nine tenths, where those take less than
    half of the way."""
    ordered = sorted(values)
    low = ordered[0]
    usual = max([ordered[math.ceil(0.9 * len(ordered)) - 1], *front])
    high = usual if ordered[-1] - low > 2 * (usual - low) > 0 else ordered[-1]
    margin = 0.02 * (high - low) or 0.1 * abs(low) or 1.0
    return low - margin, high + margin


def _place(value: float, low: float, high: float, cells: int) -> int | None:
    """Which of the cells between low and high the value is in."""
    cell = math.floor((value - low) / (high - low) * cells)
    return cell if 0 <= cell < cells else None
