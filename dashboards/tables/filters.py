"""Filters over the rows of studies, as MLflow writes them: `backend.used = 'flash' and ppl_increase_percent < 3`."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from typing import TypeVar

from streamllm.errors import UsageError
from streamllm.results.schema import FIELDS, AnyRow

R = TypeVar("R", bound=AnyRow)

_ALIASES = {"backend.used": "backend", "backend.requested": "backend_requested"}
_NAME = re.compile(r"""('(?:[^']|'')*')|("(?:[^"]|"")*")|(?:(?:tags|metrics|params)\.)?(`[^`]+`|[A-Za-z_][\w.]*)""")
"""A text in single or in double quotes, or a name, with or without MLflow's prefix and quotes."""


def select(rows: Sequence[R], where: str) -> list[R]:
    """The rows for which the condition is true: SQL (SQLite's) over their values, a missing or NaN one being NULL.

    Nothing of it is run as Python, and there is nothing but the rows for it to read. Raises UsageError."""
    there = _columns(rows)
    lower = {name.lower() for name in there}
    known = [*there, *(name for name in FIELDS if name.lower() not in lower)]  # what no row has is NULL
    condition = _NAME.sub(lambda match: _sql_name(match, known), where)
    said = {match[3].strip("`").lower() for match in _NAME.finditer(condition) if match[3]}
    used = [name for name in known if name.lower() in said]
    names = ", ".join(f'"{name}"' for name in used)
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"CREATE TABLE trials (number INTEGER PRIMARY KEY{', ' + names if names else ''})")
        marks = ", ".join("?" * (1 + len(used)))
        values = ((number, *(_sql_value(row.get(name)) for name in used)) for number, row in enumerate(rows))
        database.executemany(f"INSERT INTO trials VALUES ({marks})", values)
        database.set_authorizer(_reads_only)
        try:
            found = database.execute(f"SELECT number FROM trials WHERE ({condition}\n) ORDER BY number").fetchall()
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise UsageError(_explained(where, str(error), there)) from None
    return [rows[number] for (number,) in found]


def _columns(rows: Sequence[AnyRow]) -> list[str]:
    """Whatever some row has; names that differ by case only are one to SQL."""
    names = {name.lower(): name for name in dict.fromkeys(chain.from_iterable(rows))}
    return [name for name in names.values() if re.fullmatch(r"\w+", name) and name.lower() != "number"]


def _sql_name(match: re.Match[str], known: Sequence[str]) -> str:
    single, double, name = match.groups()
    if single:
        return str(single)
    if double:
        return "'" + double[1:-1].replace('""', '"').replace("'", "''") + "'"
    name = name.strip("`")
    name = _ALIASES.get(name, name)
    return f"`{name}`" if name in known or "." in name or match[0].startswith("`") else name


def _sql_value(value: object) -> object:
    return value if isinstance(value, str | int | float) else None


def _reads_only(action: int, *_: object) -> int:
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


def _explained(where: str, error: str, known: Sequence[str]) -> str:
    _, unknown, name = error.partition("no such column: ")
    if unknown:
        return f"where: no column {name!r}; there are {', '.join(sorted(known))}"
    return f"where {where!r}: {error}; write for example backend = 'flash' and ppl_increase_percent < 3"
