"""Shared by the commands: output files, warnings, a result's values."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError, shown
from ..results.schema import AnyRow

_LONGEST = 255
"""Bytes of a name that file systems take."""


def obstacle(folder: Path) -> str | None:
    """Why files cannot be written into the folder, which need not be there yet; None if nothing is seen to prevent it.
    Makes nothing."""
    if too_long := next((part for part in folder.parts if len(os.fsencode(part)) > _LONGEST), None):
        return f"{shown(too_long)} is longer than the {_LONGEST} bytes of a name"
    there = folder
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            return "not a folder" if there == folder else f"{str(there)!r} is no folder"
    except OSError as error:
        return error.strerror
    if os.access(there, os.W_OK | os.X_OK):
        return None
    return "not to be written to" if there == folder else f"{str(there)!r} is not to be written to"


def check_folder(what: str, folder: Path) -> None:
    """Raises UsageError if files cannot be written into the folder."""
    if (reason := obstacle(folder)) is not None:
        raise UsageError(f"{what} {shown(str(folder))}: {reason}; give a folder that can be written to")


def make_room(*files: Path | None) -> None:
    """Creates the folders that output files are to lie in. Raises UsageError."""
    for file in files:
        if file is not None:
            reason = obstacle(file.parent)
            if reason is None:
                try:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    reason = "a folder of that name is there" if file.is_dir() else None
                except OSError as error:
                    reason = error.strerror
            if reason is not None:
                raise UsageError(
                    f"output {shown(str(file))}: it, or its folder, cannot be made ({reason}); give another"
                )


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Warnings as one line each, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


def report(result: Mapping[str, AnyRow]) -> str:
    """The objects of a result side by side, a line per value."""
    names = dict.fromkeys(name for record in reversed(list(result.values())) for name in record)
    lines = [f"{'':28}" + "".join(f"{column:24}" for column in result)] if len(result) > 1 else []
    for name in names:
        values = (record.get(name, "") for record in result.values())
        shown = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
        lines.append((f"{name:28}" + "".join(f"{value[:23]:24}" for value in shown)).rstrip())
    return "\n".join(lines)
