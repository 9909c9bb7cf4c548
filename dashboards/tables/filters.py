"""Filters over the rows of studies: those that meet a condition (`conditions.GRAMMAR`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

from streamllm.errors import UsageError
from streamllm.results.schema import FIELDS, AnyRow
from streamllm.results.study import StudyResults

from .conditions import EXAMPLE, ConditionError, condition

R = TypeVar("R", bound=AnyRow)

FRONT = "front"
"""The column that says whether a trial is on its study's front."""


def select(rows: Sequence[R], where: str, front: Sequence[AnyRow] = ()) -> list[R]:
    """The rows for which the condition is true. front: those of them that are on it. Raises UsageError."""
    try:
        is_met = condition(where, columns_of(rows), FIELDS)
    except ConditionError as error:
        raise UsageError(f"where {where!r}: {error}; write for example {EXAMPLE}") from None
    members = {row["trial"] for row in front}
    return [row for row in rows if is_met({**row, FRONT: row["trial"] in members})]


def columns_of(rows: Sequence[AnyRow]) -> list[str]:
    """Whatever some row has, and whether it is on the front."""
    return [*dict.fromkeys(chain(*rows, [FRONT]))]


def filtered(study: StudyResults, where: str | None) -> StudyResults:
    """The study as if it had only those trials. Raises UsageError."""
    if where is None:
        return study
    trials = select(study.trials, where, study.front)
    return StudyResults(study.name, study.folder, study.configuration, study.baseline, trials)  # no strict: not its own
