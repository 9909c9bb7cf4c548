import math

from dashboards.front import pareto_front

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
