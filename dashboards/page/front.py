"""The table of the front, and what is said below it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from streamllm.results.schema import AnyRow
from streamllm.results.study import FIXED, StudyResults

from ..tables import kinds
from ..tables.columns import Column, shown_columns
from .sources import called


def front_table(study: StudyResults, front: Sequence[AnyRow], recommended: AnyRow | None) -> str:
    rows = [*front, *study.fixed]
    timed_on = kinds.letters([rows])
    columns = (*shown_columns(front, study.objectives), *([kinds.TIMED_ON] if timed_on else []))
    marked = recommended["trial"] if recommended is not None else None
    lines = []
    for row in kinds.marked(rows, timed_on):
        kind = "recommended" if row["trial"] == marked else "baseline" if row["trial"] in FIXED else ""
        cells = "".join(f'<td class="{_alignment(column)}">{_cell(column.text(row))}</td>' for column in columns)
        lines.append(f'<tr class="{kind}">{cells}<td class="sources" data-trial="{row["trial"]}"></td></tr>')
    heads = "".join(f'<th scope="col" class="{_alignment(column)}">{escape(column.heading)}</th>' for column in columns)
    heads += '<th scope="col">source</th>'
    return f'<table id="front-table"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _cell(text: str) -> str:
    """An interval may stand below its value, where there is little room."""
    value, bracket, interval = text.partition(" [")
    return f'{escape(value)} <span class="interval">[{escape(interval)}</span>' if bracket else escape(text)


def front_call(study: StudyResults, front: Sequence[AnyRow]) -> str:
    """Python that gives the table's rows of trials, with ends of intervals in columns of their own."""
    keys = [key for column in shown_columns(front, study.objectives) for key in column.keys]
    there = [key for key in keys if any(key in row for row in front)]
    return f"{called(study)}study.front[{there!r}]" if front else f"{called(study)}study.front"


def _alignment(column: Column) -> str:
    return "" if column.words or column.key == "trial" else "number"


def front_note(study: StudyResults, front: Sequence[AnyRow]) -> str:
    text = (
        "Intervals are 95%. The increase over strict StreamingLLM is over every token, that over re-computing rests on "
        "the tokens it was sampled at. The last rows are what everything is compared with. All counts are of tokens."
    )
    if any(row.get("rounds") for row in front):
        text += (
            " Times are of rounds after the search. P(front) is the share of draws from the measurements in which no "
            "other candidate is better; what cannot be told from a row of the front is left out."
        )
    return escape(" ".join([text, *kinds.notes(kinds.letters([[*front, *study.fixed]]))]))
