"""The scheduler over pretended workers, whose answers come one by one in a random order."""

import random
from itertools import pairwise

import numpy as np
import pytest

from orchestrator.scheduler import Scheduler
from orchestrator.waiting import JobError
from orchestrator.workers.kinds import kind_of
from orchestrator.workers.messages import Subject, SweepError, Variant
from orchestrator.workers.pool import Finished
from streamllm.configuration import Configuration
from streamllm.errors import UsageError
from streamllm.measuring.jobs import Job
from streamllm.measuring.store import MeasurementStore
from streamllm.measuring.text import TokenStream
from streamllm.policy import EvictionPolicy

from .pretended import KIND, TEXT, TOTAL, VARIANT, PretendPool, description, measured, subject

OTHER_TEXT = TokenStream(np.arange(1, 52), "other", "u")
INT8 = Variant("float32", "int8")
CUDA = {"device_type": "cuda"}


def what(sinks, **more):
    return Configuration("ours", EvictionPolicy(n_sink=sinks, window_size=8), **more)


def quality(sinks, **more):
    return Job("quality", what(sinks), **more)


def speed(sinks, **more):
    return Job("speed", what(sinks), **more)


class Flying(PretendPool):
    """Notes what is measured beside what."""

    def __init__(self, *arguments, seed=0, **more):
        super().__init__(*arguments, **more)
        self.flying = {}
        self.beside = []
        """Jobs, each with those that its machine was at when it began."""
        self.assignments = []
        self.conditions_asked = []
        self._random = random.Random(seed)

    def submit(self, worker, assignment):
        host = self.descriptions[worker]["host"]
        others = [job for other, job in self.flying.items() if self.descriptions[other]["host"] == host]
        assert worker not in self.flying, "one job at a time"
        self.beside.append((assignment.job, others))
        self.assignments.append((worker, assignment))
        self.flying[worker] = assignment.job
        super().submit(worker, assignment)

    def ask_conditions(self, worker, variant):
        self.conditions_asked.append((worker, variant))
        super().ask_conditions(worker, variant)

    def wait(self, timeout):
        self._random.shuffle(self.ready)
        for finished in super().wait(timeout):
            self.flying.pop(finished.worker, None)
            yield finished

    def pairs(self):
        """Jobs that were measured at the same time on one machine."""
        return [(one, other) for one, others in self.beside for other in others]


class SideBySide:
    def side_by_side(self, kind, workers):
        return True

    def look(self, scheduler):
        pass


@pytest.fixture
def schedule(tmp_path):
    """A scheduler over a pool whose workers are all ready."""

    def schedule(pool, **more):
        of = Scheduler(pool, MeasurementStore(tmp_path / "store"), VARIANT, **more)
        for text in (TEXT, OTHER_TEXT):
            of.share(text)
        while of.ready < len(pool.descriptions):
            of.step()
        return of

    return schedule


def asked(of, *jobs, about=None, **more):
    """The list that the jobs' results will be in, or the reason that there are none."""
    results = []

    def plan():
        return (yield list(jobs))

    def then(found):
        results.extend([found] if isinstance(found, JobError) else found)

    of.start(plan(), about or subject(), then, **more)
    return results


def run(of):
    while of.is_working:
        of.step()


def test_one_measurement_however_many_ask(schedule):
    pool = Flying(3)
    of = schedule(pool)
    results = [asked(of, quality(1), speed(1)) for _ in range(5)]
    run(of)
    assert sorted(map(str, pool.submitted)) == sorted(map(str, (quality(1), speed(1))))
    assert len({id(done.measurement) for found in results for done in found}) == 2 and all(map(len, results))


def test_what_two_texts_share_is_measured_once(schedule):
    """A time does not depend on the text: another job, of the same name in the store."""
    pool = Flying(descriptions=[description(f"node {number}") for number in range(2)])
    of = schedule(pool)
    texts = [Subject(text.digest, VARIANT, TOTAL) for text in (TEXT, OTHER_TEXT)]
    results = [asked(of, quality(1), speed(1), about=about) for about in texts]
    run(of)
    assert sorted(job.kind for job in pool.submitted) == ["quality", "quality", "speed"]
    assert results[0][1].measurement == results[1][1].measurement
    assert results[0][0].measurement is not results[1][0].measurement


def test_what_is_stored_is_never_measured_and_peeking_never_measures(schedule):
    of = schedule(Flying(2))
    first = asked(of, quality(1), speed(1))
    run(of)
    pool = Flying(2)
    of = schedule(pool)
    stored = asked(of, quality(1), speed(1))
    peeked = asked(of, quality(1, peek=True), quality(2, peek=True))
    run(of)
    assert not pool.submitted
    assert [(done.is_fresh, done.seconds) for done in stored] == [(False, 0.0)] * 2
    assert all(done.is_fresh for done in first)
    assert peeked[0].measurement.record == first[0].measurement.record and peeked[1] is None


