"""Leases between processes of one node: plain file locks, which the kernel takes back from whoever dies."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamllm.errors import UsageError


@contextmanager
def timing_lease() -> Iterator[None]:
    """One timing at a time per node: workers that time at once would time one another."""
    with _node_lock(fcntl.LOCK_EX):
        yield


@contextmanager
def computing_lease() -> Iterator[None]:
    """Any number of computations at a time, but none beside a timing: on a CPU they share caches, memory and clock."""
    with _node_lock(fcntl.LOCK_SH):
        yield


@contextmanager
def _node_lock(operation: int) -> Iterator[None]:
    with (Path(tempfile.gettempdir()) / f"streamllm-timing-{os.getuid()}.lock").open("a") as file:
        fcntl.flock(file, operation)
        yield


@contextmanager
def study_lease(folder: Path) -> Iterator[None]:
    """One driver at a time per study. Raises UsageError that names the one already there."""
    with (folder / "driver.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"study {folder.name!r} is being run by process {file.read().strip() or '?'}; "
                f"wait for it, stop it, or give another --study"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
