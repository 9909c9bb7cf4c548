"""Locks between processes that write to MLflow. The kernel takes them back from whoever dies.

One process at a time opens a SQLite database: MLflow creates and upgrades its tables without a lock, and of two that
do so at once one dies ("duplicate column name"). One follower at a time, with the processes that write for it, writes
the runs of a study: of two, each would create the run that the other has just begun.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from streamllm.results.mlflow_address import database_path

_SILENCE_SEC = 1.0


@contextmanager
def opening(uri: str, waiting: Callable[[str], None]) -> Iterator[None]:
    """Held while the store is opened; a server has a database of its own. `waiting` is told, once, if it takes over a
    second. The lock is a file beside the database, which is where processes of other nodes look too."""
    database = database_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{database}.lock").open("a") as file:
        _acquire(file.fileno(), lambda: waiting(f"waiting for another process that opens {database}"))
        yield


def writing(lock: Path, waiting: Callable[[str], None]) -> IO[str]:
    """Locked as long as it is open in any process that has inherited it. `waiting` as above."""
    file = lock.open("a")
    _acquire(file.fileno(), lambda: waiting(f"waiting for another process that writes this study's runs ({lock})"))
    return file


def _acquire(file: int, late: Callable[[], None]) -> None:
    """Where the file system knows no locks, one does without."""
    started, told = time.monotonic(), False
    with suppress(OSError):
        while not _is_ours(file):
            if not told and time.monotonic() - started > _SILENCE_SEC:
                late()
                told = True
            time.sleep(0.05)


def _is_ours(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
