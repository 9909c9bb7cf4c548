"""A front's uncertainty as a band: it is what the fronts' distribution makes it, in the units of the tables."""

import json
import re
from dataclasses import asdict
from html import escape

import numpy as np
import pytest

from dashboards.attainment import band, data
from dashboards.drawing.style import NoDataError, style
from dashboards.figures import pareto
from dashboards.report import report
from orchestrator.search.confirm import confirmed_rows
from streamllm.measuring.attainment import attained, best_within, thinned
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name
from streamllm.results.study import load_study

from .made_studies import write_study
from .test_confirm import BASELINE, COMPARISON, losses, rounds_of, row

SHIFTS = {"strict": 0.0, 0: 0.05, 1: 0.01}
"""Nats above the reference."""
RATIOS = {0: 1.0, 1: 2.0}
OF_TIMES, OF_QUALITY = 2.920 / 4.303, 1.895 / 2.365
"""How much narrower nine of ten lie than 19 of 20: Student's t with 2 degrees of freedom (6 medians, 2 trials, 3 rounds
that share something), and with 7 (8 blocks of text)."""


def test_a_region_is_what_so_many_fronts_attain():
    """Two points, as good as 2 and 1 in the second objective and uniform in the first: the better of the two is below t
    with probability 1 - (1 - t)^2."""
    random = np.random.default_rng(0)
    first = random.uniform(size=(20_000, 2))
    points = np.stack((first, np.broadcast_to([2.0, 1.0], first.shape)), axis=-1)
    regions = attained(points)
    for region, level in zip(regions, (0.05, 0.5, 0.95), strict=True):
        assert best_within(region, 2.5) == pytest.approx(1 - (1 - level) ** 0.5, abs=0.01)
        assert best_within(region, 1.5) == pytest.approx(level, abs=0.01)
        assert best_within(region, 0.9) == np.inf
        assert (np.diff(region[:, 0]) > 0).all() and (np.diff(region[:, 1]) < 0).all()


def test_what_is_dominated_changes_nothing_and_steps_that_cannot_be_seen_are_left_out():
    points = np.random.default_rng(1).normal(size=(500, 3, 2))
    with_worse = np.concatenate((points, points[:, :1] + 0.5), axis=1)
    for one, other in zip(attained(points), attained(with_worse), strict=True):
        assert one.tolist() == other.tolist()
    across = np.linspace(0, 1, 10_001)
    fine = np.column_stack((across, np.exp(-20 * across)))
    seen = thinned(fine)
    assert seen[[0, -1]].tolist() == fine[[0, -1]].tolist() and 200 < len(seen) < 1000
    assert np.abs(np.diff(seen, axis=0)).max() < 0.007, "no step that can be seen is left out"


def table(trial):
    """Its losses: the reference's, the shift, and something of its own."""
    own = np.random.default_rng(trial + 1 if trial != "strict" else 0).normal(0, 0.3 * (trial != "strict"), 4000)
    return losses(SHIFTS[trial]) + np.column_stack((np.zeros(4000), own))


