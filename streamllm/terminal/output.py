"""Shared by the commands: output files, warnings, a result's values."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from ..results.schema import AnyRow


def make_room(*files: Path | None) -> None:
    """Creates the folders that output files are to lie in. Raises UsageError."""
    for file in files:
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"output {str(file)!r}: its folder cannot be made ({error.strerror})") from error


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
