"""Limits on what is measured: whether a row keeps to them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .schema import AnyRow, number


@dataclass(frozen=True, slots=True)
class Constraint:
    """A limit on something measured."""

    metric: str
    relation: Literal["<=", ">="]
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.limit:g}"

    def excess(self, row: AnyRow) -> float:
        """How far the row violates it: above 0 if it does, infinite where the metric is missing or not finite."""
        value = number(row, self.metric)
        if value is None:
            return math.inf
        return value - self.limit if self.relation == "<=" else self.limit - value


def judged(row: AnyRow, constraints: Iterable[Constraint]) -> dict[str, bool | str]:
    """Whether the measured row is `feasible`; if not, what is `violated`."""
    violated = [str(constraint) for constraint in constraints if constraint.excess(row) > 0]
    return {"feasible": False, "violated": ", ".join(violated)} if violated else {"feasible": True}
