"""Leases between processes of one node: plain file locks, which the kernel takes back from whoever dies. They lie in
the folder for temporary files, or in `$STREAMLLM_LEASES`: containers that share a node want one of all."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from streamllm.errors import UsageError
from streamllm.results.damaged import keep_aside
from streamllm.results.study_folder import StudyFolder

if TYPE_CHECKING:
    from streamllm.measuring.bench import Leases

_PATIENCE = 15.0
"""Seconds a claim waits for strangers: the workers of a killed sweep live on for 3 to 7."""


@contextmanager
def timing_lease() -> Iterator[None]:
    """One timing at a time per node: workers that time at once would time one another."""
    with _timing_lock(fcntl.LOCK_EX):
        yield


@contextmanager
def shared_timing_lease() -> Iterator[None]:
    """For a timing that others of its kind do not disturb: any number of these at a time, but none beside a timing that
    is to be alone."""
    with _timing_lock(fcntl.LOCK_SH):
        yield


@contextmanager
def computing_lease() -> Iterator[None]:
    """Any number of computations at a time, but none beside a timing that is to be alone: on a CPU they share caches,
    memory and clock."""
    with _timing_lock(fcntl.LOCK_SH):
        yield


def leases_on(device: str, side_by_side: bool = False) -> Leases:
    """The leases that a process of this node holds while it measures on that type of device: accelerators compute
    beside a timing of another one. side_by_side: whether they are timed beside one another too; cores never are."""
    from streamllm.measuring.bench import Leases

    if device == "cpu":
        return Leases(timing_lease, computing_lease)
    return Leases(shared_timing_lease if side_by_side else timing_lease)


@contextmanager
def _timing_lock(operation: int) -> Iterator[None]:
    """Whoever waits for it holds up those who come later: many that share it would never let in one that does not."""
    with _open("timing") as file:
        with _node_lock("timing-next", fcntl.LOCK_EX):
            fcntl.flock(file, operation)
        yield


@contextmanager
def _node_lock(name: str, operation: int) -> Iterator[None]:
    with _open(name) as file:
        fcntl.flock(file, operation)
        yield


def _open(name: str) -> IO[str]:
    name = name.replace("/", "_")
    folder = os.environ.get("STREAMLLM_LEASES") or tempfile.gettempdir()
    return (Path(folder) / f"streamllm-{name}-{os.getuid()}.lock").open("a+", errors="replace")


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@dataclass(frozen=True)
class Claim:
    """Cores or accelerators of this node that are this process's own until it ends, or `release`."""

    names: list[str]
    shared_with: str | None
    """The stranger who has them too and did not go away."""
    _locks: ExitStack

    def release(self) -> None:
        self._locks.close()


def claim(names: Sequence[str], count: int, owner: str, patience: float = _PATIENCE) -> Claim:
    """Claims `count` of `names`: free ones, each claimed by one process only.

    Where too few are free: strangers are waited for, `patience` seconds; things are shared at once with processes of
    the same `owner`, who know what they do, and evenly.
    """
    count = min(count, len(names))
    stranger, deadline = None, time.monotonic() + patience
    layer = 0
    while True:
        with _node_lock("claims", fcntl.LOCK_EX):
            taken, holders, locks = _take(names, count, layer, owner)
        if len(taken) == count:
            return Claim(taken, stranger, locks)
        locks.close()
        strangers = holders - {owner}
        if strangers and time.monotonic() < deadline:
            time.sleep(0.2)
        else:
            stranger = next(iter(strangers), stranger)
            layer += 1


def _take(names: Sequence[str], count: int, layer: int, owner: str) -> tuple[list[str], set[str], ExitStack]:
    """The names that could be locked, the holders of those that could not, and the locks. A layer is one more process
    for everything."""
    taken: list[str] = []
    holders = set()
    locks = ExitStack()
    for name in names:
        if len(taken) == count:
            break
        file = _open(f"{name}.{layer}")
        try:
            _lock_as(file, owner)
        except BlockingIOError:
            holders.add(_holder(file))
            file.close()
        else:
            locks.enter_context(file)
            taken.append(name)
    return taken, holders, locks


@contextmanager
def study_lease(folder: StudyFolder, patience: float = 0.0) -> Iterator[None]:
    """One driver at a time per study. Raises UsageError that names the one already there, after so many seconds."""
    deadline = time.monotonic() + patience
    with _opened_lock(folder.lock) as file:
        while True:
            try:
                _lock_as(file, this_process())
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UsageError(
                        f"study {folder.path.name!r} is being run by {_holder(file)}; wait for it, stop it, or give "
                        "another --study"
                    ) from None
            time.sleep(0.2)
        yield


def _opened_lock(path: Path) -> IO[str]:
    """Raises UsageError."""
    if path.is_dir() or (path.is_symlink() and not path.exists()):  # which nobody can have locked
        keep_aside(path, [f"{path}: no file"], "one is made")
    try:
        return path.open("a+", errors="replace")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be opened ({error.strerror}), so nobody knows whether another process runs this study; "
            "make it writable, or remove it"
        ) from None


def _lock_as(file: IO[str], owner: str) -> None:
    """Locks the file and writes who did. Raises BlockingIOError if somebody else has."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.truncate(0)
    file.write(owner)
    file.flush()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    who = "".join(filter(str.isprintable, file.read(200))).strip()
    return who or "another process"
