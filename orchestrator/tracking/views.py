"""Views of the experiment that its tags keep, as MLflow's "share" button keeps one: a study's runs, and all fronts.

A view has a filter, an order, columns of the table and charts. MLflow 3.17 puts filter and order into the page's
address, unless that has some already, and takes columns and charts; which parents are unfolded, `runsExpanded`, it
leaves out of a view on purpose. Without charts of its own a view has a small bar chart of each of fifty metrics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from streamllm.results.schema import FIELDS, POLICY_KNOBS, told_name
from streamllm.results.study import FRONTS, VIEW, view_of

COLOR = "mlflow.runColor"
"""Tag of a run: the colour of its marks in charts."""
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195", "#8a949e")
"""Okabe and Ito's, which the colour-blind tell apart, but for yellow and black; and two more."""
_FIRST = ("tpot_ms", "front_probability", "ppl_vs_strict_percent", "method", "backend", *(k.name for k in POLICY_KNOBS))
_VIEWED = [*(FIELDS[name] for name in _FIRST), *(f for f in FIELDS.values() if f.viewed and f.name not in _FIRST)]
COLUMNS = (
    "tags.`pareto`",
    *(
        "attributes.`Dataset`" if field.name == "dataset" else f"{field.mlflow}s.`{field.tag or field.name}`"
        for field in _VIEWED
    ),
)
"""Columns of the table of runs, in this order: what a trial came to, what it is, the rest."""
RECOMMENDED = tuple(field.name for field in _VIEWED if field.mlflow == "metric" and field.name != "rounds")
"""Metrics of the recommended trial that the study's run has too, as `recommended/NAME`, to compare studies by."""


def views(study: str, objectives: Mapping[str, str]) -> dict[str, str]:
    """The tags of an experiment that keep the study's view, and that of the fronts of all studies.

    objectives: name -> "minimize" or "maximize"."""
    first, direction = next(iter(objectives.items()))
    order = {"orderByKey": f"metrics.`{told_name(first)}`", "orderByAsc": direction == "minimize"}
    shown = order | _charts([*objectives])
    of_study = {"searchFilter": f"tags.study = '{study}'", "selectedColumns": COLUMNS, "columnOrder": COLUMNS}
    columns = ("tags.`study`", *COLUMNS)
    of_all = {"searchFilter": "tags.pareto = 'True'", "selectedColumns": columns, "columnOrder": columns}
    return {
        f"{VIEW}{view_of(study)}": json.dumps(of_study | shown),
        f"{VIEW}{FRONTS}": json.dumps(of_all | shown),
    }


def next_color(tags: Mapping[str, str], study: str) -> str:
    """For a study that is new to the experiment with these tags: that of none of the studies before it, while there are
    colours."""
    others = {name for name in tags if name.startswith(VIEW)} - {f"{VIEW}{view_of(study)}", f"{VIEW}{FRONTS}"}
    return _COLORS[len(others) % len(_COLORS)]


def _charts(objectives: Sequence[str]) -> dict[str, Any]:
    """The first objective against each other one; below, lines from knobs to objectives."""
    common = {"deleted": False, "isGenerated": False, "metricSectionId": "fronts"}
    first, *others = objectives
    scatters = [
        {**common, "type": "SCATTER", "uuid": f"front-{name}", "xaxis": _axis(first), "yaxis": _axis(name),
         "runsCountToCompare": 100}
        for name in others
    ]  # fmt: skip
    knobs = {"selectedParams": [knob.name for knob in POLICY_KNOBS], "selectedMetrics": objectives}
    lines = {**common, "type": "PARALLEL", "uuid": "knobs", **knobs, "showAllRuns": False}
    section = {"uuid": "fronts", "name": "Fronts", "display": True, "isReordered": False, "deleted": False,
               "isGenerated": False, "columns": 1, "cardHeight": 480}  # fmt: skip
    return {
        "runsHiddenMode": "SHOW_ALL",  # else charts show the first ten runs
        "compareRunCharts": [*scatters, lines],
        "compareRunSections": [section],
    }


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}