def made(folder, objectives, **more):
    """A confirmed study of two trials and its store, as it is loaded. more: of what the rounds say of each row."""
    store = MeasurementStore(folder / "sweeps" / ".store")
    rows = {}
    for trial in SHIFTS:
        store.put({"of": trial}, Measurement({}, table(trial)))
        ratio, over = RATIOS.get(trial, 1.0), COMPARISON.vs_strict(table(trial))
        cost = over.value / 100
        rows[trial] = row(
            trial, ratio, over.value, n_sink=4, backend="flash", quality_entry=entry_name({"of": trial}),
            speedup=40 / ratio, perplexity=15 * (1 + cost), reference_tpot_ms=5.0,
            ppl_increase_percent=100 * (1.02 * (1 + cost) - 1), ppl_increase_percent_low=0.0,
            ppl_increase_percent_high=99.0, n_tokens=4001,
            ppl_vs_strict_percent_low=over.low, ppl_vs_strict_percent_high=over.high,
        )  # fmt: skip
    rounds = rounds_of({"baseline": [40.0] * 3} | {trial: [ratio] * 3 for trial, ratio in RATIOS.items()}, spread=0.05)
    trials = [rows[trial] for trial in RATIOS]
    found = confirmed_rows(rounds, trials, BASELINE, COMPARISON, lambda one: table(one["trial"]), objectives)
    confirmed = [dict(one) | (more if one["trial"] != "baseline" else {}) for one in found]
    baseline = dict(BASELINE) | {"perplexity": 15.0}
    output = write_study(folder, [*map(dict, rows.values())], "s", objectives, confirmed, baseline)
    (output / "rounds.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in rounds))
    return load_study(str(output))


@pytest.mark.parametrize(
    "objectives",
    [
        {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"},
        {"speedup": "maximize", "ppl_vs_strict_percent": "minimize"},
        {"tpot_ms": "minimize", "perplexity": "minimize"},
        {"tpot_ms": "minimize", "ppl_increase_percent": "minimize"},
    ],
    ids=" ".join,
)
def test_its_ends_are_the_intervals_of_the_tables(tmp_path, objectives):
    """Both trials are on every drawn front: the best in the first objective is trial 0's, in the second trial 1's."""
    x, y = objectives
    study = made(tmp_path, objectives)
    fast, good = study.trials
    hardly, half, surely = band(study).corners
    assert half[0][0] == pytest.approx(fast[x], rel=0.005)
    (low, high), ends = (fast[f"{x}_low"], fast[f"{x}_high"]), sorted((hardly[0][0], surely[0][0]))
    assert (hardly[0][0] < half[0][0] < surely[0][0]) == (objectives[x] == "minimize")
    if x == "tpot_ms":  # the interval of a speedup is the baseline's too
        assert (ends[1] - ends[0]) / (high - low) == pytest.approx(OF_TIMES, abs=0.03)
    assert low < ends[0] < ends[1] < high
    assert half[-1][1] == pytest.approx(good[y], abs=0.03) and hardly[-1][1] < half[-1][1] < surely[-1][1]
    if y == "ppl_vs_strict_percent":
        interval = good[f"{y}_high"] - good[f"{y}_low"]
        assert (surely[-1][1] - hardly[-1][1]) / interval == pytest.approx(OF_QUALITY, abs=0.03)


def test_it_is_said_in_a_sentence_and_drawn_behind_the_front(tmp_path):
    study = made(tmp_path, {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"})
    found = band(study)
    chosen, good = best_within(found.corners[1], 9.0), study.trials[1]
    near, half, far = (best_within(region, good["ppl_vs_strict_percent_high"]) for region in found.corners)
    assert chosen < half - 3, "trial 0 is faster, and costs quality"
    number = r"(-?[\d.]+)"
    said = re.fullmatch(
        f"Of 2,000 fronts drawn from the measurements half attain {number} ms/token or less where perplexity increase "
        f"over strict StreamingLLM is at most {number}%, the end of trial 1's interval; nine of ten lie between "
        f"{number} and {number} there.",
        found.words,
    )
    worst = good["ppl_vs_strict_percent_high"]
    assert [*map(float, said.groups())] == pytest.approx([half, worst, near, far], abs=0.06)
    with style():
        axes = pareto(study).axes[0]
    (area,) = axes.patches
    corners = area.get_xy()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    best = found.corners[0][(found.corners[0] < (right, top)).all(axis=1)].min(axis=0)  # others are out of sight
    assert corners.min(axis=0).tolist() == [max(best[0], left), max(best[1], bottom)]
    assert corners.max(axis=0).tolist() == [right, top], "to the worst of the axes"
    assert area.get_zorder() == 0 and found.words in axes.get_title(loc="left").replace("\n", " ")
    shown = data(found, 5)
    assert shown[1][0] == [float(f"{value:.5g}") for value in found.corners[1][0]]
    page = report(study)
    assert escape(found.words) in page and f'"band":{json.dumps(shown, separators=(",", ":"))}' in page


def test_it_is_of_the_draws_that_p_front_is_of_or_is_not_drawn(tmp_path):
    two = {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"}
    with pytest.raises(NoDataError, match="not those that P"):
        band(made(tmp_path / "other", two, front_probability=0.5))
    study = made(tmp_path, two)
    study.files.rounds.write_text("")
    with pytest.raises(NoDataError, match="not all here"):
        band(study)
    with style():
        assert "cannot be drawn" in pareto(study).axes[0].get_title(loc="left")
    study = made(tmp_path / "again", two)
    for path in study.files.store.rglob("*.npy"):
        path.unlink()
    with pytest.raises(NoDataError, match="not all here"):
        band(study)
    for name, objectives, why in (("three", two | {"peak_kv": "minimize"}, "no line"), ("once", two, "not confirmed")):
        with pytest.raises(NoDataError, match=why):
            band(load_study(str(write_study(tmp_path / name, [dict(row(0, 1.0, 1.0))], objectives=objectives))))
