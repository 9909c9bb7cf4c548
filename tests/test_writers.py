"""Several runs are written at a time, each trial's in its order."""

import threading
import time

import pytest

from orchestrator.tracking.writers import Pace, pace_for, written


def test_where_several_may_write():
    assert pace_for("https://there/mlflow") == Pace(4)
    of_a_database = pace_for("postgresql+psycopg2://me:secret@there/mlflow")
    assert of_a_database.most == 4 and of_a_database.in_processes
    assert {pace_for(uri) for uri in ("sqlite:////mlflow.db", "file:///mlruns", "databricks://x")} == {Pace(1)}


@pytest.mark.parametrize("writers", [1, 3])
def test_items_that_are_alike_are_written_in_their_order_and_none_before_its_turn(writers):
    under_way, most, done, taken = set(), [], [], []
    lock = threading.Lock()

    def items():
        for number in range(30):
            taken.append(number)
            assert len(taken) - len(done) <= writers + 1, "taken before there was somebody to write it"
            yield number

    def write(number):
        with lock:
            assert number % 5 not in under_way
            under_way.add(number % 5)
            most.append(len(under_way))
        time.sleep(0.002 * (number % 3))
        with lock:
            under_way.remove(number % 5)
            done.append(number)

    said = list(written(items(), write, lambda number: number % 5, Pace(writers)))
    assert sorted(said) == list(range(30)) and max(most) == writers
    assert all([n for n in done if n % 5 == kind] == list(range(kind, 30, 5)) for kind in range(5))


def test_a_failure_is_raised_when_what_had_begun_is_finished():
    begun, finished = [], []

    def write(number):
        begun.append(number)
        time.sleep(0.05 * number)
        if number == 1:
            raise OSError("away")
        finished.append(number)

    with pytest.raises(OSError, match="away"):
        list(written(range(9), write, lambda number: number, Pace(4)))
    assert sorted(begun) == sorted([1, *finished]) and len(begun) < 9


def test_one_more_writes_only_where_many_wait():
    under_way, most = set(), []

    def write(number):
        under_way.add(number)
        most.append((number, len(under_way)))
        time.sleep(0.002)
        under_way.remove(number)

    assert len(list(written(range(40), write, lambda number: number, Pace(3, worth=10)))) == 40
    assert max(at_once for number, at_once in most if number < 9) == 1 and max(most, key=lambda one: one[1])[1] == 3
