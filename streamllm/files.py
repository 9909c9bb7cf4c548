"""Files: what JSON holds, and writing so that readers see the old file or the new one, never a part, a crash of the
machine included."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

Scalar: TypeAlias = str | int | float | bool | None
Json: TypeAlias = "dict[str, Json] | list[Json] | Scalar"
"""What `json.loads` returns."""


_JUST_CREATED_SEC = 1.0


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
            fcntl.flock(file, fcntl.LOCK_EX)  # as long as it is being written: see `remove_torn`
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove_torn(folder: Path) -> None:
    """Removes what writers that were killed have left under it; what is being written stays."""
    for path in folder.glob("**/.*.new"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > _JUST_CREATED_SEC:  # it is locked a moment later
                path.unlink()


def explained(error: OSError) -> str:
    """Why a file cannot be written or read, and what to do about it."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{reason}: make room for it"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ESTALE):
        return f"{reason}: its folder has been moved or removed; put it back"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}: make it writable, or give another --output"
    return reason
