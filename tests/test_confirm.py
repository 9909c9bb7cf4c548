import json
import math

import numpy as np
import pytest

from orchestrator.search import rounds as rounds_module
from orchestrator.search.confirm import candidates, confirmed_rows, next_rounds, unconfirmed_better
from orchestrator.search.rounds import Round, read_rounds, rounds_so_far, take_rounds
from orchestrator.workers.kinds import kind_of
from orchestrator.workers.messages import SweepError
from orchestrator.workers.pool import Finished
from streamllm.measuring.quality import QualityComparison
from streamllm.results.front import study_front
from streamllm.results.schema import Row
from streamllm.results.study_folder import StudyFolder

from .pretended import KIND, RAW, TEXT, PretendPool, description, measured, scheduler, subject

OBJECTIVES = {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"}
POSITIONS = np.arange(4000.0)


def row(trial, ratio, increase, half_width=0.5, **more):
    return Row.of({
        "trial": trial, "state": "complete", "method": "ours", "backend_requested": "flash", "n_sink": trial,
        "window_size": 8, "compress_every": 1, "cache_slack": 0, "max_drop": 0,
        "time_ratio": ratio, "time_ratio_low": ratio - half_width, "time_ratio_high": ratio + half_width,
        "tpot_ms": 2 * ratio, "ppl_vs_strict_percent": increase, "ppl_vs_strict_percent_low": increase - 0.1,
        "ppl_vs_strict_percent_high": increase + 0.1, **more,
    })  # fmt: skip


BASELINE = row("baseline", 40.0, 0.0) | {"method": "recompute", "n_sink": 4}


def losses(shift):
    """Those of a text whose tokens differ a lot, `shift` nats above the text's."""
    return np.column_stack((POSITIONS, np.random.default_rng(0).exponential(3.0, len(POSITIONS)) + shift))


COMPARISON = QualityComparison(losses(0.0), losses(0.0)[::10])


def numbers(rows):
    return [row["trial"] for row in rows]


def rounds_of(ratios, spread=0.01):
    """Rounds whose candidates have those median ratios. ratios: trial -> one per round."""
    random = np.random.default_rng(0)
    return [
        Round({str(trial): (values[number] * np.exp(random.normal(0, spread, 12))).tolist() for trial, values in
               ratios.items() if len(values) > number}, dict.fromkeys(map(str, ratios), RAW), {}, "code", number + 1)
        for number in range(max(map(len, ratios.values())))
    ]  # fmt: skip


def confirmed(rows, ratios, shifts, objectives=OBJECTIVES, **more):
    """shifts: trial -> nats above the reference."""
    rounds = rounds_of({"baseline": [40.0, 40.0, 40.0]} | ratios, **more)
    return confirmed_rows(rounds, rows, BASELINE, COMPARISON, lambda row: losses(shifts[row["trial"]]), objectives)


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
    assert numbers(candidates(rows, OBJECTIVES, earlier={"4", "8"}, others=1)) == [0, 1, 3, 4], "4 stays, 8 has failed"
    assert numbers(candidates(rows, OBJECTIVES, earlier={"0", "1", "3", "2", "6"})) == [0, 1, 3, 2, 6], (
        "no more of them"
    )
    assert candidates([], OBJECTIVES) == []
    assert set(numbers(candidates(rows, {"speedup": "maximize"}))) == {0, 2}, "by what is paired"
    assert set(numbers(candidates(rows, {"ppl_increase_percent": "minimize"}))) == {1, 3, 5, 6}


def test_a_lucky_trial_is_found_out_and_a_good_one_stays():
    lucky, solid = row(0, 1.0, 1.0), row(1, 2.0, 1.0)
    found = confirmed([lucky, solid], {0: [3.0, 3.1, 2.9], 1: [2.0, 2.05, 1.95]}, {0: 0.01, 1: 0.01})
    baseline, first, second = found
    assert first["front_probability"] < 0.01 and second["front_probability"] > 0.99
    assert first["time_ratio"] == pytest.approx(3.0, rel=0.01)
    assert first["time_ratio_low"] < 2.95 and first["time_ratio_high"] > 3.05
    assert second["speedup"] == pytest.approx(20.0, rel=0.01)
    assert (baseline["speedup"], baseline["rounds"]) == (1.0, 3) and "front_probability" not in baseline
    merged = [lucky | first | {"tpot_ms": 6.0}, solid | second | {"tpot_ms": 4.0}]
    assert numbers(study_front(merged, OBJECTIVES)) == [1]


def test_what_cannot_be_told_apart_shares_the_probability_and_one_stands_for_both():
    rows = [row(1, 2.0, 1.0), row(2, 2.0, 1.0), row(3, 1.0, 3.0)]
    ratios = {1: [2.0, 2.1, 2.2], 2: [2.1, 2.0, 2.21], 3: [1.0, 1.0, 1.0]}
    _, *found = confirmed(rows, ratios, {1: 0.01, 2: 0.01, 3: 0.03}, spread=0.05)
    first, second, third = found
    assert 0.15 < first["front_probability"] < 0.85
    assert first["front_probability"] + second["front_probability"] == pytest.approx(1.0, abs=0.02)
    assert (first["not_told_from"], second["not_told_from"], third["not_told_from"]) == ([2], [1], [])
    merged = [one | added for one, added in zip(rows, found, strict=True)]
    front = study_front(merged, OBJECTIVES)
    assert len(front) == 2 and 3 in numbers(front)


def test_quality_is_paired_by_token():
    """0.01 nats apart on every token: far less than the perplexity's own interval, and certain all the same."""
    rows = [row(1, 2.0, 1.0), row(2, 2.0, 2.0)]
    for objective in ("perplexity", "ppl_increase_percent", "ppl_vs_strict_percent"):
        _, better, worse = confirmed(rows, {1: [2.0] * 3, 2: [1.0] * 3}, {1: 0.02, 2: 0.03}, {objective: "minimize"})
        assert (better["front_probability"], worse["front_probability"]) == (1.0, 0.0)
    rows = [one | {"peak_kv": 9 - one["trial"]} for one in rows]
    objectives = {"peak_kv": "minimize", "speedup": "maximize"}
    _, *found = confirmed(rows, {1: [2.0] * 3, 2: [1.0] * 3}, {}, objectives)
    assert [one["front_probability"] for one in found] == [0.0, 1.0]


def test_rounds_go_to_what_may_be_on_the_front():
    rows = [row(trial, 1.0, 1.0) for trial in (1, 2, 3)]

    def due(most, **rounds_and_probability):
        known = {
            name.removeprefix("trial"): {"rounds": rounds, "front_probability": probability}
            for name, (rounds, probability) in rounds_and_probability.items()
        }
        chosen, count = next_rounds(rows, known, most)
        return numbers(chosen), count

    assert due(4) == ([1, 2, 3], 2)
    assert due(1) == ([1, 2, 3], 1)
    assert due(4, trial1=(1, 0.9), trial2=(1, 0.0), trial3=(1, 0.1)) == ([1, 2, 3], 1), "one round settles nothing"
    assert due(4, trial1=(2, 0.9), trial2=(2, 0.04), trial3=(2, 0.1)) == ([1, 3], 2), "2 is hardly on the front"
    assert due(4, trial1=(4, 0.9), trial2=(2, 0.04), trial3=(4, 0.1)) == ([], 0)
    assert due(4, trial1=(4, 0.9), trial2=(2, 0.04)) == ([1, 3], 2), "a new one is timed beside those on the front"
    assert due(4, trial1=(4, 0.9), trial2=(2, 0.3), trial3=(4, 0.1)) == ([1, 2, 3], 2), "2 has come to be unsure again"
    assert next_rounds([], {}, 4) == ([], 0)


def test_candidates_in_some_rounds_only_are_compared_within_the_rounds_they_share():
    """The reference was slow in the third round: that 2 was not in it says nothing for 1."""
    rows = [row(1, 2.0, 1.0), row(2, 2.0, 1.0), row(3, 2.0, 1.0)]
    ratios = {1: [2.0, 2.02, 1.6, 2.0], 2: [1.9, 1.92], 3: [2.1, 2.12, 1.68, 2.1]}
    baseline, first, second, third = confirmed(rows, ratios, {1: 0.01, 2: 0.01, 3: 0.01}, spread=0.002)
    assert second["front_probability"] > 0.95, "though it is slower than 1 by their means"
    assert first["time_ratio"] / second["time_ratio"] == pytest.approx(2.0 / 1.9, rel=0.01)
    assert [one["rounds"] for one in (baseline, first, second, third)] == [3, 4, 2, 4]
    assert second["round_lines"] == [1, 2]


def test_what_scatters_the_baseline_is_no_measure_of_the_candidates():
    rows, ratios = [row(1, 2.0, 1.0), row(2, 2.1, 1.0)], {1: [2.0, 2.01, 1.99], 2: [2.1, 2.11, 2.09]}
    calm, *_, one = confirmed(rows, ratios, {1: 0.01, 2: 0.01})
    wild, *_, same = confirmed(rows, ratios | {"baseline": [34.0, 40.0, 47.0]}, {1: 0.01, 2: 0.01})
    assert [one["time_ratio_low"], one["time_ratio_high"]] == pytest.approx(
        [same["time_ratio_low"], same["time_ratio_high"]], rel=0.01
    )
    assert wild["time_ratio_high"] > 1.1 * calm["time_ratio_high"]


def test_what_looks_better_than_all_that_was_confirmed_is_found():
    rows = [
        row(1, 2.0, 1.0, 0.1, rounds=3),
        row(2, 1.0, 3.0, 0.1, rounds=3),
        row(3, 1.5, 2.5, 0.1),
        row(4, 1.5, 2.9, 0.1),  # better than 2, but not for certain
        row(5, 1.95, 0.5, 0.1),
        row(6, 1.5, 3.5, 0.1),
        row(7, 0.5, 0.5, 0.1, feasible=False),
    ]
    assert numbers(unconfirmed_better(rows, OBJECTIVES)) == [3, 5]
    assert numbers(unconfirmed_better(rows[:1] + rows[2:], OBJECTIVES)) == [3, 4, 5, 6]
    speedups = [one | {"speedup": 10 / one["time_ratio"]} for one in rows]
    assert numbers(unconfirmed_better(speedups, {"speedup": "maximize"})) == []


ROWS = [BASELINE, row(1, 1.0, 1.0), row(2, 2.0, 0.5)]


def ready(pool, folder, **more):
    """A scheduler whose workers are all ready."""
    of = scheduler(pool, folder, **more)
    of.share(TEXT)
    while pool.ready:
        of.step()
    return of


@pytest.fixture
def run(tmp_path):
    """Rounds on the pool's workers, all of one kind."""

    def run(pool, rounds=2, rows=ROWS, until=math.inf, folder=tmp_path):
        of = ready(pool, tmp_path)
        return take_rounds(StudyFolder(folder), of, subject(), rows, rounds, until, kind_of(KIND))

    return run


def test_rounds_take_every_candidate_in_turn_on_one_worker_after_another(run, tmp_path):
    pool = PretendPool(2)
    rounds = run(pool, rounds=3)
    assert [worker for worker, _ in pool.asked] == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    order = [(job.what.policy.n_sink, job.run) for job in pool.submitted]
    assert order == [(s, n) for n in (1, 2, 3) for s in (4, 1, 2)]
    assert [one.ratios["2"] for one in rounds] == [[1, 2], [2, 4], [3, 6]]
    assert rounds == read_rounds(StudyFolder(tmp_path)) and rounds[0].members == {"baseline", "1", "2"}
    assert rounds[0].times["2"] == RAW | {"time_ratio": 1.0, "timing": "exclusive"} | KIND


def test_machines_take_rounds_at_the_same_time(run):
    pool = PretendPool(descriptions=[description("here"), description("there"), description("there")])
    assert len(run(pool, rounds=2)) == 2
    assert {worker for worker, _ in pool.asked[:2]} == {0, 1}, "nobody waits for the other"
    assert {worker: {job.run for by, job in pool.asked if by == worker} for worker in (0, 1)} in (
        {0: {1}, 1: {2}},
        {0: {2}, 1: {1}},
    )


def test_rounds_end_when_the_next_would_not_be_finished_in_time(run, tmp_path, monkeypatch):
    """A round takes ten seconds here: the study's first in any case, and as many as fit."""
    now = [100.0]

    def answer(worker, job):
        now[0] += 10 / 3
        return measured(job)

    monkeypatch.setattr(rounds_module.time, "monotonic", lambda: now[0])
    for until, count in ((90.0, 1), (125.0, 2), (1000.0, 4)):
        now[0] = 100.0
        folder = tmp_path / str(count)
        folder.mkdir()
        assert len(run(PretendPool(1, answer), 4, until=until, folder=folder)) == count
    now[0] = 100.0
    assert not run(none := PretendPool(1, answer), 4, until=90.0, folder=folder) and not none.submitted


def test_a_round_counts_whole_or_not_at_all(run, tmp_path):
    """After a kill in the middle of the second round the first counts."""

    def answer(worker, job):
        if (job.run, job.what.policy.n_sink) == (2, 2):
            raise KeyboardInterrupt
        return measured(job)

    with pytest.raises(KeyboardInterrupt):
        run(PretendPool(1, answer))
    with (StudyFolder(tmp_path).rounds).open("a") as file:
        file.write('{"ratios": {"basel')
    kind = kind_of(KIND)
    assert [one.line for one in rounds_so_far(StudyFolder(tmp_path), kind)] == [1]
    again = PretendPool()
    assert [one.line for one in run(again, rounds=1)] == [2]
    assert [job.run for job in again.submitted] == [2, 2, 2]
    assert len(rounds_so_far(StudyFolder(tmp_path), kind)) == 2
    assert not rounds_so_far(StudyFolder(tmp_path), kind_of(KIND | {"device": "another"}))
    stale = [
        json.loads(line) | {"code": "of another engine"}
        for line in (StudyFolder(tmp_path).rounds).read_text().splitlines()
    ]
    (StudyFolder(tmp_path).rounds).write_text("".join(json.dumps(one) + "\n" for one in stale))
    assert not rounds_so_far(StudyFolder(tmp_path), kind)
    run(anew := PretendPool())
    assert [job.run for job in anew.submitted] == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("count", [1, 2])
def test_a_dead_workers_measurement_is_made_by_another_and_a_failing_candidate_left_out(count, run, tmp_path):
    deaths = []

    def answer(worker, job):
        if job.what.policy.n_sink == 2:
            return Finished(worker, error="ValueError: nope")
        if not deaths:
            deaths.append(worker)
            return Finished(worker, error="the worker died", died=True)
        return measured(job)

    pool = PretendPool(count, answer)
    rounds = run(pool)
    assert [sorted(one.ratios) for one in rounds] == [["1", "baseline"]] * 2
    assert [one.failed for one in rounds] == [{"2": "ValueError: nope"}] * 2
    assert [job.what.policy.n_sink for job in pool.submitted].count(2) == 1, "not tried again in the next round"


def test_without_workers_it_ends_with_the_reason_and_no_round_is_kept(run, tmp_path):
    lost = PretendPool(1, lambda worker, job: Finished(worker, error="boom", died=True, lost=True))
    with pytest.raises(SweepError, match="no worker is left of the kind that times were taken on"):
        run(lost)
    assert len(lost.submitted) == 1 and read_rounds(StudyFolder(tmp_path)) == []


def test_rounds_whose_kind_of_worker_is_not_there_end(tmp_path):
    of = ready(PretendPool(), tmp_path)
    with pytest.raises(SweepError, match="no worker of its kind is left"):
        take_rounds(StudyFolder(tmp_path), of, subject(), ROWS, 1, kind=kind_of(KIND | {"device": "gone"}))


@pytest.mark.parametrize("drift", [lambda at: 1.0, lambda at: 1.0 + at, lambda at: 1.0 + (at > 0.5)])
def test_clocks_that_drift_make_no_false_certainty(drift):
    """With known truth: two of the same policy 2% apart, one 10% slower and better, one 5% slower and dominated for
    certain. Paired, a machine that becomes twice as slow changes nothing."""
    truth, shifts = {1: 1.00, 2: 1.02, 3: 1.10, 4: 1.30}, {1: 0.02, 2: 0.02, 3: 0.0, 4: 0.02}
    wrong = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        rounds = []
        for number in range(3):
            ratios = {}
            for place, (trial, ratio) in enumerate({"baseline": 3.0, **truth}.items()):
                at = (number + place / 5) / 3
                pairs = [(ratio * drift(at) * random.lognormal(0, 0.03), drift(at) * random.lognormal(0, 0.03))
                         for _ in range(12)]  # fmt: skip
                ratios[str(trial)] = [own / reference for own, reference in pairs]
            rounds.append(Round(ratios, dict.fromkeys(ratios, RAW), {}, "code", number + 1))
        rows = [row(trial, 1.0, 100 * math.expm1(shifts[trial])) for trial in truth]
        _, *found = confirmed_rows(
            rounds, rows, BASELINE, COMPARISON, lambda row: losses(shifts[row["trial"]]), OBJECTIVES
        )
        merged = [one | more | {"tpot_ms": more["time_ratio"]} for one, more in zip(rows, found, strict=True)]
        front = set(numbers(study_front(merged, OBJECTIVES)))
        wrong += not (3 in front and len(front & {1, 2}) == 1 and 4 not in front)
        assert found[3]["front_probability"] < 0.05
    assert wrong <= 2, "5% of the fronts"
