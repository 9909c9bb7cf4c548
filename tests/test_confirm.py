import numpy as np
import pytest

from dashboards.front import pareto_front
from orchestrator.confirm import Sample, candidates, confirm, confirmed_rows
from orchestrator.pool import Finished
from orchestrator.trial import TrialMeasurement
from streamllm.quality import joint_draws, paired_increase

OBJECTIVES = {"tpot_ms": "minimize", "ppl_increase_percent": "minimize"}
POSITIONS = np.arange(0, 4000, 10.0)


def row(trial, tpot, increase, half_width=0.5, **more):
    return {
        "trial": trial, "state": "complete", "method": "ours", "backend_requested": "flash", "n_sink": trial,
        "window_size": 8, "compress_every": 1, "cache_slack": 0, "max_drop": 0, "overlap": 0, "refresh_budget": 0,
        "tpot_ms": tpot, "tpot_ms_low": tpot - half_width, "tpot_ms_high": tpot + half_width,
        "ppl_increase_percent": increase, "ppl_increase_percent_low": increase - 0.1,
        "ppl_increase_percent_high": increase + 0.1, **more,
    }  # fmt: skip


BASELINE = row("baseline", 40.0, 0.0) | {"method": "recompute", "n_sink": 4}


def losses(shift, seed=0):
    """Those of a text whose tokens differ a lot, `shift` nats above the text's."""
    return np.column_stack((POSITIONS, np.random.default_rng(0).exponential(3.0, len(POSITIONS)) + shift))


def sample(row, round_medians, shift=0.0, spread=0.02):
    noise = np.random.default_rng(row["n_sink"]).normal(0, spread, (len(round_medians), 12))
    return Sample(row, np.array(round_medians)[:, None] + noise, losses(shift))


def numbers(rows):
    return [row["trial"] for row in rows]


def test_candidates_are_the_front_and_what_may_as_well_be_on_it():
    front = [row(0, 1.0, 5.0), row(1, 3.0, 1.0)]
    near = row(2, 1.6, 5.5)  # times overlap, though its quality is certainly worse
    nearer = row(3, 3.1, 1.15)
    far = row(4, 6.0, 2.0)
    same_policy = row(5, 4.5, 1.0)  # as good as 1 in quality, for certain, and slower for certain
    same_policy_near = row(6, 3.9, 1.0)
    unfit = [row(7, 0.1, 0.1, feasible=False), row(8, 0.1, 0.1) | {"state": "failed"}]
    rows = [far, near, same_policy, *unfit, same_policy_near, nearer, *front]
    assert numbers(candidates(rows, OBJECTIVES)) == [0, 1, 3, 2, 6]
    assert numbers(candidates(rows, OBJECTIVES, others=1)) == [0, 1, 3]
    assert candidates([], OBJECTIVES) == []
    maximised = [row(0, 1.0, 1.0, speedup=9.0, speedup_low=8.0), row(1, 1.0, 2.0, speedup=8.5, speedup_high=8.6)]
    assert len(candidates(maximised, {"speedup": "maximize"})) == 2
    apart = [maximised[0], row(1, 1.0, 2.0, speedup=7.0, speedup_high=7.9)]
    assert len(candidates(apart, {"speedup": "maximize"})) == 1


def test_a_lucky_trial_is_found_out_and_a_good_one_stays():
    lucky, solid = row(0, 1.0, 1.0), row(1, 2.0, 1.0)
    samples = [sample(lucky, [3.0, 3.1, 2.9], 0.01), sample(solid, [2.0, 2.1, 1.9], 0.01)]
    baseline, first, second = confirmed_rows(samples, sample(BASELINE, [40.0, 41.0, 39.0]), OBJECTIVES)
    assert (first["front_probability"], second["front_probability"]) == (0.0, 1.0)
    assert first["confirmed_tpot_ms"] == pytest.approx(3.0, abs=0.05)
    assert first["confirmed_tpot_ms_low"] == pytest.approx(2.9, abs=0.05)
    assert first["confirmed_tpot_ms_high"] == pytest.approx(3.1, abs=0.05)
    assert second["confirmed_speedup"] == pytest.approx(20.0, abs=0.5)
    assert baseline["confirmed_speedup"] == 1.0 and "front_probability" not in baseline
    merged = [lucky | first, solid | second]
    assert numbers(pareto_front(merged, OBJECTIVES)) == [1]
    assert numbers(pareto_front([lucky, solid], OBJECTIVES)) == [0]


def test_what_cannot_be_told_apart_shares_the_probability():
    samples = [sample(row(trial, 2.0, 1.0), [2.0, 2.1, 2.2], 0.01, spread=0.5) for trial in (1, 2)]
    _, *both = confirmed_rows(samples, sample(BASELINE, [40.0, 41.0, 42.0]), OBJECTIVES)
    for one in both:
        assert 0.15 < one["front_probability"] < 0.85
    assert sum(one["front_probability"] for one in both) == pytest.approx(1.0, abs=0.02), "one is always better"


