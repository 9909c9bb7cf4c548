"""The driver over a pool of pretend workers, in this process."""

import math
import resource
import time
from dataclasses import asdict

import numpy as np
import pytest

from orchestrator.driver import Driver
from orchestrator.search.sampling import BaselineSample
from orchestrator.search.study import Study
from orchestrator.workers.messages import SweepError, TrialMeasurement
from orchestrator.workers.pool import Finished
from search_spaces import load_space
from streamllm.errors import UsageError
from streamllm.measuring.sample import sample_positions
from streamllm.policy import strict_policy
from streamllm.results.schema import Row

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
        self._ready.insert(0 if spec.configuration.method == "recompute" else len(self._ready), result)

    def wait(self, timeout):
        result = self._ready.pop()
        yield result
        if result.died:
            self._ready.append(Finished(result.worker, description={}))


def measured(worker, spec, **more):
    ratio = 10.0 if spec.configuration.method == "recompute" else 2.0 + spec.configuration.policy.n_sink
    record = {"time_ratio": ratio, "n_tokens": 51, "method": spec.configuration.method} | asdict(
        spec.configuration.policy
    )
    record["quality_entry"] = f"{spec.configuration.policy.n_sink}"
    table = losses(spec.configuration.policy.n_sink)
    if spec.configuration.method == "recompute":
        table = table[sample_positions(51, 1, spec.sampled_tokens)]
    return Finished(worker, measurement=TrialMeasurement(Row.of(record | more), table, True, True))


def losses(n_sink):
    return np.column_stack((np.arange(50.0), np.full(50, 1.0 + 0.01 * n_sink)))


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
        log.driver = Driver(study, pool, 32, trials, [log])
        log.driver.run()
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
        return measured(worker, spec, model_digest=one["model_digest"], text_digest=one["text_digest"])

    message = r"text on here: c{12}\.\.\., the study's is b{12}\.\.\."
    with pytest.raises(UsageError, match=message):
        drive(pool(other, one), 4)
    drive(pool(one, one), 4)
    with pytest.raises(UsageError, match=message):
        drive(pool(other), 8)


def test_trials_wait_for_the_reference_only_and_are_paired_with_the_baseline_later(drive):
    pool = PretendPool(3)
    study, log = drive(pool, 4)
    assert [spec.configuration.method for spec in pool.submitted[:2]] == ["ring", "recompute"]
    assert pool.submitted[0].configuration.policy == strict_policy(32)
    assert [row["trial"] for row in log.rows] == ["strict", 0, 1, 2, 3, "baseline", "baseline"]
    assert len(study.rows) == 4
    found = {row["trial"]: row for row in log.driver.increases(lambda entry: losses(int(entry)))}
    for row in study.rows:
        sinks = row["n_sink"]
        assert row["ppl_vs_strict_percent"] == pytest.approx(100 * math.expm1(0.01 * (sinks - 4)))
        assert "speedup" not in row
        assert found[row["trial"]]["ppl_increase_percent"] == pytest.approx(100 * math.expm1(0.01 * sinks))
    strict, baseline = log.rows[0], log.rows[-1]
    assert strict["ppl_vs_strict_percent"] == 0
    assert found["strict"]["ppl_increase_percent"] == pytest.approx(100 * math.expm1(0.04))
    assert baseline["perplexity"] == pytest.approx(math.e), "over all tokens, by the reference's"
    assert baseline["evaluated_tokens"] == 50


def test_trials_wait_for_the_baseline_where_a_limit_is_on_what_it_says(tmp_path):
    (tmp_path / "space.yaml").write_text(f"{SPACE}constraints: [ppl_increase_percent <= 1.5, speedup >= 2]\n")
    space, log, pool = load_space(str(tmp_path / "space.yaml")), Log(), PretendPool(3)
    study = Study("s", tmp_path / "journal.log", space, 32, seed=1)
    Driver(study, pool, 32, 4, [log], baseline_tokens=40).run()
    assert pool.submitted[1].sampled_tokens == 40, "all that was asked for, before anything is judged"
    assert [row["trial"] for row in log.rows][:2] == ["strict", "baseline"]
    for row in study.rows:
        assert row["speedup"] == pytest.approx(10.0 / row["time_ratio"])
        assert row["ppl_increase_percent"] == pytest.approx(100 * math.expm1(0.01 * row["n_sink"]))
        assert row["feasible"] == (row["n_sink"] < 2)