def test_a_plan_that_fails_forgets_what_nobody_else_waits_for(schedule):
    def answer(worker, job):
        return Finished(worker, error="ValueError: nope") if job == quality(0) else measured(job)

    pool = Flying(1, answer)
    of = schedule(pool)
    failed = asked(of, quality(0), quality(1), quality(2))
    other = asked(of, quality(2))
    run(of)
    assert str(failed[0]) == "ValueError: nope" and len(failed) == 1
    assert len(other) == 1 and pool.submitted == [quality(0), quality(2)]
    again = asked(of, quality(1))
    run(of)
    assert len(again) == 1 and pool.submitted[-1] == quality(1)


def test_a_plan_may_go_on_after_a_failure(schedule):
    def answer(worker, job):
        return Finished(worker, error="gone", unavailable=True) if job == quality(0) else measured(job)

    of, found = schedule(Flying(1, answer)), []

    def plan():
        try:
            yield [quality(0)]
        except JobError as error:
            assert error.unavailable
            return (yield [quality(1)])

    of.start(plan(), subject(), found.extend)
    run(of)
    assert len(found) == 1


def test_quarantine_is_counted_by_plan(schedule):
    def answer(worker, job):
        return Finished(worker, error="boom", died=True)

    pool = Flying(2, answer)
    of = schedule(pool)
    before = iter((2, 3))
    one = asked(of, quality(1), died=lambda: next(before))
    other = asked(of, quality(1))
    while not one:
        of.step()
    assert not other and not pool.submitted[2:], "one worker had ended on a job of the first plan before"
    run(of)
    assert len(pool.submitted) == 2
    assert {str(found[0]) for found in (one, other)} == {"quarantined: 2 workers ended on it: boom"}


@pytest.mark.parametrize("seed", range(5))
def test_nothing_runs_beside_a_timing_on_a_cpu(schedule, seed):
    pool = Flying(4, seed=seed)
    of = schedule(pool, turns=SideBySide())
    assert of.timed_in_turn == 4
    for sinks in range(40):
        asked(of, quality(sinks))
    of.assign()
    assert len(pool.flying) == 4
    for sinks in range(6):
        asked(of, speed(sinks))
    run(of)
    assert len(pool.submitted) == 46
    assert pool.pairs() and all(not one.is_timed and not other.is_timed for one, other in pool.pairs())
    timings = [place for place, job in enumerate(pool.submitted) if job.is_timed]
    assert max(timings) < 4 + 6, "no quality that has not begun is waited for"
    assert {assignment.side_by_side for _, assignment in pool.assignments} == {False}


@pytest.mark.parametrize("seed", range(5))
def test_on_accelerators_others_compute_beside_the_one_that_is_timed(schedule, seed):
    pool = Flying(descriptions=[description(**CUDA)] * 4, seed=seed)
    of = schedule(pool)
    results = [asked(of, quality(sinks), speed(sinks)) for sinks in range(12)]
    run(of)
    kinds = {frozenset((one.kind, other.kind)) for one, other in pool.pairs()}
    assert kinds == {frozenset(["quality"]), frozenset(["quality", "speed"])}
    assert {found[1].measurement.record["timing"] for found in results} == {"exclusive"}
    assert "timing" not in results[0][0].measurement.record and of.timed_in_turn == 4


@pytest.mark.parametrize("seed", range(5))
def test_side_by_side_but_alone_what_is_measured_again(schedule, seed):
    pool = Flying(descriptions=[description(**CUDA)] * 4, seed=seed)
    of = schedule(pool, turns=SideBySide())
    assert of.timed_in_turn == 1
    results = [asked(of, quality(sinks), speed(sinks)) for sinks in range(12)]
    again = [asked(of, speed(sinks, run=1)) for sinks in range(3)]
    rounds = asked(of, Job("times", what(1), run=1), on=2)
    run(of)
    assert ("speed", "speed") in {(one.kind, other.kind) for one, other in pool.pairs()}
    assert all(not one.run and not other.run for one, other in pool.pairs()), "not even a quality"
    assert {found[1].measurement.record["timing"] for found in results} == {"concurrent"}
    assert {done.measurement.record["timing"] for done in (*rounds, *(found[0] for found in again))} == {"exclusive"}
    for _, assignment in pool.assignments:
        assert assignment.side_by_side == (assignment.job.kind == "speed" and not assignment.job.run)


def test_accelerators_of_two_kinds_on_a_node_are_timed_one_at_a_time(schedule):
    pool = Flying(descriptions=[description(**CUDA), description(kind={"device": "other"}, **CUDA)])
    of = schedule(pool, turns=SideBySide())
    for sinks in range(6):
        asked(of, speed(sinks))
    run(of)
    assert not pool.pairs() and not of.accelerators()


def test_what_was_timed_beside_others_counts_only_where_it_would_be_again(schedule):
    def pool():
        return Flying(descriptions=[description(**CUDA)] * 2)

    results = []
    for turns in (SideBySide(), SideBySide(), None, None, SideBySide()):
        of = schedule(pool(), turns=turns)
        results.append(asked(of, speed(1)))
        run(of)
    found = [(done.is_fresh, done.measurement.record["timing"]) for (done,) in results]
    assert found == [(True, "concurrent"), (False, "concurrent"), (True, "exclusive"), *[(False, "exclusive")] * 2]


