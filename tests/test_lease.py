import multiprocessing
import os
import signal
import time

from orchestrator.lease import computing_lease, timing_lease


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
    time.sleep(4)
    assert all(waiter.is_alive() for waiter in waiters) and events.empty(), "both have to wait"
    os.kill(holder.pid, signal.SIGKILL)
    assert {events.get(timeout=60) for _ in waiters} == {"timing_lease", "computing_lease"}
    for process in (*waiters, holder):
        process.join()
