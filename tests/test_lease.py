import multiprocessing
import os
import signal
import time

from orchestrator.lease import timing_lease


def hold(taken, seconds):
    with timing_lease():
        taken.set()
        time.sleep(seconds)


def take(events):
    with timing_lease():
        events.put("taken")


def test_one_timing_at_a_time_and_the_dead_hold_nothing():
    """Whole processes, as workers are; the first is killed while it holds the lease."""
    context = multiprocessing.get_context("spawn")
    taken, events = context.Event(), context.Queue()
    holder = context.Process(target=hold, args=(taken, 600))
    holder.start()
    assert taken.wait(60)
    waiter = context.Process(target=take, args=(events,))
    waiter.start()
    waiter.join(3)
    assert waiter.is_alive() and events.empty(), "it has to wait"
    os.kill(holder.pid, signal.SIGKILL)
    assert events.get(timeout=60) == "taken"
    waiter.join()
    holder.join()
