"""How sure a study's front is, to be drawn and said: the band within which nine of ten fronts lie that are drawn from
the rounds of confirming and the losses, as P(front) is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamllm.results.checks import checked_round
from streamllm.results.damaged import read_lines
from streamllm.results.front import objective_values
from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults

from .drawing.style import LABELS, NoDataError
from .recommendation import COSTS, recommended
from .tables.columns import BY_KEY, interval_decimals

if TYPE_CHECKING:
    import numpy as np

_SAME = 0.005
"""By how much a P(front) may differ from the one that is stored: of draws made elsewhere, by another version."""

_FARTHEST = 50.0
"""Logarithm of a ratio: of few rounds t has such tails that a draw's own ratio may be beyond what a float holds."""


@dataclass(frozen=True)
class Band:
    """In the units of the study's two objectives."""

    objectives: Mapping[str, str]
    """Name -> "minimize" or "maximize"."""
    corners: tuple[np.ndarray, ...]
    """(m, 2) each: of the regions that 5%, 50% and 95% of the drawn fronts attain, from the best in the first objective
    to the best in the second."""
    words: str
    """A sentence."""


def band(study: StudyResults) -> Band:
    """Raises NoDataError, for studies that were not confirmed too."""
    import numpy as np

    from streamllm.measuring.attainment import attained, thinned

    if len(study.objectives) != 2:
        raise NoDataError("of more than two objectives a front is no line")
    rows = sorted((row for row in study.trials if row.get("rounds")), key=lambda row: int(row["trial"]))
    if not rows:
        raise NoDataError("the front was not confirmed")
    ranked = _drawn(study, rows)
    shown = [_in_units(name, rows, ranked[..., place]) for place, name in enumerate(study.objectives)]
    fit = [place for place, row in enumerate(rows) if objective_values(row, study.objectives) is not None]
    if not fit:
        raise NoDataError("no confirmed trial is feasible")
    points = np.stack(shown, axis=-1)[:, fit]
    regions = attained(points)
    signs = np.array([-1.0 if direction == "maximize" else 1.0 for direction in study.objectives.values()])
    words = _words(study, [rows[place] for place in fit], points, regions, signs)
    return Band(study.objectives, tuple(signs * thinned(region) for region in regions), words)


def _drawn(study: StudyResults, rows: Sequence[AnyRow]) -> np.ndarray:
    """(draws, rows, objectives), to be minimised: what P(front) was made of. Raises NoDataError where that is gone."""
    import numpy as np

    from streamllm.measuring.certainty import front_probabilities
    from streamllm.measuring.draws import candidate_times, objective_draws
    from streamllm.measuring.quality import QualityComparison
    from streamllm.measuring.store import MeasurementStore

    rounds, _ = read_lines(study.files.rounds, checked_round)
    store = MeasurementStore(study.files.store)

    def losses(row: AnyRow) -> np.ndarray:
        return store.losses(row["quality_entry"])

    try:
        ratios = [{line: rounds[line]["ratios"][str(row["trial"])] for line in row["round_lines"]} for row in rows]
        _, times = candidate_times(ratios)
        comparison = QualityComparison(losses(study.strict or {}))
        drawn = [
            objective_draws(name, way, rows, times, comparison, losses, lambda row: store.arrays(row["quality_entry"]))
            for name, way in study.objectives.items()
        ]
    except (OSError, KeyError, ValueError):
        raise NoDataError("its rounds, or the losses in its store, are not all here") from None
    points = np.stack(drawn, axis=-1)
    known = [row.get("front_probability", np.nan) for row in rows]
    if not (np.isfinite(points).all() and np.allclose(front_probabilities(points), known, rtol=0, atol=_SAME)):
        raise NoDataError("its rounds, or the losses in its store, are not those that P(front) was made of")
    return points


def _in_units(name: str, rows: Sequence[AnyRow], draws: np.ndarray) -> np.ndarray:
    """(draws, rows), to be minimised: the values that tables show, off by as much as the draws of what they are ranked
    by. What all rows share, such as the reference's time, is taken as known: it moves the whole front."""
    import numpy as np

    from streamllm.measuring.draws import PAIRED

    def column(of: str) -> np.ndarray:
        return np.array([float(row[of]) for row in rows])

    ranked_by, _ = PAIRED.get(name, (name, ""))
    ratios = np.exp(np.clip(draws, -_FARTHEST, _FARTHEST))
    if ranked_by == "time_ratio":
        factor = ratios / column("time_ratio")
    elif ranked_by == "ppl_vs_strict_percent":
        factor = ratios / (1 + column("ppl_vs_strict_percent") / 100)
    else:
        return draws
    if name in COSTS:
        return np.asarray(100 * ((1 + column(name) / 100) * factor - 1))
    return np.asarray(-column(name) / factor if name == "speedup" else column(name) * factor)


def _words(
    study: StudyResults, rows: Sequence[AnyRow], points: np.ndarray, regions: Sequence[np.ndarray], signs: np.ndarray
) -> str:
    """What the band says where the second objective is as bad as that of the recommended trial may be."""
    import numpy as np

    from streamllm.measuring.attainment import best_within

    x, y = study.objectives
    chosen = recommended(study, study.front).row
    place = next((place for place, row in enumerate(rows) if chosen and row["trial"] == chosen["trial"]), 0)
    low, limit = np.quantile(points[:, place, 1], (0.025, 0.975))
    near, half, far = (signs[0] * best_within(region, limit) for region in regions)
    least, most = sorted((near, far))
    places = interval_decimals(least, most, BY_KEY[x].decimals or 0)
    where = f"{signs[1] * limit:.{interval_decimals(low, limit, BY_KEY[y].decimals or 0)}f}"
    measure, _, unit = LABELS[y].partition(", ")
    bound, better = ("at most" if signs[1] > 0 else "at least"), ("less" if signs[0] > 0 else "more")
    return (
        f"Of {len(points):,} fronts drawn from the measurements half attain {half:.{places}f} {_unit(x)} or {better} "
        f"where {measure} is {bound} {where}{unit and f' {unit}'.replace(' %', '%')}, the end of trial "
        f"{rows[place]['trial']}'s interval; nine of ten lie between {least:.{places}f} and {most:.{places}f} "
        f"there."
    )


def _unit(name: str) -> str:
    return BY_KEY[name].unit or BY_KEY[name].header


def data(found: Band, digits: int) -> list[list[list[float]]]:
    """The corners for the page's script, each to so many significant digits."""
    return [[[float(f"{value:.{digits}g}") for value in pair] for pair in region] for region in found.corners]
