"""The recommended point of a front, why it is that one, and the command that measures it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .columns import BY_KEY
from .front import Row, confirmed, objective_values
from .study import StudyResults

_LEAST_BEND = 0.05
"""Of the normalised objectives: what bends less is a straight line for all that noise lets one see."""


@dataclass(frozen=True, slots=True)
class Knee:
    row: Row | None
    """None where the front has no knee."""
    why: str
    """A sentence for people."""


def knee(front: Sequence[Row], objectives: Mapping[str, str]) -> Knee:
    """The row farthest from the straight line between the front's ends towards the ideal, each objective normalised to
    0 at the front's best and 1 at its worst (Das 1999, "On characterizing the knee of the Pareto curve"); with three
    objectives, from the plane through the corners that are worst in one of them and best in the others."""
    points = [objective_values(row, objectives) for row in front]
    distinct = sorted({point for point in points if point is not None})
    if len(distinct) < 3:
        what = {0: "the front is empty", 1: "the front is one point", 2: "the front has two points only"}[len(distinct)]
        return Knee(None, f"No knee: {what}{', its ends' if len(distinct) == 2 else ''}.")
    best, worst = ([end(values) for values in zip(*distinct, strict=True)] for end in (min, max))
    spans = [high - low or 1.0 for low, high in zip(best, worst, strict=True)]
    bends = [
        1 - sum((value - low) / span for value, low, span in zip(point, best, spans, strict=True))
        for point in points
        if point is not None  # on a front none is
    ]
    deepest = max(bends)
    if deepest < _LEAST_BEND:
        return Knee(None, "No knee: no point of the front lies below the straight line between its ends by much.")
    row = front[bends.index(deepest)]
    return Knee(row, _why(row, front, objectives, deepest))


def reproduce_command(study: StudyResults, row: Row) -> str:
    """What to type to measure that trial again, beside its baseline."""
    source = study.configuration["source"]
    store = study.folder.parent / ".store"
    given = {
        "model": study.configuration["model"],
        "dtype": row["dtype"],
        "quantization": study.configuration["quantization"],
        "text": source["text"],
        "token-ids": source["token_ids"],
        "dataset-name": source["dataset_name"],
        "dataset-config": source["dataset_config"],
        "offset": source["offset"],
        "max-eval-tokens": source["max_eval_tokens"],
        "method": row["method"],
        "n-sink": row["n_sink"],
        "window-size": row["window_size"],
        "compress-every": row["compress_every"],
        "cache-slack": row["cache_slack"],
        "max-drop": row["max_drop"],
        "attn-backend": row["backend_requested"],
        "execution": row.get("execution", "eager"),
        "threads": row.get("threads"),
        "store": store if store != Path("sweeps/.store") else None,
    }
    usual = {"quantization": "none", "offset": 0, "execution": "eager"}
    flags = [
        f"--{flag}={value}" if str(value).startswith("-") else f"--{flag} {shlex.quote(str(value))}"
        for flag, value in given.items()
        if value is not None and usual.get(flag) != value
    ]
    return " ".join(("python -m streamllm evaluate --mode both", *flags))


def _why(row: Row, front: Sequence[Row], objectives: Mapping[str, str], bend: float) -> str:
    shown = []
    for name, direction in objectives.items():
        column, values = BY_KEY[name], [confirmed(one) for one in front]
        best = (max if direction == "maximize" else min)(values, key=lambda one: one[name])
        shown.append(f"{column.title} {column.text(confirmed(row))} where the best has {column.text(best)}")
    return (
        f"Trial {row['trial']} is recommended, the front's knee: of its {len(front)} points the farthest from the "
        f"straight line between the best in each objective ({bend:.0%} of the way to being best in all), with "
        f"{', and '.join(shown)}."
    )
