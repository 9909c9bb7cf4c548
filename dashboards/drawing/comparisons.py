"""Bars of methods and attention backends side by side, per data set: everything at one policy, by one protocol."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from streamllm.files import Scalar
from streamllm.results.schema import FIELDS, POLICY_KNOBS, POLICY_WORDS, AnyRow, knobs_in_short, number, words_of

from ..tables.columns import interval_decimals
from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HATCHES,
    LABELS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    NoDataError,
    grid,
    medium,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = "recompute"
BASELINE_LABEL = "re-computation (baseline)"
_NAMES = {BASELINE: BASELINE_LABEL, "ours": "StreamingLLM", "streaming": "StreamingLLM", "mit": "MIT"}
_COLORS = {BASELINE: GREY, "ours": BLUE, "streaming": BLUE, "mit": ORANGE, "kvpress": VERMILLION, "ring": GREEN}
_COLORS |= {"kvpress_shim": VERMILLION, "window": PURPLE, "dense": SKY, "recommended": BLACK}
_ORDER = [BASELINE, "mit", "kvpress", "kvpress_shim", "ours", "streaming", "ring", "window", "dense", "recommended"]
_KNOBS = tuple(field.name for field in (*POLICY_KNOBS, *POLICY_WORDS))
_TIMED_AS_ONE = ("fast", "decode-loop", "chunked", None)
"""Protocols of the `fixed_eval` figures, of which that counts of which there are results first."""


@dataclass(frozen=True)
class Series:
    method: str
    backend: str
    execution: str = "eager"
    quantization: str = "none"
    name: str = ""
    """Instead of one made of the others."""

    @property
    def label(self) -> str:
        if self.name:
            return self.name
        if self.method == BASELINE:
            return BASELINE_LABEL
        words = (self.backend, self.execution, self.quantization)
        how = ", ".join(word for word in words if word not in ("", "eager", "none"))
        how = how or self.backend
        return f"{_NAMES.get(self.method, self.method)}{f' ({how})' if how else ''}"

    @property
    def order(self) -> tuple[int, str, str, str, bool, str]:
        place = _ORDER.index(self.method) if self.method in _ORDER else len(_ORDER)
        return place, self.method, self.execution, self.quantization, self.backend == "flash", self.backend


@dataclass(frozen=True)
class Group:
    """Results shown side by side."""

    title: str
    rows: dict[Series, AnyRow]


def comparison(
    rows: Sequence[AnyRow], metrics: Sequence[str], protocols: Sequence[str | None] = _TIMED_AS_ONE
) -> Figure:
    """A panel per metric. Raises NoDataError if nothing but a baseline has the first of them."""
    groups = comparable(rows, protocols, metrics[0])
    kinds = sorted({series for group in groups for series in group.rows}, key=lambda series: series.order)
    lines, columns = grid(len(metrics))
    count = sum(len(group.rows) for group in groups)
    width = max(5.0 if columns == 1 else 3.8, 0.45 * count + 1.2)
    across = min(len(metrics), 2)
    ncols = 1 if medium().is_narrow else 2 * columns
    legend = 0.25 * math.ceil(len(kinds) / ncols)
    figure = new_figure(across * width, 2.9 * math.ceil(len(metrics) / 2) + legend, len(metrics))
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for metric, axes in zip(metrics, panels, strict=False):
        bars(axes, groups, kinds, metric)
    for axes in list(panels)[len(metrics) :]:
        axes.remove()
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [series.label for series in kinds if series.label in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=min(ncols, len(names)))
    return figure


def comparable(rows: Sequence[AnyRow], protocols: Sequence[str | None], metric: str) -> list[Group]:
    """Per model and data set what was measured by the first protocol there is, at the policy that most series share,
    and the recommended trial. Raises NoDataError."""
    having = [row for row in rows if _sound(row) and number(row, metric)]
    places: dict[tuple[str, str], list[AnyRow]] = defaultdict(list)
    for row in having:
        if row.get("protocol") in protocols:
            places[str(row.get("model", "")), str(row.get("dataset", ""))].append(row)
    models = {model for model, _ in places}
    groups = []
    for (model, dataset), candidates in sorted(places.items()):
        protocol = min((row.get("protocol") for row in candidates), key=list(protocols).index)
        chosen, policy = _at_shared_policy([row for row in candidates if row.get("protocol") == protocol])
        if any(series.method != BASELINE for series in chosen):
            where = f"{model.rpartition('/')[2]}, {dataset}" if len(models) > 1 else dataset
            groups.append(Group(f"{where}\n{policy}", chosen))
    if not groups:
        kind = f" by protocol {protocols[0]}" if len(protocols) == 1 else ""
        raise NoDataError(
            f"no result but a baseline's with {metric}{kind}" if places else f"no result with {metric}{kind}"
        )
    return groups


def _at_shared_policy(rows: Sequence[AnyRow]) -> tuple[dict[Series, AnyRow], str]:
    """If several trials of a series use that policy, the last one counts."""
    policies: dict[tuple[Scalar, ...], dict[Series, AnyRow]] = defaultdict(dict)
    always: dict[Series, AnyRow] = {}
    recommended = ""
    for row in rows:
        how = (("method", ""), ("backend", ""), ("execution", "eager"), ("quantization", "none"))
        series = Series(*(str(row.get(name, usual)) for name, usual in how))
        if series.method == BASELINE:
            always[Series(BASELINE, "")] = row
            continue
        policies[tuple((words_of(row) | dict(row)).get(knob) for knob in _KNOBS)][series] = row
        if row.get("recommended"):
            always[Series("recommended", "")] = row
            recommended = f"\nrecommended: {series.method} {series.backend}\n{_policy(row)}"
    if not policies:
        return always, ""
    # of equally many the plainest: vanilla StreamingLLM before lazy pruning
    policy = min(policies, key=lambda knobs: (-len(policies[knobs]), [knob or 0 for knob in knobs[2:]], str(knobs)))
    return always | policies[policy], _policy(dict(zip(_KNOBS, policy, strict=True))) + recommended


def _policy(row: AnyRow) -> str:
    """Slack and max drop where they are not 0."""
    said = {knob: row.get(knob) for knob in _KNOBS if row.get(knob) or FIELDS[knob].usual != 0}
    return knobs_in_short(said, symbols=True)


def bars(
    axes: Axes,
    groups: Sequence[Group],
    kinds: Sequence[Series],
    metric: str,
    colors: Mapping[Series, str] | None = None,
) -> None:
    """Next to one another within a group, with their values and intervals; in the methods' colours, or `colors`, and
    each with a hatch of its own."""
    place, ticks = 0.0, []
    for group in groups:
        start = place
        for series, hatch in zip(kinds, cycle(HATCHES)):
            row = group.rows.get(series)
            value = number(row, metric) if row is not None else None
            if row is None or value is None or (series.method == BASELINE and metric == "ppl_increase_percent"):
                continue
            low, high = (number(row, f"{metric}_{end}") for end in ("low", "high"))
            if low is None or high is None:
                low = high = value
            errors = [[max(value - low, 0)], [max(high - value, 0)]] if low < high else None
            color = (colors or {}).get(series) or _COLORS.get(series.method, SKY)
            axes.bar(
                place, value, 0.85, yerr=errors, label=series.label, color=color, edgecolor="white",
                hatch=hatch, error_kw={"elinewidth": 0.8, "capsize": 2, "ecolor": "0.35"},
            )  # fmt: skip
            text = f"{value:.3g}" if errors is None else f"{value:.{interval_decimals(low, high, 2)}f}"
            text = text.lstrip("-") if float(text) == 0 else text
            end, side, at = (
                (min(low, value), "top", -2) if value < 0 and high < 0 else (max(value, high, 0), "bottom", 2)
            )
            axes.annotate(text, (place, end), (0, at), textcoords="offset points", ha="center", va=side, fontsize=7)
            place += 1
        if place > start:
            ticks.append(((start + place - 1) / 2, group.title))
        place += 1
    axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_title(LABELS[metric])


def runtime(rows: Sequence[AnyRow]) -> Figure:
    """The time per token; where results have none, as the source documents', the runtime. Raises NoDataError."""
    try:
        return comparison(rows, ("tpot_ms",))
    except NoDataError:
        return comparison(rows, ("runtime_sec",), protocols=("chunked", None))


