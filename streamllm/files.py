"""Files: what JSON holds, and writing so that readers see the old file or the new one, never a part, a crash of the
machine included."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

Scalar: TypeAlias = str | int | float | bool | None
Json: TypeAlias = "dict[str, Json] | list[Json] | Scalar"
"""What `json.loads` returns."""


def is_file(path: Path) -> bool:
    """As the path's own, which raises for a name that is too long or has a NUL, and in a folder that is closed to us:
    no file, here."""
    with suppress(OSError, ValueError):
        return path.is_file()
    return False


def is_folder(path: Path) -> bool:
    """As `is_file`."""
    with suppress(OSError, ValueError):
        return path.is_dir()
    return False


def write_atomically(path: Path, content: str | bytes) -> None:
    """Raises OSError, leaving nothing of it behind."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
