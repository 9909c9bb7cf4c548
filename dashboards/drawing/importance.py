"""How much of an objective's variation each knob accounts for by itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from random import Random
from typing import TYPE_CHECKING

from streamllm.files import Scalar
from streamllm.results.schema import POLICY_WORDS, AnyRow, number, told_name, words_of
from streamllm.results.study import StudyResults

from ..recommendation import COSTS
from .style import BLUE, HATCHES, LABELS, ORANGE, PURPLE, NoDataError, medium, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KNOBS = (
    "method",
    "backend",
    "execution",
    "quantization",
    "n_sink",
    "compress_every",
    "cache_slack",
    "max_drop",
    *(field.name for field in POLICY_WORDS),
    "total_kv",
)
_SHOWN = {"attn_backend": "backend"}
"""Knobs of spaces, by the name of the measure that has them."""
_OF_SPACE = (
    "share of the variance between the knob's values, %\n"
    "(Sobol's first-order index over the whole space, of what the search's model expects)"
)
_OF_TRIALS = (
    "share of the variance of the logarithm between the knob's values, %\n"
    "(epsilon squared, of the search's values; hollow: no more than chance brings in one of 20 cases)"
)
_FEWEST = 12
"""Trials: of fewer, chance alone explains as much as a knob."""


def importance(study: StudyResults) -> Figure:
    """Bars per knob and objective: of the whole space, as far as the study's sampler can tell what it was not told;
    else of the trials. Raises NoDataError for too few trials."""
    rows = [row for row in study.searched or study.trials if row["trial"] != "baseline"]
    names = {name: told_name(name) for name in study.objectives}
    known = study.configuration.get("effects", {})
    is_expected = all(name in known for name in names.values())
    if is_expected:
        shares = {
            name: {_SHOWN.get(knob, knob): share for knob, share in known[told].items()} for name, told in names.items()
        }
    else:
        shares = {name: main_effects(rows, name) for name in names}
    shares = {name: by_knob for name, by_knob in shares.items() if by_knob}
    if not shares:
        raise NoDataError(f"fewer than {_FEWEST} complete trials, or no knob has several values")
    knobs = sorted(
        {k for by_knob in shares.values() for k in by_knob}, key=lambda k: max(s.get(k, 0) for s in shares.values())
    )
    figure = new_figure(7, 0.42 * len(knobs) + 1.5)
    axes = figure.subplots()
    height = 0.8 / len(shares)
    for index, ((name, by_knob), color) in enumerate(zip(shares.items(), (BLUE, ORANGE, PURPLE), strict=False)):
        places = [place + 0.4 - height * (index + 0.5) for place in range(len(knobs))]
        values = [100 * by_knob.get(knob, 0) for knob in knobs]
        chance = {} if is_expected else chance_effects(rows, name)
        bars = axes.barh(
            places,
            values,
            height,
            color=color,
            label=LABELS[name].partition(",")[0],
            hatch=HATCHES[index],
            edgecolor="white",
        )
        untold = [by_knob.get(knob, 0) <= chance.get(knob, 0) and not is_expected for knob in knobs]
        for bar, hollow in zip(bars, untold, strict=True):
            if hollow:
                bar.set(facecolor="none", edgecolor=color)
        words = (
            "chance" if hollow and value >= 0.5 else f"{value:.0f}"
            for value, hollow in zip(values, untold, strict=True)
        )
        axes.bar_label(bars, list(words), padding=2, fontsize=7)
    axes.set_yticks(range(len(knobs)), [LABELS[knob].partition(",")[0] for knob in knobs])
    axes.set_xlim(0, 100)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(_OF_SPACE if is_expected else _OF_TRIALS)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1 if medium().is_narrow else 3)
    return figure


def main_effects(rows: Sequence[AnyRow], objective: str) -> dict[str, float]:
    """For each knob with several values, the share of the objective's variance between its values: epsilon squared
    (Kelley 1935), which is 0 on average for a knob without effect. Of logarithms, since effects are factors.

    The window is no knob but what the others leave of the total. What a sampler tries together is not told apart, and
    shares need not add up to one. Empty where there are too few trials."""
    shares = {knob: _epsilon_squared(groups) for knob, groups in _groups(rows, objective).items()}
    return {knob: share for knob, share in shares.items() if share is not None}


def chance_effects(rows: Sequence[AnyRow], objective: str, shuffles: int = 200) -> dict[str, float]:
    """The effect that `main_effects` reaches in 5% of cases where the knob has none: with the objective's values
    shuffled."""
    found = {}
    for knob, groups in _groups(rows, objective).items():
        random, every = Random(0), [value for group in groups.values() for value in group]
        shares = []
        for _ in range(shuffles):
            random.shuffle(every)
            values = iter(every)
            shuffled = {level: list(islice(values, len(group))) for level, group in groups.items()}
            shares.append(_epsilon_squared(shuffled) or 0.0)
        found[knob] = sorted(shares)[int(0.95 * shuffles)]
    return found


def _groups(rows: Sequence[AnyRow], objective: str) -> dict[str, dict[Scalar, list[float]]]:
    """Knob -> value -> the objective's logarithms; of knobs with several values, where there are trials enough."""
    values = {row["trial"]: v for row in rows if (v := _logarithm(row, objective)) is not None}
    if len(values) < _FEWEST:
        return {}
    by_knob: dict[str, dict[Scalar, list[float]]] = {knob: defaultdict(list) for knob in _KNOBS}
    for row in rows:
        if row["trial"] in values:
            total = row["n_sink"] + row["window_size"] + row["cache_slack"]
            knobs = {"total_kv": total, **words_of(row), **row}
            for knob in _KNOBS:
                by_knob[knob][knobs.get(knob)].append(values[row["trial"]])
    return {knob: groups for knob, groups in by_knob.items() if len(groups) > 1}


def _logarithm(row: AnyRow, objective: str) -> float | None:
    value = number(row, objective)
    if row.get("state") != "complete" or value is None:
        return None
    value = 1 + value / 100 if objective in COSTS else value
    return math.log(value) if value > 0 else None


def _epsilon_squared(groups: Mapping[Scalar, Sequence[float]]) -> float | None:
    every = [value for group in groups.values() for value in group]
    if len(every) <= len(groups):
        return None
    mean = sum(every) / len(every)
    means = {level: sum(group) / len(group) for level, group in groups.items()}
    total = sum((value - mean) ** 2 for value in every)
    within = sum((value - means[level]) ** 2 for level, group in groups.items() for value in group)
    chance = (len(groups) - 1) * within / (len(every) - len(groups))
    return max(total - within - chance, 0.0) / total if total > 0 else 0.0