def backends(rows: Sequence[AnyRow]) -> Figure:
    """Time per token of the trials that differ in nothing but math or flash. Raises NoDataError."""
    pairs: dict[tuple[Scalar, ...], dict[str, AnyRow]] = defaultdict(dict)
    for row in rows:
        if _sound(row) and row.get("backend") in ("math", "flash") and number(row, "tpot_ms"):
            names = ("model", "dataset", "protocol", "method", "execution", "quantization", *_KNOBS)
            said = words_of(row) | dict(row)
            pairs[tuple(said.get(name) for name in names)][row["backend"]] = row
    both = [pair for pair in pairs.values() if len(pair) == 2 and pair["math"]["method"] != BASELINE][:_PAIRS]
    if not both:
        raise NoDataError("no two results that differ in nothing but the backend, math and flash")
    datasets = {pair["math"].get("dataset") for pair in both}
    groups = [
        Group(
            f"{pair['math'].get('dataset')}\n" * (len(datasets) > 1)
            + f"{pair['math']['method']}\n"
            + _policy(pair["math"]).replace(" ", "\n"),
            {Series("ours", backend): row for backend, row in pair.items()},
        )
        for pair in both
    ]
    figure = new_figure(max(4.5, 0.95 * len(groups) + 1), 3.6)
    axes = figure.subplots()
    bars(axes, groups, [Series("ours", "math"), Series("ours", "flash")], "tpot_ms")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return figure


_PAIRS = 10


def _sound(row: AnyRow) -> bool:
    """Whether it is complete, and nothing that it measured is not finite."""
    measured = [name for name in ("perplexity", "tpot_ms", "ppl_increase_percent") if name in row]
    return row.get("state") == "complete" and all(number(row, name) is not None for name in measured)
