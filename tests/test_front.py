import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamllm.results.front import dominators, hypervolume, pareto_front

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
    outside = [row(5.0, 9.0), row(7.0, 9.5), row(0.5, 0.0), row(0.5, -1.0), row(0.1, 9.0, feasible=False)]
    assert hypervolume(stairs + inside + outside, OBJECTIVES, reference) == pytest.approx(11.0)
    assert hypervolume([], OBJECTIVES, reference) == 0.0
    with pytest.raises(ValueError, match="speedup"):
        hypervolume(stairs, OBJECTIVES, {"tpot_ms": 5.0})


def test_hypervolume_of_three_objectives():
    objectives = OBJECTIVES | {"peak_kv": "minimize"}
    rows = [row(1.0, 1.0, peak_kv=2), row(2.0, 1.0, peak_kv=1)]  # 2x1x1 and 1x1x2, overlapping in 1
    assert hypervolume(rows, objectives, {"tpot_ms": 3.0, "speedup": 0.0, "peak_kv": 3}) == pytest.approx(3.0)


def test_what_dominates_a_row_is_the_fronts_best_in_the_first_objective():
    front = [row(1.0, 1.0), row(2.0, 3.0), row(4.0, 5.0)]
    others = [row(1.0, 1.0), row(1.0, 0.5), row(4.0, 3.0), row(9.0, 5.0), row(0.5, 0.1), row(math.nan, 9.0)]
    assert dominators(others, front, OBJECTIVES) == [None, front[0], front[1], front[2], None, None]
    assert dominators(others, [], OBJECTIVES) == [None] * len(others)


@settings(max_examples=200)
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=30), st.integers(1, 3))
def test_front_and_dominators_are_what_their_definition_says(points, n_objectives):
    """Small integers, so that ties and duplicates are many."""
    objectives = dict(
        list({"tpot_ms": "minimize", "speedup": "maximize", "peak_kv": "minimize"}.items())[:n_objectives]
    )
    rows = [row(a, b, peak_kv=c, trial=trial) for trial, (a, b, c) in enumerate(points)]

    def beats(one, other):
        pairs = [
            ((-1 if d == "maximize" else 1) * one[n], (-1 if d == "maximize" else 1) * other[n])
            for n, d in objectives.items()
        ]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    expected = [one for one in rows if not any(beats(other, one) for other in rows)]
    front = pareto_front(rows, objectives)
    assert sorted(one["trial"] for one in front) == [one["trial"] for one in expected]
    for one, better in zip(rows, dominators(rows, front, objectives), strict=True):
        assert (better is None) == (one in front)
        assert better is None or beats(better, one)


def test_hypervolume_of_a_long_front_is_the_staircases_area():
    n = 2000
    rows = [row(i / n, i / n) for i in range(n)]  # in the corner at (1, 0): triangle, but for the steps
    area = hypervolume(rows, OBJECTIVES, {"tpot_ms": 1.0, "speedup": 0.0})
    assert area == pytest.approx(sum((1 - i / n) / n for i in range(1, n)))
