"""LaTeX tables, as wide as a paper's text lets them be.

A table that is too wide for a column has its intervals below their values, then smaller letters, then says that it
needs `table*`, then loses the columns that are dispensable, which it says too. There is no LaTeX here to ask: widths
are those of Computer Modern; Times, which many papers are in, is narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from streamllm.results.schema import AnyRow

if TYPE_CHECKING:
    from .columns import Column
    from .content import Table

COLUMN, PAGE, SIDEWAYS = 345.0, 455.0, 550.0
"""Points: the text of LaTeX's `article`; across both columns of a paper, the narrowest of the usual ones (16 cm); the
height of an article's text."""
_ROWS_OF_A_PAGE = 50
_GAP = 6.0
"""Points between two columns."""
_SIZES = {"footnotesize": 8.5, "scriptsize": 7.97}
"""Size of text -> points of an em of Computer Modern, which is the wider the smaller it is: cmr8, cmr7."""
_WIDTHS = {
    278: "!',.:;<[]il", 306: "fj", 333: "-", 333.3: " ", 361: "I", 389: "()t", 392: "r", 394: "s", 444: "cez",
    500: "$*/0123456789ago", 514: "J", 528: "kqvxy", 556: "Sbdhnpu", 611: "Z", 625: "L", 653: "F", 681: "EP",
    708: "B", 722: "CTw", 736: "R", 750: "AHNUVXY", 764: "D", 778: "&+=@KOQ×±", 785: "G", 833: "#%m", 917: "M",
    1028: "W",
}  # fmt: skip
_EMS = {letter: width / 1000 for width, letters in _WIDTHS.items() for letter in letters}
"""Of cmr10."""
_OTHER, _MINUS = 0.6, 0.778
_WORDS = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "×": "$\\times$",
    "±": "$\\pm$",
    "*": "{*}",  # after the end of a line it, and an opening bracket, would be read as its option
    "[": "{[}",
    "]": "{]}",
} | {character: f"\\{character}" for character in "&%$#_{}"}
_BEYOND_OT1 = "ÐÞ÷ðþ"


@dataclass(frozen=True, slots=True)
class _Form:
    size: str
    below: bool
    """Intervals below their values."""
    limit: float
    """Points."""


_FORMS = (
    _Form("footnotesize", below=False, limit=COLUMN),
    _Form("footnotesize", below=True, limit=COLUMN),
    _Form("scriptsize", below=True, limit=COLUMN),
    _Form("footnotesize", below=False, limit=PAGE),
    _Form("footnotesize", below=True, limit=PAGE),
    _Form("scriptsize", below=True, limit=PAGE),
)
_TURNED = _Form("scriptsize", below=True, limit=SIDEWAYS)
_MARKED = "recommended"
"""What this column says, a star beside the trial says."""


def latex(table: Table) -> str:
    """For \\input{}; comments say which packages and which environment it needs. Long tables break over pages."""
    columns, form = _chosen(table)
    left_out = [column.header for column in table.columns if column not in columns and column.key != _MARKED]
    long = len(table.cells) > _ROWS_OF_A_PAGE
    kind, package = ("longtable", "booktabs,longtable") if long else ("tabular", "booktabs")
    alignment = "".join("l" if column.words else "r" for column in columns)
    about = [
        table.title,
        *table.summary,
        f"needs \\usepackage{{{package}}}",
        _place(_width(table, columns, form), form, long),
        *([f"left out for its width: {', '.join(left_out)}; CSV, JSON and Parquet have all"] if left_out else []),
        *table.notes,
    ]
    rows = [_row(cells, columns, form) for cells in _cells(table, columns)]
    after = "\n\\addlinespace[2pt]\n" if form.below else "\n"
    lines = [
        *(f"% {' '.join(line.split())}" for line in about),
        f"{{\\{form.size}\\setlength{{\\tabcolsep}}{{{_GAP / 2:g}pt}}%",
        f"\\begin{{{kind}}}{{@{{}}{alignment}@{{}}}}",
        "\\toprule",
        *_head(table, columns, form),
        "\\midrule",
        *(["\\endhead"] if long else []),
        *([after.join(rows[: len(table.rows)])] if table.rows else []),
        *(["\\midrule", after.join(rows[len(table.rows) :])] if table.baselines else []),
        "\\bottomrule",
        f"\\end{{{kind}}}}}",
        "",
    ]
    return "\n".join(lines)


