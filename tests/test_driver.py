"""The driver over a pool of pretend workers, in this process."""

import math
import resource
import time
from dataclasses import asdict

import numpy as np
import pytest

from orchestrator.driver import Driver
from orchestrator.pool import Finished, SweepError
from orchestrator.study import Study
from orchestrator.trial import TrialMeasurement
from search_spaces import load_space
from streamllm.errors import UsageError
from streamllm.policy import strict_policy

from .test_study import SPACE


class PretendPool:
    """Answers each trial at once, as `answer(worker, spec)` says; `late` holds the baseline back."""

    def __init__(self, count, answer=None):
        self.count = count
        self.answer = answer or measured
        self.submitted = []
        self._ready = [Finished(worker, description={}) for worker in range(count)]

    def submit(self, worker, spec):
        self.submitted.append(spec)
        result = self.answer(worker, spec)
        # The baseline takes longest: everything else is back before it.
        self._ready.insert(0 if spec.method == "recompute" else len(self._ready), result)

    def wait(self, timeout):
        result = self._ready.pop()
        yield result
        if result.died:
            self._ready.append(Finished(result.worker, description={}))


def measured(worker, spec):
    ratio = 10.0 if spec.method == "recompute" else 2.0 + spec.policy.n_sink
    record = {"time_ratio": ratio, "n_tokens": 51, "method": spec.method} | asdict(spec.policy)
    losses = np.column_stack((np.arange(50.0), np.full(50, 1.0 + 0.01 * spec.policy.n_sink)))
    if spec.method == "recompute":
        losses = losses[::5]
    return Finished(worker, measurement=TrialMeasurement(record, losses, True, True))


class Log:
    def __init__(self):
        self.rows = []

    def worker_ready(self, worker, description):
        pass

    def trial_started(self, worker, spec):
        pass

    def trial_finished(self, row):
        self.rows.append(row)


