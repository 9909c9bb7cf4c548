"""A table on a terminal: as wide as that is, with all knobs and objectives at any width.

What is the same in every row is said above it. Where a row is too long for a line, intervals go below their values,
then headers become letters, then measures that are dispensable are left out, which is said; nothing is cut off.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamllm.results.schema import FIELDS, POLICY_KNOBS, POLICY_WORDS, AnyRow, knobs_in_short

from ..recommendation import MEASURED_BY
from .columns import Column
from .content import Table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

_HEADINGS = ("study", "place")
"""Columns whose values become lines above the rows that have them."""
_WORDS = ("method", "backend", "execution", "quantization")
"""Columns that share one, a line each, where room is scarce."""
_SETTINGS = (*_WORDS, "backend_requested", *(field.name for field in (*POLICY_KNOBS, *POLICY_WORDS)))
_LETTERS = {field.name: field.short for field in FIELDS.values() if field.short not in ("", field.header)} | {
    "dominated_by": "by"
}
_LINES_OF_A_BASELINE = 3


@dataclass(frozen=True, slots=True)
class Line:
    text: str
    style: str = ""
    """Rich's."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How roomy a table is."""

    intervals: str = "beside"
    """Where the values' intervals go: beside, below, or none."""
    letters: bool = False
    gap: int = 2


_FORMS = (
    _Form(),
    _Form("below"),
    _Form("below", gap=1),
    _Form("below", letters=True),
    _Form("below", letters=True, gap=1),
)
_FORMS_OF_A_LINE = (_Form(), *(replace(form, intervals="none") for form in _FORMS[1:]))


@dataclass(frozen=True, slots=True)
class _Block:
    """A column as it is printed."""

    keys: tuple[str, ...]
    head: list[str]
    cells: list[list[str]]
    """The lines of each row and each baseline."""
    left: bool
    width: int

    def pad(self, text: str) -> str:
        space = " " * (self.width - _length(text))
        return text + space if self.left else space + text


def lines(table: Table, width: int | None = None, one_line: bool = False) -> list[Line]:
    """The table, not its title and notes.

    width: None for one that is as wide as it needs to be.
    one_line: a row takes one line, without its intervals where they have no room beside their values."""
    fixed = _fixed(table)
    columns = [
        column for column in table.columns if column not in fixed and column.key not in (*_HEADINGS, "recommended")
    ]
    said = [f"In every row: {', '.join(f'{c.header} {_text(c, table.rows[0])}' for c in fixed)}."] if fixed else []
    forms = _FORMS_OF_A_LINE if one_line else _FORMS
    for left_out in _ever_more(columns, table.dispensable):
        kept = [column for column in columns if column not in left_out]
        for form in forms:
            blocks = _blocks(table, kept, form)
            if width is None or _width(blocks, form.gap) <= width:
                said += _legend(kept, left_out, form)
                about = [Line(text, "dim") for line in said for text in wrapped(line, width)]
                return [*about, *([Line("")] if about else []), *_grid(table, blocks, form)]
    about = [Line(text, "dim") for line in said for text in wrapped(line, width)]
    return [*about, *_records(table, columns, width)]


def wrapped(text: str, width: int | None) -> list[str]:
    """Lines of whole words; a command, which is there to be copied, is one line."""
    if width is None or MEASURED_BY in text or not text:
        return text.splitlines() or [""]
    return [line for part in text.splitlines() for line in textwrap.wrap(part, width, break_on_hyphens=False)]