def _chosen(table: Table) -> tuple[list[Column], _Form]:
    """The columns and the form that fit; where nothing does, all in the narrowest form."""
    for forms in (_FORMS, (_TURNED,)):
        for count in range(len(table.dispensable) + 1):
            needless = {_MARKED, *table.dispensable[:count]}
            columns = [column for column in table.columns if column.key not in needless]
            for form in forms:
                if _width(table, columns, form) <= form.limit:
                    return columns, form
    return [column for column in table.columns if column.key != _MARKED], _TURNED


def _place(width: float, form: _Form, long: bool) -> str:
    """What it has to stand in."""
    about = f"about {width:.0f} pt wide in \\{form.size}"
    if width <= COLUMN:
        return f"{about}: fits the {COLUMN:.0f} pt of an article's text; in a narrower column it needs table*"
    if long:
        return f"{about}: needs \\onecolumn in a paper of two columns, as a longtable breaks over pages"
    if width <= PAGE:
        return f"{about}: needs \\begin{{table*}}; without columns, wider text than an article's {COLUMN:.0f} pt"
    fits = "" if width <= SIDEWAYS else f", and fewer columns, as a page is {SIDEWAYS:.0f} pt high"
    return f"{about}: needs \\begin{{sidewaystable}} (\\usepackage{{rotating}}){fits}"


def _width(table: Table, columns: Sequence[Column], form: _Form) -> float:
    """Points, as estimated."""
    return sum(_column_widths(table, columns, form)) + _GAP * (len(columns) - 1)


def _column_widths(table: Table, columns: Sequence[Column], form: _Form) -> list[float]:
    """A column is as wide as its widest cell or, if that is more, as the longest word of its header."""
    em = _SIZES[form.size]
    rows = _cells(table, columns)
    found = []
    for place, column in enumerate(columns):
        parts = [part for cells in rows for part in _parts(cells[place], column, form)]
        found.append(em * max(map(_ems, [*parts, *column.heading.split(), ""])))
    return found


def _cells(table: Table, columns: Sequence[Column]) -> list[list[str]]:
    def text(column: Column, row: AnyRow) -> str:
        return "*" * (column.key == "trial" and bool(row.get(_MARKED))) + column.text(row)

    return [[text(column, row) for column in columns] for row in (*table.rows, *table.baselines)]


def _parts(cell: str, column: Column, form: _Form) -> list[str]:
    """The value, and its interval where that is below it."""
    value, bracket, rest = cell.partition(" [")
    return [value, f"[{rest}"] if bracket and column.interval and form.below else [cell]


def _head(table: Table, columns: Sequence[Column], form: _Form) -> list[str]:
    """As many lines as the longest header takes in its column, the last ones full."""
    em = _SIZES[form.size]
    widths = _column_widths(table, columns, form)
    heads = [_in_lines(column.heading, width / em) for column, width in zip(columns, widths, strict=True)]
    most = max(map(len, heads), default=0)
    padded = [[""] * (most - len(head)) + head for head in heads]
    return [_line([head[line] for head in padded], columns) for line in range(most)]


def _in_lines(text: str, ems: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and _ems(f"{lines[-1]} {word}") <= ems:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _row(cells: Sequence[str], columns: Sequence[Column], form: _Form) -> str:
    parts = [_parts(cell, column, form) for cell, column in zip(cells, columns, strict=True)]
    count = max(map(len, parts), default=1)
    lines = [[one[line] if line < len(one) else "" for one in parts] for line in range(count)]
    return "\n".join(_line(line, columns) for line in lines)


def _line(cells: Sequence[str], columns: Sequence[Column]) -> str:
    pairs = zip(cells, columns, strict=True)
    return " & ".join(_escaped(text).replace("-", "-" if column.words else "$-$") for text, column in pairs) + " \\\\"


def _ems(text: str) -> float:
    """Width; a hyphen before a digit is a minus sign."""
    signs = sum(one == "-" and after.isdigit() for one, after in pairwise(text))
    return sum(_EMS.get(letter, _OTHER) for letter in text) + signs * (_MINUS - _EMS["-"])


def _escaped(text: str) -> str:
    """Characters that the standard fonts lack become question marks."""
    return "".join(_WORDS.get(c, c if _in_standard_fonts(c) else "?") for c in " ".join(text.split()))


def _in_standard_fonts(character: str) -> bool:
    return " " <= character <= "~" or ("À" <= character <= "ÿ" and character not in _BEYOND_OT1)