@pytest.mark.parametrize("seed", range(3))
def test_a_model_is_asked_for_while_it_is_unknown_only_and_workers_prefer_those_that_they_have(schedule, seed):
    pool = Flying(2, seed=seed)
    of = schedule(pool)
    results = [
        asked(of, Job("quality", what(sinks, quantization=quantization)))
        for sinks in range(10)
        for quantization in ("int8", "none")
    ]
    run(of)
    assert all(map(len, results)) and len(pool.submitted) == 20
    askers = [worker for worker, variant in pool.conditions_asked if variant == INT8]
    assert askers and len(set(askers)) == len(askers) == len(pool.conditions_asked), "by nobody twice"
    for worker in range(2):
        variants = [one.subject.variant for by, one in pool.assignments if by == worker]
        changes = sum(one != other for one, other in pairwise(variants))
        assert variants[0] == VARIANT and changes <= 1, "each model until there is nothing left of it"
    late = asked(of, Job("quality", what(11, quantization="int8")))
    run(of)
    assert late and len(pool.conditions_asked) == len(askers)


def test_a_job_may_be_forgotten_while_a_model_is_loaded_for_it(schedule):
    """Its plan has failed meanwhile."""

    class Half(PretendPool):
        def ask_conditions(self, worker, variant):
            super().ask_conditions(worker, variant)
            if len(self.ready) == 2:  # the first is loading; the last answers first
                self.ready[-1] = Finished(worker, error="UsageError: no int8 here", unavailable=True)

    pool = Half(2)
    of = schedule(pool)
    found = asked(of, *(Job("quality", what(sinks, quantization="int8")) for sinks in range(2)))
    while not found:
        of.step()
    other = asked(of, quality(3))
    while not other or pool.ready:
        of.step()
    assert found[0].unavailable and len(other) == 1 and pool.submitted == [quality(3)]


def test_a_plan_that_began_on_a_worker_moves_to_another_of_its_kind_only(schedule):
    def answer(worker, job):
        deadly = worker == 0 and job.run == 1
        return Finished(worker, error="boom", died=True, lost=True) if deadly else measured(job)

    kinds = [KIND, {"device": "other"}, KIND]
    pool = Flying(answer=answer, descriptions=[description(f"node {n}", kind) for n, kind in enumerate(kinds)])
    of = schedule(pool)
    found = asked(of, Job("times", what(1), run=1), on=0)
    run(of)
    assert [worker for worker, _ in pool.asked] == [0, 2] and len(found) == 1

    pool = Flying(answer=answer, descriptions=[description(f"node {n}", kind) for n, kind in enumerate(kinds[:2])])
    of = schedule(pool)
    asked(of, Job("times", what(1), run=1), on=0)
    with pytest.raises(SweepError, match="no worker is left of the kind that times were taken on"):
        run(of)


@pytest.mark.parametrize("dies", [True, False])
def test_a_plan_that_stays_ends_with_its_worker(schedule, dies):
    """Whether that dies on it or before it."""

    def answer(worker, job):
        return Finished(worker, error="boom", died=True) if job == quality(9) or dies else measured(job)

    pool = Flying(answer=answer, descriptions=[description(**CUDA)] * 2)
    of = schedule(pool)
    other = [] if dies else asked(of, quality(9), died=lambda: 2, on=1)
    of.assign()
    found = asked(of, Job("times", what(1), run=-1), on=1, stays=True, beside=True)
    assert of.is_working == (not dies), "nobody waits for it but to try the worker"
    while not found or (not dies and not other):
        of.step()
    assert isinstance(found[0], JobError) and len(pool.submitted) == 1
    gone = asked(of, Job("times", what(1), run=-2), on=7, stays=True)
    assert str(gone[0]) == "its worker has ended"


def test_a_node_with_other_code_is_refused(schedule):
    with pytest.raises(UsageError, match="there has other code of streamllm-sweep than this machine"):
        schedule(Flying(descriptions=[description(), description("there", code="0")]))


def test_the_next_timing_is_one_that_might_run_beside_others(schedule):
    of = schedule(Flying(descriptions=[description(**CUDA)] * 2))
    asked(of, speed(1, run=1))
    assert of.next_timing() is None
    asked(of, speed(2))
    assert of.next_timing().job == speed(2)
    assert of.accelerators() == {"here": (kind_of(KIND), [1, 0])}


def test_a_worker_that_may_not_take_part_is_given_nothing(schedule, tmp_path):
    pool = Flying(2)
    of = Scheduler(pool, MeasurementStore(tmp_path / "store"), VARIANT, check=lambda worker, _: worker == 1)
    of.share(TEXT)
    found = [asked(of, quality(sinks)) for sinks in range(4)]
    run(of)
    assert all(map(len, found)) and {worker for worker, _ in pool.asked} == {1}