def test_rounds_are_paired_a_slow_round_blurs_no_difference():
    """All drift by a factor of two between rounds; the one that is 5% faster is so in each."""
    drift = np.array([2.0, 3.0, 4.0])
    samples = [sample(row(1, 2.0, 1.0), drift, 0.01), sample(row(2, 2.0, 1.0), 1.05 * drift, 0.01)]
    baseline = sample(BASELINE, 10 * drift)
    _, fast, slow = confirmed_rows(samples, baseline, OBJECTIVES)
    assert (fast["front_probability"], slow["front_probability"]) == (1.0, 0.0)
    assert fast["confirmed_tpot_ms_high"] - fast["confirmed_tpot_ms_low"] > 1.5, "the time itself is not known better"
    assert fast["confirmed_speedup_high"] - fast["confirmed_speedup_low"] < 0.5, "but what it is beside the baseline is"


def test_quality_is_paired_by_token():
    """0.01 nats apart on every token: far less than the perplexity's own interval, and certain all the same."""
    samples = [sample(row(1, 2.0, 1.0), [2.0, 2.0], 0.02), sample(row(2, 2.0, 2.0), [1.0, 1.0], 0.03)]
    for objective in ("perplexity", "ppl_increase_percent"):
        objectives = {objective: "minimize"}
        _, better, worse = confirmed_rows(samples, sample(BASELINE, [9.0, 9.0]), objectives)
        assert (better["front_probability"], worse["front_probability"]) == (1.0, 0.0)
    measured = {"peak_kv": "minimize", "speedup": "maximize"}
    samples = [Sample(s.row | {"peak_kv": 9 - s.row["trial"]}, s.segments, s.losses) for s in samples]
    _, *rows = confirmed_rows(samples, sample(BASELINE, [9.0, 9.0]), measured)
    assert [one["front_probability"] for one in rows] == [0.0, 1.0]


def test_joint_draws_have_the_interval_of_a_single_one():
    own, base = losses(0.02), losses(0.0)
    own[:, 1] += np.random.default_rng(1).normal(0, 0.1, len(own))
    alone, together = paired_increase(own, base), joint_draws([own, base], base, 4000)
    assert together[:, 0].mean() == pytest.approx(alone.value, abs=0.1)
    assert np.quantile(together[:, 0], (0.025, 0.975)) == pytest.approx((alone.low, alone.high), abs=0.2)
    assert not together[:, 1].any()


class PretendPool:
    """Answers each submission at once; `answer(worker, spec)` may say otherwise. A dead worker comes back."""

    def __init__(self, answer=None):
        self.submitted = []
        self._answer = answer or measured
        self._events = []

    def submit(self, worker, spec):
        self.submitted.append((worker, spec.method, spec.policy.n_sink, spec.round))
        finished = self._answer(worker, spec)
        self._events.append(finished)
        if finished.died and not finished.lost:
            self._events.append(Finished(worker, description={}))

    def wait(self, timeout):
        if self._events:
            yield self._events.pop(0)


def measured(worker, spec):
    record = {"segment_tpot_ms": [1.0 * spec.round, 2.0 * spec.round]}
    return Finished(worker, measurement=TrialMeasurement(record, losses(0.0), False, True))


ROWS = [row(1, 1.0, 1.0), row(2, 2.0, 0.5)]


def run(pool, workers, rounds=2):
    return confirm(pool, workers, ROWS, BASELINE, rounds, lambda worker, spec: None)


def test_rounds_take_every_candidate_in_turn_on_one_worker_after_another():
    pool = PretendPool()
    samples, baseline, problems = run(pool, [0, 1], rounds=3)
    assert [worker for worker, *_ in pool.submitted] == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert [(sinks, number) for _, _, sinks, number in pool.submitted] == [(s, n) for n in (1, 2, 3) for s in (4, 1, 2)]
    assert [s.segments.tolist() for s in samples] == [[[1, 2], [2, 4], [3, 6]]] * 2
    assert numbers([s.row for s in samples]) == [1, 2] and baseline.row is BASELINE and not problems


def test_a_dead_workers_measurement_is_made_by_another_and_a_failing_candidate_left_out():
    deaths = []

    def answer(worker, spec):
        if spec.policy.n_sink == 2:
            return Finished(worker, error="ValueError: nope")
        if worker == 1 and not deaths:
            deaths.append(worker)
            return Finished(worker, error="the worker died", died=True)
        return measured(worker, spec)

    for workers in ([0, 1], [1]):
        deaths.clear()
        pool = PretendPool(answer)
        samples, baseline, problems = run(pool, workers)
        assert numbers([s.row for s in samples]) == [1] and len(baseline.segments) == 2
        assert problems == ["trial 2 cannot be confirmed: ValueError: nope"]
        assert [sinks for _, _, sinks, _ in pool.submitted].count(2) == 1, "not tried again in the next round"


def test_without_workers_it_ends_with_the_reason():
    lost = PretendPool(lambda worker, spec: Finished(worker, error="boom", died=True, lost=True))
    samples, baseline, problems = run(lost, [0])
    assert samples == [] and baseline is None
    assert problems[0].endswith("boom") and len(lost.submitted) == 1
    assert run(PretendPool(), [])[1] is None
