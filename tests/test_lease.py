import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.workers.lease import (
    claim,
    computing_lease,
    leases_on,
    shared_timing_lease,
    study_lease,
    timing_lease,
)
from streamllm.errors import UsageError
from streamllm.results.study_folder import StudyFolder


def hold(taken, seconds):
    with timing_lease():
        taken.set()
        time.sleep(seconds)


def take(lease, events):
    with lease():
        events.put(lease.__name__)


def test_one_timing_at_a_time_and_the_dead_hold_nothing():
    """Whole processes, as workers are; the first is killed while it holds the lease."""
    context = multiprocessing.get_context("spawn")
    taken, events = context.Event(), context.Queue()
    holder = context.Process(target=hold, args=(taken, 600))
    holder.start()
    assert taken.wait(60)
    waiters = [context.Process(target=take, args=(lease, events)) for lease in (timing_lease, computing_lease)]
    for waiter in waiters:
        waiter.start()
    time.sleep(2)
    assert all(waiter.is_alive() for waiter in waiters) and events.empty(), "both have to wait"
    os.kill(holder.pid, signal.SIGKILL)
    assert {events.get(timeout=60) for _ in waiters} == {"timing_lease", "computing_lease"}
    for process in (*waiters, holder):
        process.join(60)


THINGS = [f"thing-{n}" for n in range(4)]


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMLLM_LEASES", str(tmp_path))


def test_accelerators_timed_side_by_side_share_the_lease_and_keep_out_who_is_to_be_alone(own_folder):
    assert leases_on("cuda", side_by_side=True).timing is shared_timing_lease
    assert leases_on("cuda").timing is timing_lease
    assert leases_on("cpu", side_by_side=True).timing is timing_lease, "cores never are"
    entered = []

    def alone():
        with timing_lease():
            entered.append("alone")

    with ThreadPoolExecutor() as threads:
        with shared_timing_lease(), shared_timing_lease():
            waiter = threads.submit(alone)
            time.sleep(0.3)
            assert not waiter.done()
        waiter.result(60)
    assert entered == ["alone"]


def test_whoever_is_to_be_alone_is_not_kept_out_by_those_who_come_later(own_folder):
    """Accelerators that are timed one after the other, always two at once."""
    entered, is_over = [], threading.Event()

    def side_by_side(order):
        while not is_over.wait(0.01 * order):
            with shared_timing_lease():
                entered.append("beside")
                time.sleep(0.05)

    with ThreadPoolExecutor() as threads:
        several = [threads.submit(side_by_side, order) for order in range(1, 5)]
        try:
            time.sleep(0.2)
            before = len(entered)
            with timing_lease():
                after = len(entered)
        finally:
            is_over.set()
        for one in several:
            one.result(60)
    assert before and after - before <= 4, "but for those who had begun"


def test_claims_are_apart_and_those_of_one_owner_share_evenly(own_folder):
    claims = [claim(THINGS, 2, "me", patience=600.0) for _ in range(4)]
    assert [c.names for c in claims] == [THINGS[:2], THINGS[2:], THINGS[:2], THINGS[2:]]
    assert {c.shared_with for c in claims} == {None}
    claims[1].release()
    assert claim(THINGS, 2, "me").names == THINGS[2:]
    assert claim(THINGS, 9, "me").names == THINGS, "all there are"


def test_a_stranger_who_stays_is_named(own_folder):
    theirs = claim(THINGS, 4, "process 7 on elsewhere")
    mine = claim(THINGS, 3, "me", patience=0.0)
    assert (mine.names, mine.shared_with) == (THINGS[:3], "process 7 on elsewhere")
    theirs.release()
    again = claim(THINGS, 3, "me")
    assert (again.names, again.shared_with) == (THINGS[:3], None)


def keep(folder, taken):
    os.environ["STREAMLLM_LEASES"] = folder
    kept = claim(THINGS, 4, "killed sweep")
    taken.set()
    time.sleep(600)
    kept.release()


def test_the_workers_of_a_killed_sweep_are_waited_for(own_folder, tmp_path):
    context = multiprocessing.get_context("spawn")
    taken = context.Event()
    holder = context.Process(target=keep, args=(str(tmp_path), taken))
    holder.start()
    assert taken.wait(60)
    with ThreadPoolExecutor() as threads:
        claimed = threads.submit(claim, THINGS, 2, "me", 600.0)
        time.sleep(1)
        assert not claimed.done(), "has to wait"
        os.kill(holder.pid, signal.SIGKILL)
        mine = claimed.result(60)
        # Any two: a process that dies lets go of its locks one by one, and a look may come between.
        assert len(set(mine.names) & set(THINGS)) == 2 and mine.shared_with is None
    holder.join(60)


def test_a_study_says_who_runs_it(tmp_path):
    with (
        study_lease(StudyFolder(tmp_path)),
        pytest.raises(UsageError, match=f"process {os.getpid()} on "),
        study_lease(StudyFolder(tmp_path)),
    ):
        pass
    with study_lease(StudyFolder(tmp_path)):
        pass
