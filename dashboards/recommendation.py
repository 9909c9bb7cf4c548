"""The recommended point of a front, why it is that one, and the command that measures it again.

It is the front's knee where there is one; else the fastest that costs no quality that can be measured; else the one
that costs least. With a limit to the perplexity increase it is the fastest within that.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from streamllm.configuration import Configuration
from streamllm.measuring.text import TextSource
from streamllm.policy import WORDS
from streamllm.results.front import objective_values
from streamllm.results.schema import FIELDS, AnyRow, number
from streamllm.results.study import StudyResults

from .tables.columns import BY_KEY, Column

MEASURED_BY = "Measured again by: "
"""Begins a line with a command."""

_LEAST_BEND = 0.05
"""Least bend of the normalised objectives: anything that bends less is a straight line for all that noise lets one
see."""
_LIKELY = 0.5
"""P(front) below which another is recommended, if one is left."""
COSTS = ("ppl_vs_strict_percent", "ppl_increase_percent")
"""Measures of lost quality, 0 being no loss; the first that a row has counts. The former has the narrower interval."""
QUALITIES = (*COSTS, "perplexity")
_SPEED = ("tpot_ms", "speedup")
_SUPERLATIVES = dict.fromkeys(_SPEED, "fastest") | dict.fromkeys(("peak_kv", "peak_memory_mb"), "smallest")
_SUPERLATIVES |= {"ttft_ms": "first to answer", "joules_per_token": "most frugal"}


@dataclass(frozen=True, slots=True)
class Recommendation:
    row: AnyRow | None
    """None where the front is empty."""
    kind: str
    """knee; no cost (in quality, of the fastest); least cost, where all have one; quality unknown; only (of the front);
    within limit; nearest to limit; none."""
    why: str
    """A sentence or two for people."""


def recommend(
    front: Sequence[AnyRow], objectives: Mapping[str, str], max_ppl_increase: float | None = None
) -> Recommendation:
    """Recommends a row of every front that is not empty.

    max_ppl_increase: over re-computation, in percent; the recommended one then is the fastest within that."""
    if not front:
        return Recommendation(None, "none", "Nothing is recommended: the front is empty, no trial is on it.")
    if max_ppl_increase is None:
        return _balanced(front, objectives)
    if all(number(row, "ppl_increase_percent") is None for row in front):
        found = _balanced(front, objectives)
        unknown = f"The limit of {max_ppl_increase:g}% says nothing, as no point was compared with re-computation."
        return Recommendation(found.row, found.kind, f"{unknown} {found.why}")
    return _within(front, objectives, max_ppl_increase)


def recommended(study: StudyResults, front: Sequence[AnyRow], max_ppl_increase: float | None = None) -> Recommendation:
    """Recommends from a study's front, which is computed only once; within the limit the sweep was given, unless
    another is."""
    limit = study.configuration.get("max_ppl_increase") if max_ppl_increase is None else max_ppl_increase
    return recommend(front, study.objectives, limit)


def advice(study: StudyResults, found: Recommendation) -> list[str]:
    """Lines to print: why, and the command."""
    if found.row is None:
        return [found.why]
    return [found.why, MEASURED_BY + reproduce_command(study, found.row)]


class Record(TypedDict):
    trial: int | str | None
    kind: str
    why: str
    command: str | None


def record(study: StudyResults, found: Recommendation) -> Record:
    """For JSON; trial and command are None where nothing is recommended."""
    row = found.row
    return {
        "trial": None if row is None else row["trial"],
        "kind": found.kind,
        "why": found.why,
        "command": None if row is None else reproduce_command(study, row),
    }


def reproduce_command(study: StudyResults, row: AnyRow) -> str:
    """The command that measures that trial again, beside its baseline."""
    settings, what, store = study.configuration, Configuration.of_row(row), study.files.store
    given = {
        "model": settings["model"],
        "dtype": row.get("dtype"),
        "quantization": what.quantization or settings["quantization"],
        **settings.get("source", {}),
        "method": what.method,
        **asdict(what.policy),
        "attn_backend": what.backend,
        "execution": what.execution,
        "threads": row.get("threads"),
        "store": store if store.resolve() != Path("sweeps/.store").resolve() else None,
    }
    unsaid = asdict(TextSource()) | {name: FIELDS[name].usual for name in ("quantization", "execution", *WORDS)}
    said = {name: value for name, value in given.items() if value is not None and value != unsaid.get(name)}
    flags = (_flag(name.replace("_", "-"), str(value)) for name, value in said.items())
    return " ".join(("python -m streamllm evaluate --mode both", *flags))


def _flag(name: str, value: str) -> str:
    return f"--{name}={shlex.quote(value)}" if value.startswith("-") else f"--{name} {shlex.quote(value)}"


def _balanced(front: Sequence[AnyRow], objectives: Mapping[str, str]) -> Recommendation:
    if len(front) == 1:
        shown = _with(front[0], (*objectives, cost_of(front[0]), "front_probability"))
        return _of(front[0], "only", f"it alone is on the front, no other trial beats it in anything, {shown}")
    bends, no_knee = _bends(front, objectives)
    if no_knee:
        return _cheapest(front, objectives, no_knee)
    deepest = max(bends)
    row = front[bends.index(deepest)]
    return Recommendation(row, "knee", _why_knee(row, front, objectives, deepest))


def _bends(front: Sequence[AnyRow], objectives: Mapping[str, str]) -> tuple[list[float], str]:
    """How far each row lies from the straight line between the front's ends towards the ideal, each objective
    normalised to 0 at the front's best and 1 at its worst (Das 1999, "On characterizing the knee of the Pareto curve");
    with three objectives, from the plane through the corners that are worst in one of them and best in the others.
    And why there is no knee, if there is none."""
    points = [objective_values(row, objectives) for row in front]
    distinct = sorted({point for point in points if point is not None})
    if len(distinct) < 3:
        return [], "its points are equals" if len(distinct) < 2 else "it has two points only, its ends"
    best, worst = ([end(values) for values in zip(*distinct, strict=True)] for end in (min, max))
    spans = [high - low or 1.0 for low, high in zip(best, worst, strict=True)]
    bends = [
        1 - sum((value - low) / span for value, low, span in zip(point, best, spans, strict=True))
        for point in points
        if point is not None  # on a front none is
    ]
    straight = "none of its points lies below the straight line between its ends by much"
    return bends, straight if max(bends) < _LEAST_BEND else ""


def _cheapest(front: Sequence[AnyRow], objectives: Mapping[str, str], no_knee: str) -> Recommendation:
    """The recommendation for a front without a knee."""
    priced = [row for row in front if cost_of(row)]
    free = [row for row in priced if least_cost(row) <= 0]
    goal = _Goal.of(objectives)
    if free:
        row = goal.best(_likely(free))
        kind, why = "no cost", f"of the front's points that cost no measurable quality the {goal.superlative}"
    elif priced:
        row = min(_likely(priced), key=lambda one: (one[cost_of(one)], goal.value(one)))
        kind, why = (
            "least cost",
            "all points of the front cost quality, by more than their intervals, and it costs least",
        )
    else:
        row = goal.best(_likely(front))
        kind, why = "quality unknown", f"the {goal.superlative} of the front, at a cost in quality that nobody measured"
    shown = _with(row, (goal.name, cost_of(row), "front_probability"))
    more = _passed_over(front, row, goal) if kind == "no cost" else ""
    return _of(row, kind, f"{why}, {shown}; the front has no knee, as {no_knee}", more)


def _within(front: Sequence[AnyRow], objectives: Mapping[str, str], limit: float) -> Recommendation:
    known = [row for row in front if number(row, "ppl_increase_percent") is not None]
    inside = [row for row in known if row["ppl_increase_percent"] <= limit]
    goal = _Goal.of(objectives)
    names = (goal.name, "ppl_increase_percent", "front_probability")
    if inside:
        row = goal.best(inside)
        why = f"the {goal.superlative} of the front whose perplexity is at most {limit:g}% above re-computation's"
        return _of(row, "within limit", f"{why}, {_with(row, names)}")
    row = min(known, key=lambda one: (one["ppl_increase_percent"], goal.value(one)))
    why = (
        f"No point of the front has a perplexity of at most {limit:g}% above re-computation's: trial {row['trial']} "
        f"comes nearest, {_with(row, names)}."
    )
    return Recommendation(row, "nearest to limit", why)


@dataclass(frozen=True, slots=True)
class _Goal:
    """The aim besides quality: the objective that is a time, or the first that is something else."""

    name: str
    direction: str

    @classmethod
    def of(cls, objectives: Mapping[str, str]) -> _Goal:
        names = [name for name in objectives if name not in QUALITIES]
        name = next((name for name in names if name in _SPEED), names[0] if names else _SPEED[0])
        return cls(name, objectives.get(name, "minimize"))

    @property
    def superlative(self) -> str:
        return _SUPERLATIVES.get(self.name, "best")

    def value(self, row: AnyRow) -> float:
        """The less the better."""
        return (objective_values(row, {self.name: self.direction}) or (math.inf,))[0]

    def best(self, rows: Sequence[AnyRow]) -> AnyRow:
        return min(rows, key=self.value)


def _likely(rows: Sequence[AnyRow]) -> Sequence[AnyRow]:
    """Those that are on the front in at least half of the draws, if any is."""
    return [row for row in rows if row.get("front_probability", 1.0) >= _LIKELY] or rows


def _passed_over(front: Sequence[AnyRow], chosen: AnyRow, goal: _Goal) -> str:
    """A sentence about the best in what is wanted, where another was chosen."""
    best = goal.best(front)
    if goal.value(best) >= goal.value(chosen):
        return ""
    reason, name = (
        ("is seldom on the front", "front_probability") if least_cost(best) <= 0 else ("costs", cost_of(best))
    )
    return f"Trial {best['trial']} is the {goal.superlative}, but {reason}, {_with(best, (goal.name, name))}."


def cost_of(row: AnyRow) -> str:
    """The measure of what the row costs in quality; empty if it has none."""
    return next((name for name in COSTS if number(row, name) is not None), "")


def least_cost(row: AnyRow) -> float:
    """The least that the row may cost in quality: the low end of its interval; NaN if that is unknown."""
    name = cost_of(row)
    return float(row.get(f"{name}_low", row[name])) if name else math.nan


def _of(row: AnyRow, kind: str, why: str, more: str = "") -> Recommendation:
    return Recommendation(row, kind, f"Trial {row['trial']} is recommended: {why}.{f' {more}' if more else ''}")


def _with(row: AnyRow, names: Sequence[str]) -> str:
    """The row's values, with intervals, of those that it has."""
    shown = [(_column(name), row) for name in dict.fromkeys(names) if name]
    values = [f"{column.title} {text}" for column, row in shown if (text := column.text(row))]
    return f"with {', '.join(values[:-1])}{' and ' if values[1:] else ''}{values[-1]}" if values else ""


def _column(name: str) -> Column:
    return BY_KEY.get(name, Column(name, name, "", 2, interval=True))


def _why_knee(row: AnyRow, front: Sequence[AnyRow], objectives: Mapping[str, str], bend: float) -> str:
    shown = []
    for name, direction in objectives.items():
        column, best = _column(name), (max if direction == "maximize" else min)(front, key=lambda one: one[name])
        shown.append(f"{column.title} {column.text(row)} where the best has {column.text(best)}")
    return (
        f"Trial {row['trial']} is recommended, the front's knee: of its {len(front)} points the farthest from the "
        f"straight line between the best in each objective ({bend:.0%} of the way to being best in all), with "
        f"{', and '.join(shown)}."
    )
