"""Several runs are written at a time where the store takes that: most of what MLflow does for one is waiting for the
database, or for a server that waits for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from streamllm.results.mlflow_address import is_server

_SEVERAL = 4
"""As many as `mlflow server` has processes, and as a database's default pool of 5 connections lets MLflow's nested
transactions have without opening one anew each time, if it is told to keep twice as many."""
CONNECTIONS = 2 * _SEVERAL
"""Of a writer: MLflow opens a transaction within another."""

Item = TypeVar("Item")


def writers_for(uri: str) -> int:
    """How many may write to the store at once. SQLite has one writer; so do the folders of old versions, and what
    Databricks lets one do in a second is little."""
    scheme = uri.partition(":")[0].partition("+")[0]
    return _SEVERAL if is_server(uri) or scheme in ("postgresql", "mysql", "mssql") else 1


def written(
    items: Iterable[Item], write: Callable[[Item], None], alike: Callable[[Item], object], writers: int
) -> Iterator[Item]:
    """Each item once it is written, in the order in which that happens. Of items that are `alike` one is written after
    the other, in their order. Items are taken only as there is somebody to write them.

    Raises what `write` raises, when all that had begun is finished."""
    if writers == 1:
        for item in items:
            write(item)
            yield item
        return
    under_way: dict[Future[None], Item] = {}

    def some() -> list[Item]:
        finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
        found = [(future, under_way.pop(future)) for future in finished]
        for future, _ in found:
            future.result()
        return [item for _, item in found]

    with ThreadPoolExecutor(writers, "mlflow") as pool:
        for item in items:
            while len(under_way) == writers or alike(item) in map(alike, under_way.values()):
                yield from some()
            under_way[pool.submit(write, item)] = item
        while under_way:
            yield from some()