class View:
    """The output of `lines`, for Rich: a row is a line."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        title = [Line(text, "italic") for text in wrapped(self.table.title, options.max_width)]
        for line in (*title, *lines(self.table, options.max_width, one_line=True)):
            yield Text(line.text, line.style, no_wrap=True)


def _fixed(table: Table) -> list[Column]:
    """The columns of settings, and of what follows from them, that are alike in all rows of several."""
    if len(table.rows) < 2:
        return []
    keys = [*_SETTINGS, *(key for key in ("peak_kv",) if key in table.dispensable)]
    chosen = [column for column in table.columns if column.key in keys]
    return [column for column in chosen if len({_text(column, row) for row in table.rows} - {""}) == 1
            and _text(column, table.rows[0])]  # fmt: skip


def _ever_more(columns: Sequence[Column], dispensable: Sequence[str]) -> Iterator[list[Column]]:
    """Nothing, the first of those that are dispensable, the first two, ..."""
    order = [column for key in dispensable for column in columns if column.key == key]
    return (order[:count] for count in range(len(order) + 1))


def _text(column: Column, row: AnyRow) -> str:
    if column.key == "trial" and row.get("recommended"):
        return f"*{column.text(row)}"
    if column.key == "backend" and row.get("backend") is None:  # it failed: what was asked for
        return str(row.get("backend_requested", ""))
    return column.text(row)


def _blocks(table: Table, columns: Sequence[Column], form: _Form) -> list[_Block]:
    words = [column for column in columns if column.key in _WORDS] if form.intervals != "beside" else []
    groups = [words if column in words else [column] for column in columns if column not in words[1:]]
    rows = (*table.rows, *table.baselines)
    return [_block([_column_block(column, rows, len(table.rows), form) for column in group]) for group in groups]


def _block(parts: Sequence[_Block]) -> _Block:
    """One below the other."""
    cells = [[line for cell in cells for line in cell] for cells in zip(*(part.cells for part in parts), strict=True)]
    head = [line for part in parts for line in part.head]
    keys = tuple(key for part in parts for key in part.keys)
    return _Block(keys, head, cells, parts[0].left, max(part.width for part in parts))


def _column_block(column: Column, rows: Sequence[AnyRow], count: int, form: _Form) -> _Block:
    """count: of the rows; the others are baselines, whose settings are said in words."""
    cells = []
    for number, row in enumerate(rows):
        in_words = number >= count and column.key in (*_SETTINGS, "trial")
        cells.append([""] if in_words else _cell(column, row, form))
    width = max((_length(line) for cell in cells for line in cell), default=0)
    title = _LETTERS.get(column.key, column.header) if form.letters else column.heading
    head = _broken(title, width)
    return _Block((column.key,), head, cells, column.words, max(width, *map(_length, head)))


def _broken(title: str, width: int) -> list[str]:
    """At its spaces: as few lines as are no wider than that, or than its longest word, and no wider than they must."""
    least = max(map(_length, title.split(" ")))
    head = textwrap.wrap(title, max(width, least), break_long_words=False) or [""]
    narrower = (textwrap.wrap(title, below, break_long_words=False) for below in range(max(least, 1), width))
    return next((lines for lines in narrower if len(lines) == len(head)), head)


def _cell(column: Column, row: AnyRow, form: _Form) -> list[str]:
    text = _text(column, row)
    if not column.interval or form.intervals == "beside":
        return [text]
    value, bracket, interval = text.partition(" [")
    return [value, f"[{interval}"] if bracket and form.intervals == "below" else [value]


def _grid(table: Table, blocks: Sequence[_Block], form: _Form) -> Iterator[Line]:
    gap = " " * form.gap
    height = max(len(block.head) for block in blocks)
    for number in range(height):
        heads = ([""] * (height - len(block.head)) + block.head for block in blocks)
        yield Line(gap.join(b.pad(head[number]) for b, head in zip(blocks, heads, strict=True)).rstrip(), "bold")
    rule = Line("─" * _width(blocks, form.gap), "dim")
    yield rule
    said = ""
    for number, row in enumerate(table.rows):
        if (heading := _heading(table, row)) != said:
            yield from ([Line("")] if said else [])
            yield Line(heading, "italic")
            said = heading
        yield from _row(blocks, [block.cells[number] for block in blocks], gap, "bold" * bool(row.get("recommended")))
    if table.baselines:
        yield rule
    for number, row in enumerate(table.baselines, len(table.rows)):
        yield from _baseline(row, blocks, [block.cells[number] for block in blocks], gap)


def _heading(table: Table, row: AnyRow) -> str:
    shown = {column.key for column in table.columns}
    return ": ".join(str(row[key]) for key in _HEADINGS if key in shown and key in row)


def _row(blocks: Sequence[_Block], cells: Sequence[Sequence[str]], gap: str, style: str = "") -> Iterator[Line]:
    for number in range(max(map(len, cells))):
        texts = (
            block.pad(cell[number] if number < len(cell) else "") for block, cell in zip(blocks, cells, strict=True)
        )
        yield Line(gap.join(texts).rstrip(), style)


def _baseline(row: AnyRow, blocks: Sequence[_Block], cells: Sequence[Sequence[str]], gap: str) -> Iterator[Line]:
    """In words, over the columns of settings, where they have room for that; else above its values."""
    about = [block for block in blocks if block.keys[0] in (*_SETTINGS, "trial")]
    values = blocks[len(about) :]
    span = replace(about[0], left=True, width=_width(about, len(gap)))
    text = textwrap.wrap(_baseline_words(row), span.width, break_on_hyphens=False)
    if len(text) > _LINES_OF_A_BASELINE or any(_length(line) > span.width for line in text):
        whole = textwrap.wrap(_baseline_words(row), _width(blocks, len(gap)), break_on_hyphens=False)
        yield from (Line(line) for line in whole)
        text = [""]
    yield from _row([span, *values], [text, *cells[len(about) :]], gap)


def _baseline_words(row: AnyRow) -> str:
    whose = f"{row['trial']} of {row['study']}" if "study" in row else str(row["trial"])
    if row.get("method") == "recompute":
        return f"{whose}: recompute, the last {row['n_sink'] + row['window_size']} tokens"
    policy = knobs_in_short({name: value for name, value in row.items() if value != 0})
    return f"{whose}: {row.get('method', '')} {row.get('backend', '')} {policy}"


def _legend(columns: Sequence[Column], left_out: Sequence[Column], form: _Form) -> list[str]:
    letters = [f"{_LETTERS[c.key]} {c.header}" for c in columns if c.key in _LETTERS] if form.letters else []
    needs_room = ", ".join(column.header for column in left_out)
    return [
        *([f"{', '.join(letters)}."] if letters else []),
        *([f"A wider terminal, and the files, also have: {needs_room}."] if left_out else []),
    ]


def _records(table: Table, columns: Sequence[Column], width: int | None) -> Iterator[Line]:
    """A paragraph per row, for what has no room for a table."""
    for row in (*table.rows, *table.baselines):
        heading = _heading(table, row)
        values = [f"{column.heading} {text}" for column in columns if (text := _text(column, row))]
        text = f"{heading + '; ' if heading else ''}{', '.join(values)}"
        for number, line in enumerate(textwrap.wrap(text, max((width or 80) - 2, 20), break_on_hyphens=False)):
            yield Line(f"{'  ' if number else ''}{line}", "bold" * bool(row.get("recommended")))


def _width(blocks: Sequence[_Block], gap: int) -> int:
    return sum(block.width for block in blocks) + gap * (len(blocks) - 1)


def _length(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
