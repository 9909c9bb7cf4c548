"""The Pareto front: which trials nobody beats on every objective at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from .schema import AnyRow, number

R = TypeVar("R", bound=AnyRow)


def pareto_front(rows: Sequence[R], objectives: Mapping[str, str]) -> list[R]:
    """The complete, feasible rows that no other one dominates, best first in the first objective. Of rows with equal
    objectives all are kept; rows with a missing, NaN or infinite objective are never on the front.

    Where a row has a confirmed value of an objective, that one counts.

    objectives: name -> "minimize" or "maximize".
    """
    pairs = [(point, row) for row in rows if (point := objective_values(row, objectives)) is not None]
    if not pairs:
        return []
    import moocore
    import numpy as np

    pairs.sort(key=lambda pair: pair[0])
    kept = moocore.is_nondominated(np.array([point for point, _ in pairs]), keep_weakly=True)
    return [row for (_, row), is_kept in zip(pairs, kept, strict=True) if is_kept]


def dominators(rows: Sequence[AnyRow], front: Sequence[R], objectives: Mapping[str, str]) -> list[R | None]:
    """For each row the front's best one, in the first objective, of those that dominate it; None where none does."""
    import numpy as np

    nowhere = (math.nan,) * len(objectives)
    points = np.array([objective_values(row, objectives) or nowhere for row in rows]).reshape(-1, len(objectives))
    pairs = [(point, row) for row in front if (point := objective_values(row, objectives)) is not None]
    found: list[R | None] = [None] * len(rows)
    left = np.arange(len(rows))
    for point, better in sorted(pairs, key=lambda pair: pair[0]):
        columns = points[left].T
        beaten = np.all([column >= value for column, value in zip(columns, point, strict=True)], axis=0)
        beaten &= np.any([column > value for column, value in zip(columns, point, strict=True)], axis=0)
        for index in left[beaten]:
            found[index] = better
        left = left[~beaten]
    return found


def study_front(rows: Sequence[R], objectives: Mapping[str, str]) -> list[R]:
    """The front of a study's trials: of the confirmed ones, where there are any, those that no other dominates and that
    can be told apart (`certainty.told_apart_front`); else the plain front. Best first in the first objective."""
    confirmed = [row for row in rows if row.get("rounds")]
    if not confirmed:
        return pareto_front(rows, objectives)
    import numpy as np

    from ..measuring.certainty import told_apart_front

    feasible = [row for row in confirmed if objective_values(row, objectives) is not None]
    if not feasible:
        return []
    places = {row["trial"]: index for index, row in enumerate(feasible)}
    not_told = [[places[trial] for trial in row.get("not_told_from", ()) if trial in places] for row in feasible]
    probabilities = np.array([row.get("front_probability", 1.0) for row in feasible])
    points = np.array([objective_values(row, objectives) for row in feasible])
    members = [feasible[index] for index in told_apart_front(points, not_told, probabilities)]
    return pareto_front(members, objectives)  # in its order


def hypervolume(rows: Sequence[AnyRow], objectives: Mapping[str, str], reference: Mapping[str, float]) -> float:
    """The volume, in the product of the objectives' units, between the front and a reference point that is worse than
    it: of the front's two or more objectives, the part that its rows dominate. Rows no better than the reference in
    every objective add nothing; no rows have volume 0.

    reference: objective -> value, each in its own direction.
    """
    corner = objective_values({"state": "complete"} | dict(reference), objectives)
    if corner is None:
        raise ValueError(f"reference {dict(reference)}: needs a finite value of each of {', '.join(objectives)}")
    points = [point for row in rows if (point := objective_values(row, objectives)) is not None]
    if not points:
        return 0.0
    import moocore
    import numpy as np

    return float(moocore.hypervolume(np.array(points), ref=np.array(corner)))


def objective_values(row: AnyRow, objectives: Mapping[str, str]) -> tuple[float, ...] | None:
    """The row's objectives, all to be minimised; None if it cannot be on a front."""
    if row.get("state") != "complete" or not row.get("feasible", True):
        return None
    signs = {name: -1.0 if direction == "maximize" else 1.0 for name, direction in objectives.items()}
    values = tuple(sign * value for name, sign in signs.items() if (value := number(row, name)) is not None)
    return values if len(values) == len(objectives) else None
