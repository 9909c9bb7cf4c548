import math

import pytest

from dashboards.front import hypervolume, pareto_front

OBJECTIVES = {"tpot_ms": "minimize", "speedup": "maximize"}


def row(tpot_ms, speedup, **extra):
    return {"state": "complete", "tpot_ms": tpot_ms, "speedup": speedup} | extra


def test_known_front_with_ties_duplicates_and_unfit_trials():
    front = [row(1.0, 1.0), row(2.0, 3.0), row(2.0, 3.0), row(4.0, 5.0)]
    beaten = [row(1.0, 0.5), row(2.5, 3.0), row(4.0, 4.9), row(9.0, 5.0)]
    unfit = [
        row(0.1, 9.0, state="failed"),
        row(0.1, 9.0, feasible=False),
        row(math.nan, 9.0),
        row(0.1, math.inf),
        {"state": "complete", "speedup": 9.0},
    ]
    assert pareto_front([*beaten, *reversed(front), *unfit], OBJECTIVES) == front
    assert pareto_front([], OBJECTIVES) == []


def test_three_objectives():
    objectives = OBJECTIVES | {"peak_kv": "minimize"}
    rows = [row(1.0, 1.0, peak_kv=9), row(2.0, 1.0, peak_kv=8), row(2.0, 1.0, peak_kv=9)]
    assert pareto_front(rows, objectives) == rows[:2]


def test_hypervolume_of_staircases_known_by_hand():
    reference = {"tpot_ms": 5.0, "speedup": 0.0}
    stairs = [row(1.0, 1.0), row(2.0, 3.0), row(4.0, 4.0)]  # 4x1 + 3x2 + 1x1
    inside = [row(4.0, 1.0), row(2.0, 3.0)]
    outside = [row(5.0, 9.0), row(0.5, 0.0), row(0.5, -1.0), row(0.1, 9.0, feasible=False)]
    assert hypervolume(stairs + inside + outside, OBJECTIVES, reference) == pytest.approx(11.0)
    assert hypervolume([], OBJECTIVES, reference) == 0.0
    with pytest.raises(ValueError, match="speedup"):
        hypervolume(stairs, OBJECTIVES, {"tpot_ms": 5.0})


def test_hypervolume_of_three_objectives():
    objectives = OBJECTIVES | {"peak_kv": "minimize"}
    rows = [row(1.0, 1.0, peak_kv=2), row(2.0, 1.0, peak_kv=1)]  # 2x1x1 and 1x1x2, overlapping in 1
    assert hypervolume(rows, objectives, {"tpot_ms": 3.0, "speedup": 0.0, "peak_kv": 3}) == pytest.approx(3.0)
