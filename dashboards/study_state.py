"""What a study is doing: whether its sweep runs, has ended, or was interrupted."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

from streamllm.results.study_folder import StudyFolder

RUNNING, FINISHED, FAILED, INTERRUPTED, UNKNOWN = "running", "finished", "failed", "interrupted", "end unknown"
_ENDS = {"FINISHED": FINISHED, "FAILED": FAILED, "KILLED": INTERRUPTED, "": UNKNOWN}
_LOCKS = Path("/proc/locks")
_FRESH_SEC = 600.0
"""Age of the newest result, up to which a sweep of another machine is taken to run."""


def state(folder: StudyFolder) -> str:
    """One of the words above. No lock is taken to find out: the sweep that starts just then would be refused."""
    ended, _ = folder.read_outcome()
    if ended is not None:
        return _ENDS[ended]
    if _is_elsewhere(folder.lock) or not _LOCKS.is_file():
        return RUNNING if time.time() - _went_on(folder) < _FRESH_SEC else INTERRUPTED
    return RUNNING if _is_locked(folder.lock) else INTERRUPTED


def _went_on(folder: StudyFolder) -> float:
    """When it began, or had its newest result: seconds since 1970."""
    return max((file.stat().st_mtime for file in (folder.configuration, folder.trials) if file.is_file()), default=0.0)


def _is_elsewhere(lock: Path) -> bool:
    """Whether the last sweep, which has said who it is, ran on another machine: its locks are not known here."""
    said = re.fullmatch(r"process \d+ on (.+)", lock.read_text(errors="replace").strip()) if lock.is_file() else None
    return said is not None and said[1] != socket.gethostname()


def _is_locked(lock: Path) -> bool:
    """As Linux tells: a line is "1: FLOCK ADVISORY WRITE 4711 fe:00:131 0 EOF", of a lock on inode 131."""
    if not lock.is_file():
        return False
    inode = lock.stat().st_ino
    return any(line.split()[5].endswith(f":{inode}") for line in _LOCKS.read_text().splitlines() if " -> " not in line)