@pytest.mark.parametrize(("wanted", "tokens"), [(None, 50), (20, 24), (0, 50)])
def test_the_baselines_sample_grows_to_what_is_wanted(wanted, tokens, tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    pool, log = PretendPool(2), Log()
    study = Study("s", tmp_path / "journal.log", load_space(str(tmp_path / "space.yaml")), 32, seed=1)
    Driver(study, pool, 32, 4, [log], baseline_tokens=wanted).run()
    sizes = [spec.sampled_tokens for spec in pool.submitted if spec.configuration.method == "recompute"]
    assert sizes == sorted(set(sizes)) and len(sizes) > 2, "batch by batch"
    assert len(study.rows) == 4 and (log.rows[-1]["trial"], log.rows[-1]["sampled_tokens"]) == ("baseline", tokens)


def test_a_sample_does_not_grow_before_the_reference_is_there(tmp_path):
    """It would be asked for the batch that it has, and be taken to be unable to grow."""

    class LateReference(PretendPool):
        def submit(self, worker, spec):
            super().submit(worker, spec)
            if spec.configuration.method == "ring":
                self.reference = self._ready.pop()
            elif spec.configuration.method == "recompute" and len(self.submitted) == 2:
                self._ready.append(self._ready.pop(0))

        def wait(self, timeout):
            if not self._ready:
                self._ready.append(self.reference)
            return super().wait(timeout)

    (tmp_path / "space.yaml").write_text(SPACE)
    pool, log = LateReference(2), Log()
    study = Study("s", tmp_path / "journal.log", load_space(str(tmp_path / "space.yaml")), 32, seed=1)
    driver = Driver(study, pool, 32, 4, [log], baseline_tokens=24)
    driver._sample.spent(1000.0, on_it=False)
    driver.run()
    sizes = [spec.sampled_tokens for spec in pool.submitted if spec.configuration.method == "recompute"]
    assert sizes == [8, 16, 24]


def test_a_sample_that_cannot_grow_does_not_end_the_sweep(tmp_path):
    def answer(worker, spec):
        grown = spec.configuration.method == "recompute" and spec.sampled_tokens > 8
        return Finished(worker, error="ValueError: nope") if grown else measured(worker, spec)

    (tmp_path / "space.yaml").write_text(SPACE)
    study, notes = Study("s", tmp_path / "journal.log", load_space(str(tmp_path / "space.yaml")), 32, seed=1), []
    Driver(study, PretendPool(2, answer), 32, 4, [], notes.append).run()
    assert len(study.rows) == 4
    assert notes == ["warning: the baseline's sample stays at 8 tokens: ValueError: nope"]


def test_a_sample_grows_within_its_share_of_the_time():
    reference, sample = np.column_stack((np.arange(5000.0), np.zeros(5000))), BaselineSample()
    random = np.random.default_rng(0)

    def grow(seconds):
        places = sample_positions(5001, 1, sample.next_size)
        losses = np.column_stack((places, random.normal(size=len(places))))
        sample.spent(seconds, on_it=True)
        sample.measured(TrialMeasurement(Row(), losses, True, True), reference)

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
    assert len([spec for spec in pool.submitted if spec.configuration.method != "recompute"]) == 1 + 3


def test_an_exhausted_space_ends_the_sweep(drive):
    study, _ = drive(PretendPool(2), 100)
    assert len(study.rows) == 6


def test_a_failing_trial_does_not_take_the_sweep_along(drive):
    def answer(worker, spec):
        return (
            Finished(worker, error="ValueError: nope")
            if spec.configuration.policy.n_sink == 1
            else measured(worker, spec)
        )

    study, _ = drive(PretendPool(2, answer), 6)
    assert [row["state"] for row in study.rows].count("failed") == 2
    assert {row["reason"] for row in study.rows if row["state"] == "failed"} == {"ValueError: nope"}


def test_a_dead_workers_trial_is_tried_again_and_a_deadly_one_given_up(drive):
    deaths = []

    def answer(worker, spec):
        deadly = spec.configuration.policy.n_sink == 1
        unlucky = spec.configuration.policy.n_sink == 2 and not deaths
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
        if spec.configuration.method == "recompute" or spec.configuration.policy.n_sink != 1:
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
        died = spec.configuration.policy.n_sink == 1
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
    assert {spec.configuration.method for spec in pool.submitted} == {"ring", "recompute"}
    Driver(study, PretendPool(2), 32, 6, [], until=time.monotonic() + 600).run()
    assert len(study.rows) == 6


@pytest.mark.parametrize(
    ("seconds", "confirm", "more"), [(1000, 0, True), (900, 3, False), (1100, 3, True), (50, 0, False)]
)
def test_time_is_set_aside_for_what_runs_and_for_confirming(seconds, confirm, more, tmp_path):
    """A trial takes 20 + 40 seconds here, confirming 3 x (5 x 40 + 100)."""
    (tmp_path / "space.yaml").write_text(SPACE)
    space = load_space(str(tmp_path / "space.yaml"))

    def answer(worker, spec):
        seconds = {"quality_sec": 20.0, "speed_sec": 100.0 if spec.configuration.method == "recompute" else 40.0}
        return measured(worker, spec, **seconds)

    study = Study("s", tmp_path / "journal.log", space, 32, seed=1)
    Driver(study, PretendPool(1, answer), 32, 1, []).run()
    until = time.monotonic() + seconds
    Driver(study, PretendPool(1, answer), 32, 6, [], until=until, confirm=confirm).run()
    assert (len(study.rows) > 1) == more


def test_a_baseline_that_kills_workers_ends_the_sweep(drive):
    def answer(worker, spec):
        died = spec.configuration.method == "recompute"
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
        with pytest.raises(SweepError, match=r"study cannot be written: File too large: make room"):
            drive(PretendPool(1), 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    study, _ = drive(PretendPool(1), 6)
    assert len({(row["n_sink"], row["compress_every"]) for row in study.rows}) == 6
