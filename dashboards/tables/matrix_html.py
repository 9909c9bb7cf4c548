"""A matrix' tables and figures as parts of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from streamllm.results.study import StudyResults

from .columns import Column
from .content import Table
from .matrix_tables import matrix_tables


def documents_of(study: StudyResults) -> list[dict[str, Any]]:
    """What the cells' files say, in the order of the cells; of those that can be read."""
    found = []
    for row in sorted(study.trials, key=lambda row: int(row["trial"])):
        try:
            found.append(json.loads((study.files.cells / f"{row['cell']}.json").read_text()))
        except (OSError, ValueError):
            continue
    return found


def tables_of(study: StudyResults) -> dict[str, Table]:
    """By the suffix of their files' names."""
    space = study.configuration["space"]
    columns: Mapping[str, list[str]] = space.get("columns", {})
    documents = documents_of(study)
    return matrix_tables(space["name"], space.get("description", ""), documents, columns) if documents else {}


def html_of(table: Table) -> str:
    """With its notes. All that comes from the study is escaped."""
    heads = "".join(f'<th scope="col" class="{_alignment(c)}">{escape(c.title)}</th>' for c in table.columns)
    lines = (
        "".join(
            f'<td class="{_alignment(c)}">{escape(text)}</td>' for c, text in zip(table.columns, cells, strict=True)
        )
        for cells in table.cells
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    notes = "".join(f'<p class="quiet">{escape(note)}</p>' for note in table.notes)
    summary = "".join(f"<p>{escape(line)}</p>" for line in table.summary)
    head = f"<h2>{escape(table.title)}</h2>{summary}"
    return f'{head}<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>{notes}'


def _alignment(column: Column) -> str:
    return "" if column.words else "number"
