"""The driver over a pool of pretend workers, in this process."""

import math
import resource
import time

import numpy as np
import pytest

from orchestrator.driver import Driver
from orchestrator.search.sampling import BaselineSample
from orchestrator.search.study import Study
from orchestrator.workers.messages import SweepError
from orchestrator.workers.pool import Finished
from search_spaces import load_space
from streamllm.errors import UsageError
from streamllm.measuring.sample import sample_positions
from streamllm.measuring.store import MeasurementStore
from streamllm.policy import strict_policy

from .pretended import TEXT, VARIANT, PretendPool, description, measured, scheduler
from .test_study import SPACE


class Log:
    def __init__(self):
        self.rows = []

    def trial_finished(self, row):
        self.rows.append(row)


@pytest.fixture
def drive(tmp_path):
    """Runs trials of a study, in a pool; `space`: more of its file; more: of the driver. The sampler looks at nothing
    that it does not try, unless another is named."""

    def drive(pool, trials, space="", notes=None, sampler="tpe", **more):
        (tmp_path / "space.yaml").write_text(SPACE + space)
        study = Study("s", tmp_path / "journal.log", load_space(str(tmp_path / "space.yaml")), 32, 1, sampler)
        log, notes = Log(), [] if notes is None else notes
        of = scheduler(pool, tmp_path, study.rows, notes.append)
        log.driver = Driver(study, of, TEXT, VARIANT, trials, [log], notes.append, **more)
        log.driver.run()
        return study, log

    return drive


def test_a_study_is_of_one_model_and_one_text(drive, monkeypatch):
    """Whatever worker comes, and whenever the study goes on."""
    one, other = (description(model_digest=digit * 64) for digit in "bc")
    message = r"model on here: c{12}\.\.\., the study's is b{12}\.\.\."
    with pytest.raises(UsageError, match=message):
        drive(PretendPool(descriptions=[other, one]), 4)
    drive(PretendPool(descriptions=[one, one]), 4)
    with pytest.raises(UsageError, match=message):
        drive(PretendPool(descriptions=[other]), 8)
    monkeypatch.setattr("tests.test_driver.TEXT", TEXT.__class__(TEXT.tokens, "none", "u"))
    with pytest.raises(UsageError, match=r"text 'none': u\.\.\., the study's is t\.\.\."):
        drive(PretendPool(descriptions=[one]), 8)


def test_a_node_with_other_code_is_refused(drive):
    with pytest.raises(UsageError, match="there has other code of streamllm-sweep than this machine: install the same"):
        drive(PretendPool(descriptions=[description("there", code="0")]), 4)


def test_trials_wait_for_the_reference_only_and_are_paired_with_the_baseline_later(drive, tmp_path):
    pool = PretendPool(descriptions=[description(f"node {number}") for number in range(3)])
    study, log = drive(pool, 4)
    assert pool.submitted[0].what.policy == strict_policy(32)
    assert [row["trial"] for row in log.rows if row["trial"] != "strict"] == [0, 1, 2, 3, "baseline", "baseline"]
    assert len(study.rows) == 4
    found = {row["trial"]: row for row in log.driver.increases(MeasurementStore(tmp_path / "store").losses)}
    for row in study.rows:
        sinks = row["n_sink"]
        assert row["ppl_vs_strict_percent"] == pytest.approx(100 * math.expm1(0.01 * (sinks - 4)))
        assert "speedup" not in row
        assert found[row["trial"]]["ppl_increase_percent"] == pytest.approx(100 * math.expm1(0.01 * sinks))
    (strict,), baseline = [row for row in log.rows if row["trial"] == "strict"], log.rows[-1]
    assert strict["ppl_vs_strict_percent"] == 0
    assert found["strict"]["ppl_increase_percent"] == pytest.approx(100 * math.expm1(0.04))
    assert baseline["perplexity"] == pytest.approx(math.e), "over all tokens, by the reference's"
    assert baseline["evaluated_tokens"] == 50
    for row in (*study.rows, strict):
        assert row["host"] == f"node {row['worker']}", "who measured it"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_trial_waits_for_no_time_but_its_own(workers, drive):
    """Those of reference and baseline, of which the first trial needs nothing, come right after it."""
    pool = PretendPool(workers)
    _, log = drive(pool, 6)
    timed = [job.what.method for job in pool.submitted if job.kind == "speed"]
    assert (log.rows[0]["trial"], pool.submitted[0].what.policy) == (0, strict_policy(32))
    assert timed[0] == "ours" and {"ring", "recompute"} <= set(timed[1 : 3 + workers])


