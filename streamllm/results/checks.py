"""Whether the files of a study say what they can say: each check takes what JSON holds, and raises ValueError, or
NewerFormatError, with the reason."""

from __future__ import annotations

import math
from typing import Any

from .schema import FIELDS, POLICY_KNOBS, Row, can_be_objective, is_date, is_score

_ROUND_TIMES = ("measured_tpot_ms", "reference_tpot_ms", "pairs", "timed_at", "load")
"""Keys that the times in a round have at least."""


def checked_row(values: object) -> Row:
    """A row of a trial, or of what trials are compared with. Raises ValueError."""
    row = Row.checked(values)
    if not isinstance(row.trial, int) and row.trial not in ("strict", "baseline"):
        raise ValueError(f"trial {row.trial!r}: no number of a trial")
    return row


def measured_row(values: object) -> Row:
    """A row of `trials.jsonl`, with what is known of every trial. Raises ValueError."""
    row = checked_row(values)
    if row.state not in ("complete", "failed"):
        raise ValueError(f"state {row.state!r}: must be complete or failed")
    knobs = ["method", "backend_requested", *(field.name for field in POLICY_KNOBS)]
    if lacking := [name for name in knobs if name not in row]:
        raise ValueError(f"a trial without its {lacking[0]}")
    return row


def checked_round(values: object) -> dict[str, Any]:
    """A line of `rounds.jsonl`. Raises ValueError."""
    one = _object(values, "a round", ratios=dict, times=dict, failed=dict, code=str)
    if one["ratios"].keys() != one["times"].keys():
        raise ValueError("a round with ratios or times of some trials only")
    for ratios, times in zip(one["ratios"].values(), one["times"].values(), strict=True):
        Row.checked(_object(times, "times of a round", **dict.fromkeys(_ROUND_TIMES, (int, float))))
        if not isinstance(ratios, list) or not ratios:
            raise ValueError("a round without a trial's ratios")
        for ratio in ratios:
            Row.checked({"time_ratio": ratio})
    return one


def checked_expectation(values: object) -> dict[str, Any]:
    """A line of `expected.jsonl`. Raises ValueError."""
    row = _object(values, "an expectation", gain=(int, float))
    if not isinstance(row.get("timed"), bool):
        raise ValueError(f"timed {row.get('timed')!r:.40}: must be true or false")
    if any(isinstance(value, float) and not math.isfinite(value) for value in row.values()):
        raise ValueError("an expectation that is no number")
    return row


def checked_front(values: object) -> list[int]:
    """The trials that a line of `fronts.jsonl` has. Raises ValueError."""
    return list(Row.checked({"not_told_from": _object(values, "a front", front=list)["front"]}).not_told_from or ())


def checked_settings(values: object) -> dict[str, Any]:
    """What `sweep.json` says. Raises ValueError."""
    words = dict.fromkeys(("study", "summary", "model", "quantization", "commit"), str)
    found = _object(values, "a sweep's settings", **words, cap=int, objectives=dict, seed=int)
    objectives = found["objectives"]
    if len(objectives) < 2 or not all(map(can_be_objective, objectives)):
        raise ValueError(f"objectives {[*objectives]}: no objectives of a sweep")
    if any(direction not in ("minimize", "maximize") for direction in objectives.values()):
        raise ValueError(f"objectives {objectives}: must be minimize or maximize")
    space = _object(found.get("space", {"name": ""}), "a space", name=str)
    for limit in _object({"constraints": []} | space, "a space", constraints=list)["constraints"]:
        limit = _object(limit, "a constraint", metric=str, relation=str, limit=(int, float))
        if (
            len(limit) != 3
            or limit["relation"] not in ("<=", ">=")
            or not (limit["metric"] in FIELDS or is_score(limit["metric"]))
        ):
            raise ValueError(f"constraint {limit}: none of a sweep's")
    others = {"study_id": "", "sampler": "", "versions": {}, "source": {}} | found
    _object(others, "a sweep's settings", study_id=str, sampler=str, versions=dict, source=dict)
    if "completeness" in found:
        numbers = dict.fromkeys(("share", "chance"), (int, float))
        _object(found["completeness"], "a completeness", **numbers, timed=int, points=int)
    for of_knobs in _object(found.get("effects", {}), "effects of knobs").values():
        shares = _object(of_knobs, "effects of knobs")
        _object(shares, "effects of knobs", **dict.fromkeys(shares, (int, float)))
    if not isinstance(found.get("max_ppl_increase"), int | float | None):
        raise ValueError(f"max_ppl_increase {found['max_ppl_increase']!r}: no number")
    return found


def checked_outcome(values: object) -> tuple[str, float]:
    """How a sweep ended, and when. Raises ValueError."""
    found = _object(values, "an outcome", status=str, ended_at=(int, float))
    if found["status"] not in ("FINISHED", "FAILED", "KILLED") or not is_date(found["ended_at"]):
        raise ValueError(f"status {found['status']!r} at {found['ended_at']!r}: no end of a sweep")
    return found["status"], found["ended_at"]


def checked_tracking(values: object) -> tuple[str, str]:
    """Where MLflow has a study's runs: the store's URI and the experiment. Raises ValueError."""
    found = _object(values, "an address", uri=str, experiment=str)
    return found["uri"], found["experiment"]


def checked_timing(values: object) -> list[dict[str, Any]]:
    """What was found out about accelerators that are timed at once. Raises ValueError."""
    nodes = _object(values, "a calibration", nodes=list)["nodes"]
    numbers = dict.fromkeys(("alone", "beside", "quotient", "quotient_low", "quotient_high"), (int, float))
    kind: dict[str, type | tuple[type, ...]] = {"device": str, "software": (str, type(None))}
    kind["threads"] = (int, type(None))
    for one in nodes:
        _object(one, "a calibration", workers=int, repetitions=int, timing=str, **kind, **numbers)
        if one["timing"] not in ("exclusive", "concurrent"):
            raise ValueError(f"timing {one['timing']!r}: must be exclusive or concurrent")
    return list(nodes)


def _object(values: object, what: str, **keys: type | tuple[type, ...]) -> dict[str, Any]:
    """The values, if they are an object that has these keys, of these types. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"not {what}")
    for name, kind in keys.items():
        value = values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} {value!r:.40}: not as {what} has it")
    return values
