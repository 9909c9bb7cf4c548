"""Rows that different kinds of worker timed, told apart: by a letter each, in a column, and a note of what it means.

A time is a ratio to the reference's on the same worker, which on another device, with other threads or under another
torch may be another ratio. Where all are of one kind, nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from streamllm.measuring.reference_time import WORKER
from streamllm.results.schema import AnyRow

from .columns import Column

TIMED_ON = Column("timed_on", "timed on", words=True)
SPELLED_OUT = tuple(map(Column.of, WORKER))
"""For files that programs read."""

Kind = tuple[str | int | None, ...]


def letters(studies: Sequence[Sequence[AnyRow]]) -> dict[Kind, str]:
    """Kind -> letter, in the order of the rows; empty where no study has rows of several."""
    kinds = [dict.fromkeys(kind for row in rows if (kind := _kind(row)) is not None) for rows in studies]
    if all(len(of_study) < 2 for of_study in kinds):
        return {}
    distinct = dict.fromkeys(kind for of_study in kinds for kind in of_study)
    return {kind: _letter(number) for number, kind in enumerate(distinct)}


def marked(rows: Sequence[AnyRow], known: Mapping[Kind, str]) -> list[AnyRow]:
    """Each row with its letter as `timed_on`, where there are any."""
    return [row if (letter := known.get(_kind(row) or ())) is None else {**row, "timed_on": letter} for row in rows]


def notes(known: Mapping[Kind, str]) -> list[str]:
    """Explains the letters to people."""
    said = [f"Timed on {letter}: {described(dict(zip(WORKER, kind, strict=True)))}." for kind, letter in known.items()]
    return [*said, "Times of different kinds of worker do not compare."] if said else []


def described(row: AnyRow) -> str:
    """Device, threads and versions, as far as they are known."""
    count = row.get("threads")
    threads = f"{count} thread{'s' * (count > 1)}" if count else None
    return ", ".join(str(part) for part in (row.get("device"), threads, row.get("software")) if part) or "not known"


def _kind(row: AnyRow) -> Kind | None:
    """None of a row without a time."""
    if row.get("state") != "complete" or not row.keys() & {"time_ratio", "tpot_ms"}:
        return None
    return tuple(row.get(name) for name in WORKER)


def _letter(number: int) -> str:
    """A to Z, then A1 to Z1 and so on."""
    return f"{ascii_uppercase[number % 26]}{number // 26 or ''}"
