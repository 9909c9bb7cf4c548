"""The folder in which Ray keeps the sockets of what it starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from streamllm.errors import UsageError, shown
from streamllm.terminal.output import obstacle

_LONGEST = 103 if sys.platform == "darwin" else 107
"""Bytes of a socket's path, by the operating system."""


def check_temporary_folder(address: str | None) -> None:
    """Raises UsageError for a folder of temporary files that Ray could not use, where it is to be started here."""
    if (address or os.environ.get("RAY_ADDRESS") or "local") != "local":
        return
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if name is None:
        return
    folder = os.environ[name]
    reason = obstacle(Path(folder))
    if reason is None and (size := len(os.fsencode(_longest_socket(folder)))) > _LONGEST:
        most = len(os.fsencode(folder)) + _LONGEST - size
        reason = f"too long a path for Ray's sockets: {len(os.fsencode(folder))} bytes, at most {most}"
    if reason is not None:
        raise UsageError(f"{name} {shown(folder, 200)}: {reason}; set RAY_TMPDIR=/tmp, or to another short path")


def _longest_socket(folder: str) -> str:
    return f"{folder}/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
