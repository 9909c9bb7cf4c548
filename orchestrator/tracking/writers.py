"""Several runs are written at a time where the store takes that: most of what MLflow does for one is waiting for a
server, or Python of its own, of which a process runs one line at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from streamllm.results.mlflow_address import is_server

from .child_runs import Destination, RunWriter, Writer, WriterProcess

_SEVERAL = 4
"""As many as `mlflow server` has processes."""
_WORTH_A_PROCESS = 100
"""Runs that have to wait, before another process is started for them: its start takes as long as they."""

_CONCURRENT = ("postgresql", "mysql", "mssql")

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Pace:
    """How many runs are written at a time."""

    most: int = 1
    in_processes: bool = False
    """Whether all but the first of them have a process of their own."""
    worth: int = 0
    """One more at a time only after so many in a row."""


def pace_for(uri: str) -> Pace:
    """SQLite lets one write at a time, for most of what a run takes: with two, none was logged sooner. What Databricks
    lets one do in a second is little; folders of old versions are best left alone."""
    if is_server(uri):
        return Pace(_SEVERAL)
    scheme = uri.partition(":")[0].partition("+")[0]
    return Pace(_SEVERAL, in_processes=True, worth=_WORTH_A_PROCESS) if scheme in _CONCURRENT else Pace()


class Writers:
    """Who write: one in this process, and as many others as are needed at a time."""

    def __init__(self, here: RunWriter, to: Destination, pace: Pace, lock: int) -> None:
        """lock: the file by which others know that the study's runs are being written."""
        self._here = here
        self._to = to
        self._lock = lock
        self._pace = pace
        self._free: deque[Writer] = deque([here])
        self._processes: list[WriterProcess] = []

    def all_written(
        self, items: Iterable[Item], write: Callable[[Writer, Item], None], alike: Callable[[Item], object]
    ) -> Iterator[Item]:
        """Each item once it is written, in the order in which that happens. Of items that are `alike` one is written
        after the other, in their order. Items are taken only as there is somebody to write them.

        Raises what `write` raises, when all that had begun is finished."""

        def write_by_one(item: Item) -> None:
            with self._one() as writer:
                write(writer, item)

        return written(items, write_by_one, alike, self._pace)

    @contextmanager
    def _one(self) -> Iterator[Writer]:
        if not self._pace.in_processes:
            yield self._here
            return
        try:
            writer = self._free.pop()
        except IndexError:
            writer = self._started()
        yield writer
        self._free.append(writer)  # not one that has failed: nobody writes after that before all is opened anew

    def _started(self) -> WriterProcess:
        process = WriterProcess(self._to, self._lock)
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.close()


def written(
    items: Iterable[Item], write: Callable[[Item], None], alike: Callable[[Item], object], pace: Pace
) -> Iterator[Item]:
    """As `Writers.all_written`."""
    under_way: dict[Future[None], Item] = {}

    def some() -> list[Item]:
        finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
        found = [(future, under_way.pop(future)) for future in finished]
        for future, _ in found:
            future.result()
        return [item for _, item in found]

    if pace.most == 1:
        for item in items:
            write(item)
            yield item
        return
    with ThreadPoolExecutor(pace.most, "mlflow") as pool:
        for number, item in enumerate(items):
            now = min(pace.most, 1 + number // pace.worth) if pace.worth else pace.most
            while len(under_way) >= now or alike(item) in map(alike, under_way.values()):
                yield from some()
            under_way[pool.submit(write, item)] = item
        while under_way:
            yield from some()