@pytest.fixture
def drive(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    space = load_space(str(tmp_path / "space.yaml"))

    def drive(pool, trials):
        study, log = Study("s", tmp_path / "journal.log", space, 32, seed=1), Log()
        Driver(study, pool, 32, trials, [log]).run()
        return study, log

    return drive


def test_a_study_is_of_one_model_and_one_text(drive):
    """Whatever worker comes, and whenever the study goes on."""
    one, other = ({"host": "here", "model_digest": "a" * 64, "text_digest": text * 64} for text in "bc")

    def pool(*descriptions):
        made = PretendPool(len(descriptions), with_digests)
        made._ready = [Finished(worker, description=given) for worker, given in enumerate(descriptions)]
        return made

    def with_digests(worker, spec):
        finished = measured(worker, spec)
        finished.measurement.record.update(one)
        return finished

    message = r"text on here: c{12}\.\.\., the study's is b{12}\.\.\."
    with pytest.raises(UsageError, match=message):
        drive(pool(other, one), 4)
    drive(pool(one, one), 4)
    with pytest.raises(UsageError, match=message):
        drive(pool(other), 8)


def test_rows_wait_for_the_baseline_and_are_paired_with_it(drive):
    pool = PretendPool(3)
    study, log = drive(pool, 4)
    assert [spec.method for spec in pool.submitted[:2]] == ["ring", "recompute"]
    assert pool.submitted[0].policy == strict_policy(32)
    assert [row["trial"] for row in log.rows] == ["strict", "baseline", *(row["trial"] for row in study.rows)]
    assert len(study.rows) == 4
    for row in study.rows:
        sinks = row["n_sink"]
        assert row["speedup"] == pytest.approx(10.0 / row["time_ratio"])
        assert row["ppl_vs_strict_percent"] == pytest.approx(100 * math.expm1(0.01 * (sinks - 4)))
        assert row["ppl_increase_percent"] == pytest.approx(100 * math.expm1(0.01 * sinks))
    strict, baseline = log.rows[:2]
    assert strict["ppl_vs_strict_percent"] == 0
    assert baseline["perplexity"] == pytest.approx(math.e), "over all tokens, by the reference's"
    assert (baseline["evaluated_tokens"], baseline["sampled_tokens"]) == (50, 10)


def test_going_on_measures_only_what_is_missing(drive):
    drive(PretendPool(1), 2)
    pool = PretendPool(1)
    study, _ = drive(pool, 5)
    assert len(study.rows) == 5
    assert len(pool.submitted) == 2 + 3


def test_an_exhausted_space_ends_the_sweep(drive):
    study, _ = drive(PretendPool(2), 100)
    assert len(study.rows) == 6


def test_a_failing_trial_does_not_take_the_sweep_along(drive):
    def answer(worker, spec):
        return Finished(worker, error="ValueError: nope") if spec.policy.n_sink == 1 else measured(worker, spec)

    study, _ = drive(PretendPool(2, answer), 6)
    assert [row["state"] for row in study.rows].count("failed") == 2
    assert {row["reason"] for row in study.rows if row["state"] == "failed"} == {"ValueError: nope"}


def test_a_dead_workers_trial_is_tried_again_and_a_deadly_one_given_up(drive):
    deaths = []

    def answer(worker, spec):
        deadly = spec.policy.n_sink == 1
        unlucky = spec.policy.n_sink == 2 and not deaths
        if deadly or unlucky:
            deaths.append(spec)
            return Finished(worker, error="the worker died", died=True)
        return measured(worker, spec)

    study, _ = drive(PretendPool(2, answer), 6)
    failed = [row for row in study.rows if row["state"] == "failed"]
    assert {row["n_sink"] for row in failed} == {1}
    assert {row["reason"] for row in failed} == {"quarantined: 2 workers ended on it: the worker died"}
    assert len(study.rows) == 6
    assert len(deaths) == 1 + 2 * 2


def test_a_deadly_trial_is_quarantined_over_several_starts(drive):
    deaths = []

    def answer(worker, spec):
        if spec.method == "recompute" or spec.policy.n_sink != 1:
            return measured(worker, spec)
        deaths.append(spec)
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
    def answer(worker, spec):
        died = spec.policy.n_sink == 1
        return Finished(worker, error="boom", died=True) if died else measured(worker, spec)

    study, _ = drive(PretendPool(1, answer), 6)
    assert len(study.rows) == 6


def test_unusable_input_ends_the_sweep_with_the_reason(drive):
    pool = PretendPool(1)
    pool._ready = [Finished(0, error="TextError: too short")]
    with pytest.raises(UsageError, match="too short"):
        drive(pool, 2)


def test_nothing_new_is_asked_for_after_the_time_budget(drive, tmp_path):
    space = load_space(str(tmp_path / "space.yaml"))
    study, pool = Study("s", tmp_path / "journal.log", space, 32, seed=1), PretendPool(2)
    Driver(study, pool, 32, 6, [], until=time.monotonic()).run()
    assert [spec.method for spec in pool.submitted] == ["ring", "recompute"]
    Driver(study, PretendPool(2), 32, 6, [], until=time.monotonic() + 600).run()
    assert len(study.rows) == 6


def test_a_baseline_that_kills_workers_ends_the_sweep(drive):
    def answer(worker, spec):
        died = spec.method == "recompute"
        return Finished(worker, error="boom", died=True) if died else measured(worker, spec)

    with pytest.raises(SweepError, match=r"baseline could not be measured: quarantined: 2 .*boom"):
        drive(PretendPool(1, answer), 2)


def test_what_a_worker_finds_wrong_is_said(drive, tmp_path):
    pool, notes = PretendPool(1), []
    pool._ready = [Finished(0, description={"warnings": ["cores shared"]})]
    space = load_space(str(tmp_path / "space.yaml"))
    Driver(Study("s", tmp_path / "journal.log", space, 32, seed=1), pool, 32, 1, [], notes.append).run()
    assert notes == ["warning: worker 0: cores shared"]


def test_a_full_disk_under_the_study_ends_the_sweep_in_one_line_and_it_goes_on_later(drive, tmp_path):
    """The limit is the kernel's own; it stands in for a full disk."""
    journal = tmp_path / "journal.log"
    drive(PretendPool(1), 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 700, before[1]))
    try:
        with pytest.raises(SweepError, match=r"study cannot be written \(File too large\): make room"):
            drive(PretendPool(1), 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    study, _ = drive(PretendPool(1), 6)
    assert len({(row["n_sink"], row["compress_every"]) for row in study.rows}) == 6
