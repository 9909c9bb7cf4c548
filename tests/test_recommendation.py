import json

import pytest

from dashboards.recommendation import advice, recommend, record
from streamllm.errors import UsageError
from streamllm.results.study import load_study
from streamllm.terminal.arguments import percent

from .made_studies import row, write_study

OBJECTIVES = {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"}


def strict(trial, tpot_ms, increase, width=0.1, **more):
    """A row whose perplexity over re-computation is a point above that over strict StreamingLLM."""
    ends = {"ppl_vs_strict_percent_low": increase - width, "ppl_vs_strict_percent_high": increase + width}
    return row(trial, tpot_ms, increase + 1) | {"ppl_vs_strict_percent": increase} | ends | more


def without_quality(one):
    return {name: value for name, value in one.items() if not name.startswith("ppl")}


def found(front, objectives=OBJECTIVES, limit=None):
    recommendation = recommend(front, objectives, limit)
    trial = None if recommendation.row is None else recommendation.row["trial"]
    return trial, recommendation.kind, recommendation.why


def test_the_knee_is_farthest_from_the_line_between_the_ends():
    front = [row(0, 1.0, 10.0), row(1, 2.0, 4.0), row(2, 3.0, 3.0), row(3, 11.0, 0.0)]  # bends 0.5, 0.5, 0.5
    deepest = row(4, 2.0, 3.0)
    best = recommend([front[0], front[1] | {"ppl_vs_strict_percent": 5.0}, deepest, front[3]], OBJECTIVES)
    assert best.row is deepest and best.kind == "knee"
    assert best.why == (
        "Trial 4 is recommended, the front's knee: of its 4 points the farthest from the straight line between the "
        "best in each objective (60% of the way to being best in all), with ms/token 2.00 [1.80, 2.20] where the best "
        "has 1.00 [0.90, 1.10], and PPL vs strict % 3.00 [2.90, 3.10] where the best has 0.00 [-0.10, 0.10]."
    )
    flipped = [{**one, "speedup": -one["tpot_ms"]} for one in (front[0], front[3], deepest)]
    assert recommend(flipped, {"ppl_increase_percent": "minimize", "speedup": "maximize"}).row["trial"] == 4


def test_the_knee_of_three_objectives():
    objectives = OBJECTIVES | {"peak_kv": "minimize"}
    ends = [row(0, 1.0, 9.0, peak_kv=90), row(1, 9.0, 1.0, peak_kv=90), row(2, 9.0, 9.0, peak_kv=10)]
    middle = row(3, 2.0, 2.0, peak_kv=20)
    assert recommend([*ends, middle], objectives).row is middle
    assert found(ends, objectives)[:2] == (1, "least cost"), "they lie in one plane"


@pytest.mark.parametrize(
    ("front", "why"),
    [
        ([strict(0, 1.0, 1.0), strict(1, 1.0, 1.0)], "no knee, as its points are equals"),
        ([strict(0, 1.0, 3.0), strict(1, 2.0, 1.0)], "no knee, as it has two points only, its ends"),
        ([strict(0, 1.0, 3.0), strict(1, 2.0, 1.99), strict(2, 3.0, 1.0)], "no knee, as none of its points lies below"),
        ([strict(0, 1.0, 3.0), strict(1, 2.5, 2.5), strict(2, 3.0, 1.0)], "no knee, as none of its points lies below"),
    ],
)
def test_without_a_knee_and_with_a_cost_everywhere_the_least_cost(front, why):
    best = recommend(front, OBJECTIVES)
    assert best.row is min(front, key=lambda one: one["ppl_vs_strict_percent"]) and best.kind == "least cost"
    assert best.why.startswith(f"Trial {best.row['trial']} is recommended: all points of the front cost quality")
    assert why in best.why


def test_without_a_knee_the_fastest_that_costs_nothing_measurable():
    front = [strict(0, 1.0, 3.0), strict(1, 2.0, 0.05), strict(2, 2.8, -0.9)]
    trial, kind, why = found([front[0], front[1], strict(2, 2.05, -0.9)])
    assert (trial, kind) == (1, "no cost")
    assert why == (
        "Trial 1 is recommended: of the front's points that cost no measurable quality the fastest, with ms/token 2.00 "
        "[1.80, 2.20] and PPL vs strict % 0.05 [-0.05, 0.15]; the front has no knee, as none of its points lies below "
        "the straight line between its ends by much. Trial 0 is the fastest, but costs, with ms/token 1.00 "
        "[0.90, 1.10] and PPL vs strict % 3.00 [2.90, 3.10]."
    )
    assert found([front[0], front[2]])[:2] == (2, "no cost")
    assert found([strict(0, 1.0, 0.1), front[2]])[0] == 0, "an interval that begins at 0"
    assert found([strict(0, 1.0, 0.1001), front[2]])[0] == 2
    assert "passed over" not in found([strict(0, 1.0, 0.0), front[2]])[2]


def test_quality_over_recomputation_counts_where_there_is_no_other():
    two = [row(0, 1.0, 0.9), row(1, 2.0, 0.0)]  # 0.9 [-0.1, 1.9]
    of = {"tpot_ms": "minimize", "ppl_increase_percent": "minimize"}
    assert found(two, of)[:2] == (1, "no cost"), "costs 0.9 [0.8, 1.0] over strict StreamingLLM"
    bare = [{name: value for name, value in one.items() if "strict" not in name} for one in two]
    trial, kind, why = found(bare, of)
    assert (trial, kind) == (0, "no cost") and "PPL increase % 0.9 [-0.1, 1.9]" in why
    bare[0].pop("ppl_increase_percent_low")
    assert found(bare, of)[0] == 1, "without an interval the value"


def test_what_is_seldom_on_the_front_is_passed_over_while_others_are_left():
    seldom, often = strict(0, 1.0, 0.0, front_probability=0.49), strict(1, 2.0, -1.0, front_probability=0.5)
    trial, kind, why = found([seldom, often])
    assert (trial, kind) == (1, "no cost")
    assert "Trial 0 is the fastest, but is seldom on the front" in why and "P(front) 0.49" in why
    assert found([seldom, often | {"front_probability": 0.1}])[0] == 0
    assert found([seldom, strict(1, 2.0, -1.0)])[0] == 1, "unknown is not seldom"
    costly = strict(2, 3.0, 5.0, front_probability=0.2), strict(3, 2.5, 6.0, front_probability=0.9)
    assert found(costly)[:2] == (3, "least cost")


def test_a_front_of_one_or_none():
    trial, kind, why = found([strict(5, 2.0, 7.0, front_probability=1.0)])
    assert (trial, kind) == (5, "only")
    assert "alone is on the front" in why and "PPL vs strict % 7.00 [6.90, 7.10] and P(front) 1.00." in why
    for limit in (None, 3.0):
        assert found([], limit=limit) == (
            None,
            "none",
            "Nothing is recommended: the front is empty, no trial is on it.",
        )


def test_within_a_limit_the_fastest_else_the_nearest():
    front = [strict(0, 1.0, 9.0), strict(1, 2.0, 2.0), strict(2, 3.0, 1.5), strict(3, 9.0, -1.0)]
    trial, kind, why = found(front, limit=3.0)
    assert (trial, kind) == (1, "within limit"), "over re-computation it is 3.0"
    assert why == (
        "Trial 1 is recommended: the fastest of the front whose perplexity is at most 3% above re-computation's, with "
        "ms/token 2.00 [1.80, 2.20] and PPL increase % 3.0 [2.0, 4.0]."
    )
    assert found(front, limit=2.99)[0] == 2
    assert found(front[:3], limit=1.0) == (
        2,
        "nearest to limit",
        "No point of the front has a perplexity of at most 1% above re-computation's: trial 2 comes nearest, with "
        "ms/token 3.00 [2.70, 3.30] and PPL increase % 2.5 [1.5, 3.5].",
    )
    assert found([front[0]], limit=3.0)[:2] == (0, "nearest to limit")
    unknown = [without_quality(front[0]) | {"peak_kv": 300}, without_quality(front[1])]
    trial, kind, why = found(unknown, {"tpot_ms": "minimize", "peak_kv": "minimize"}, 3.0)
    assert (trial, kind) == (0, "quality unknown") and why.startswith("The limit of 3% says nothing, as no point")


@pytest.mark.parametrize(
    ("objectives", "best", "word"),
    [
        ({"speedup": "maximize", "ppl_vs_strict_percent": "minimize"}, 0, "fastest"),
        ({"perplexity": "minimize", "peak_kv": "minimize"}, 1, "smallest"),
        ({"peak_memory_mb": "minimize", "perplexity": "minimize"}, 2, "smallest"),
        ({"peak_kv": "minimize", "tpot_ms": "minimize"}, 0, "fastest"),
        ({"peak_kv": "minimize", "peak_memory_mb": "minimize"}, 1, "smallest"),
        ({"perplexity": "minimize", "ppl_increase_percent": "minimize"}, 0, "fastest"),
        ({"avg_attn_ms": "minimize", "ppl_increase_percent": "minimize"}, 3, "best"),
    ],
)
def test_what_is_wanted_besides_quality_are_the_objectives(objectives, best, word):
    """None of these has a knee; each is best in one thing, and costs nothing."""
    more = [
        {"peak_kv": 90, "peak_memory_mb": 900, "avg_attn_ms": 9.0},
        {"peak_kv": 10, "peak_memory_mb": 900, "avg_attn_ms": 9.0},
        {"peak_kv": 90, "peak_memory_mb": 100, "avg_attn_ms": 9.0},
        {"peak_kv": 90, "peak_memory_mb": 900, "avg_attn_ms": 1.0},
    ]
    rows = [strict(n, 5.0 if n else 2.0, -1.0, **values) for n, values in enumerate(more)]
    front = [rows[best], rows[3 if best != 3 else 0]]
    trial, kind, why = found(front, objectives)
    assert (trial, kind) == (best, "no cost") and f"the {word}, with " in why


def test_lines_and_record(tmp_path):
    study = load_study(str(write_study(tmp_path, [strict(0, 1.0, 3.0), strict(1, 2.0, 0.0)], objectives=OBJECTIVES)))
    best = recommend(study.front, study.objectives)
    why, command = advice(study, best)
    assert why == best.why and command.startswith("Measured again by: python -m streamllm evaluate --mode both ")
    written = json.loads(json.dumps(record(study, best)))
    assert written == {"trial": 1, "kind": "no cost", "why": why, "command": command.partition(": ")[2]}
    nothing = recommend([], OBJECTIVES)
    assert advice(study, nothing) == [nothing.why]
    assert record(study, nothing) == {"trial": None, "kind": "none", "why": nothing.why, "command": None}


def test_limits_as_they_are_typed():
    assert [percent(text) for text in ("3", "0", "-1.5", "1e2")] == [3.0, 0.0, -1.5, 100.0]
    for text in ("", "three", "nan", "inf", "-100"):
        with pytest.raises(UsageError, match="must be a number of percent above -100, for example 3"):
            percent(text)
