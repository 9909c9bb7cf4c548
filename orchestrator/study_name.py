"""Names of studies, which are names of folders too: those that are given, and one for whoever gave none."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from streamllm.errors import UsageError

_LONGEST = 200
"""Bytes of a name: file systems take 255, and names of files are made of it."""


def check_study_name(name: str) -> None:
    """Raises UsageError."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UsageError(
            f"study {name!r}: use letters, digits, '.', '_', '+' and '-' only, and begin with a letter, digit or '_'"
        )
    if len(name.encode()) > _LONGEST:
        raise UsageError(f"study {name[:20]!r}...: {len(name.encode())} bytes long; use at most {_LONGEST}")


def model_label(model: str) -> str:
    """The last part of a hub id or of a path, of `.` too."""
    return Path(model).name or Path(model).resolve().name or "model"


def study_name(*parts: str) -> str:
    """The name of a study nobody gave a name, of its model, text and space: always one that is allowed."""
    name = re.sub(r"[^\w.+-]+", "-", "-".join(parts)).lstrip(".+-") or "study"
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: _LONGEST - 9].decode(errors='ignore')}-{digest}"