def test_without_a_trial_reference_and_baseline_are_measured_all_the_same(drive):
    for trials, until in ((0, math.inf), (4, time.monotonic())):
        _, log = drive(PretendPool(2), trials, until=until)
        assert [row["trial"] for row in log.rows][:2] == ["strict", "baseline"]


def test_trials_wait_for_the_baseline_where_a_limit_is_on_what_it_says(drive):
    pool = PretendPool(3)
    study, log = drive(pool, 4, "constraints: [ppl_increase_percent <= 1.5, speedup >= 2]\n", baseline_tokens=40)
    assert [row["trial"] for row in log.rows][:2] == ["strict", "baseline"]
    assert log.rows[1]["sampled_tokens"] == 40, "all that was asked for, before anything is judged"
    for row in study.rows:
        assert row["speedup"] == pytest.approx(10.0 / row["time_ratio"])
        assert row["ppl_increase_percent"] == pytest.approx(100 * math.expm1(0.01 * row["n_sink"]))
        assert row["feasible"] == (row["n_sink"] < 2)


@pytest.mark.parametrize(("wanted", "tokens"), [(None, 50), (20, 24), (0, 50)])
def test_the_baselines_sample_grows_to_what_is_wanted(wanted, tokens, drive):
    pool = PretendPool(2)
    study, log = drive(pool, 4, baseline_tokens=wanted)
    assert pool.sampled == list(range(len(pool.sampled))) and len(pool.sampled) > 2, "batch by batch, each once"
    assert len(study.rows) == 4 and (log.rows[-1]["trial"], log.rows[-1]["sampled_tokens"]) == ("baseline", tokens)
    again = PretendPool(2)
    _, log = drive(again, 4, baseline_tokens=wanted)
    assert not again.sampled and log.rows[-1]["sampled_tokens"] == tokens, "what is stored counts whole"


def test_a_sample_that_cannot_grow_does_not_end_the_sweep(drive):
    def answer(worker, job):
        return Finished(worker, error="ValueError: nope") if job.batch else measured(job)

    notes = []
    study, _ = drive(PretendPool(2, answer), 4, notes=notes)
    assert len(study.rows) == 4
    assert notes == ["warning: the baseline's sample stays at 8 tokens: ValueError: nope"]


def test_a_sample_grows_within_its_share_of_the_time():
    reference, sample = np.column_stack((np.arange(5000.0), np.zeros(5000))), BaselineSample()
    random = np.random.default_rng(0)

    def grow(seconds):
        places = sample_positions(5001, 1, sample.tokens + 8 * sample.next_batches)
        losses = np.column_stack((places, random.normal(size=len(places))))
        sample.spent(seconds, on_it=True)
        sample.measured(losses, reference)

    grow(10.0)
    assert sample.is_short() and not sample.is_due(), "all of the time so far was its own"
    sample.spent(29.0, on_it=False)
    assert not sample.is_due()
    sample.spent(1.0, on_it=False)
    assert sample.is_due(), "a quarter"
    for _ in range(7):
        grow(0.0)
    assert sample.tokens == 64 and not sample.is_short() and sample.is_due(), "not precise: nothing waits for it"


def test_going_on_measures_only_what_is_missing(drive):
    drive(PretendPool(1), 2)
    pool = PretendPool(1)
    study, _ = drive(pool, 5)
    assert len(study.rows) == 5
    assert len(pool.measured) == 3, "the reference is stored"


def test_an_exhausted_space_ends_the_sweep(drive):
    study, _ = drive(PretendPool(2), 100)
    assert len(study.rows) == 6


@pytest.mark.parametrize("kind", ["quality", "speed"])
def test_a_failing_trial_does_not_take_the_sweep_along(kind, drive):
    def answer(worker, job):
        fails = job.what.policy.n_sink == 1 and job.kind == kind
        return Finished(worker, error="ValueError: nope") if fails else measured(job)

    study, _ = drive(PretendPool(2, answer), 6)
    assert [row["state"] for row in study.rows].count("failed") == 2
    assert {row["reason"] for row in study.rows if row["state"] == "failed"} == {"ValueError: nope"}


def test_a_dead_workers_trial_is_tried_again_and_a_deadly_one_given_up(drive):
    deaths = []

    def answer(worker, job):
        deadly = job.what.policy.n_sink == 1
        unlucky = job.what.policy.n_sink == 2 and not deaths
        if deadly or unlucky:
            deaths.append(job)
            return Finished(worker, error="the worker died", died=True)
        return measured(job)

    study, _ = drive(PretendPool(2, answer), 6)
    failed = [row for row in study.rows if row["state"] == "failed"]
    assert {row["n_sink"] for row in failed} == {1}
    assert {row["reason"] for row in failed} == {"quarantined: 2 workers ended on it: the worker died"}
    assert len(study.rows) == 6
    assert len(deaths) == 1 + 2 * 2


def test_a_node_that_dies_with_both_jobs_of_a_trial_costs_it_one_attempt(drive):
    """Not two, which would quarantine it."""
    gone = []

    def answer(worker, job):
        if job.what.policy.n_sink == 1 and job.kind in ("quality", "speed") and (job.kind, job.what) not in gone:
            gone.append((job.kind, job.what))
            return Finished(worker, error="the node died", died=True)
        return measured(job)

    nodes = [description(f"node {number}") for number in range(3)]
    study, _ = drive(PretendPool(answer=answer, descriptions=nodes), 6)
    assert len(gone) == 4 and {row["state"] for row in study.rows} == {"complete"}


def test_a_deadly_trial_is_quarantined_over_several_starts(drive):
    deaths = []

    def answer(worker, job):
        if job.what.method == "recompute" or job.what.policy.n_sink != 1:
            return measured(job)
        deaths.append(job)
        if len(deaths) == 2:
            raise KeyboardInterrupt
        return Finished(worker, error="boom", died=True)

    with pytest.raises(KeyboardInterrupt):
        drive(PretendPool(1, answer), 6)
    study, _ = drive(PretendPool(1, answer), 6)
    reasons = [row["reason"] for row in study.rows if row["state"] == "failed"]
    assert reasons == ["quarantined: 2 workers ended on it: boom"] * 2
    assert len(deaths) == 1 + 1 + 1 + 2, "dead, interrupted, dead again; then the other one"


def test_a_sweep_goes_on_when_its_only_worker_has_died(drive):
    def answer(worker, job):
        return Finished(worker, error="boom", died=True) if job.what.policy.n_sink == 1 else measured(job)

    study, _ = drive(PretendPool(1, answer), 6)
    assert len(study.rows) == 6


def test_unusable_input_ends_the_sweep_with_the_reason(drive):
    pool = PretendPool(1)
    pool.ready = [Finished(0, error="TextError: too short")]
    with pytest.raises(UsageError, match="too short"):
        drive(pool, 2)


def test_nothing_new_is_asked_for_after_the_time_budget(drive):
    pool = PretendPool(2)
    drive(pool, 6, until=time.monotonic())
    assert {job.what.method for job in pool.submitted} == {"ring", "recompute"}
    study, _ = drive(PretendPool(2), 6, until=time.monotonic() + 600)
    assert len(study.rows) == 6


@pytest.mark.parametrize(
    ("seconds", "confirm", "more"), [(1000, 0, True), (900, 3, False), (1100, 3, True), (50, 0, False)]
)
def test_time_is_set_aside_for_what_runs_and_for_confirming(seconds, confirm, more, drive):
    """A trial takes 20 + 40 seconds here, confirming 3 x (5 x 40 + 100)."""

    def answer(worker, job):
        if job.kind == "quality":
            return measured(job, quality_sec=20.0)
        return measured(job, speed_sec=100.0 if job.what.method == "recompute" else 40.0)

    drive(PretendPool(1, answer), 1)
    study, _ = drive(PretendPool(1, answer), 6, until=time.monotonic() + seconds, confirm=confirm)
    assert (len(study.rows) > 1) == more


def test_a_baseline_that_kills_workers_ends_the_sweep(drive):
    def answer(worker, job):
        return Finished(worker, error="boom", died=True) if job.what.method == "recompute" else measured(job)

    with pytest.raises(SweepError, match=r"baseline could not be measured: quarantined: 2 .*boom"):
        drive(PretendPool(1, answer), 2)


def test_what_a_worker_finds_wrong_is_said(drive):
    notes = []
    drive(PretendPool(descriptions=[description() | {"warnings": ["cores shared"]}]), 1, notes=notes)
    assert notes == ["warning: worker 0: cores shared"]


def test_a_full_disk_under_the_study_ends_the_sweep_in_one_line_and_it_goes_on_later(drive, tmp_path):
    """The limit is the kernel's own; it stands in for a full disk."""
    journal = tmp_path / "journal.log"
    drive(PretendPool(1), 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 700, before[1]))
    try:
        with pytest.raises(SweepError, match=r"(study|store \S+) cannot be written.*File too large.*: make room"):
            drive(PretendPool(1), 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    study, _ = drive(PretendPool(1), 6)
    assert len({(row["n_sink"], row["compress_every"]) for row in study.rows}) == 6


def test_looks_are_no_trials_cost_a_quality_once_and_are_done_beside_others(drive, tmp_path):
    pool = PretendPool(2)
    study, log = drive(pool, 3, sampler="front")
    assert [row["trial"] for row in log.rows if isinstance(row["trial"], int)] == [0, 1, 2] and len(study.rows) == 3
    names = [job for job in pool.submitted if job.kind == "quality" and job.what.method != "recompute"]
    assert len(names) == len({job.what.policy for job in names}), "none twice"
    assert len([job for job in pool.submitted if job.kind == "speed"]) == 3 + 2, "and the reference's, the baseline's"
    again = PretendPool(2)
    drive(again, 3, sampler="front")
    assert not again.submitted


def test_a_look_that_fails_is_said_and_nothing_of_its_policy_is_tried(drive):
    def answer(worker, job):
        if job.kind == "quality" and job.what.policy.n_sink == 1:
            return Finished(worker, error="it is not finite")
        return measured(job)

    notes = []
    study, _ = drive(PretendPool(1, answer), 6, notes=notes, sampler="front")
    tried = [row for row in study.rows if row["state"] == "complete"]
    assert len(tried) == 4 and all(row["n_sink"] != 1 for row in tried)
    warned = [note for note in notes if "is tried: it is not finite" in note]
    assert len(warned) == 2, "of both policies with one sink"


def test_a_search_that_is_to_find_all_that_matters_stops_when_hardly_anything_is_left(drive):
    study, _ = drive(PretendPool(1), 6, sampler="front", complete_to=0.01)
    assert len(study.rows) < 6 and study.chance_of(0.01) < 0.05
    best = min(study.rows, key=lambda row: row["time_ratio"])
    assert best["n_sink"] == 0


def test_the_search_goes_on_where_what_was_timed_again_leaves_more_to_find(drive, monkeypatch):
    study, log = drive(PretendPool(1), 6, sampler="front", complete_to=0.01)
    before = len(study.rows)
    assert not log.driver.goes_on() and len(study.rows) == before < 6, "nothing has changed"
    chances = iter([0.3, 0.01])
    monkeypatch.setattr(study, "chance_of", lambda share: next(chances))
    assert log.driver.goes_on() and len(study.rows) == before + 1, "by one, after which hardly anything is left"
    _, log = drive(PretendPool(1), 6, sampler="front")
    assert not log.driver.goes_on()
