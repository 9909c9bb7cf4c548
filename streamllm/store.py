"""The measurement store: every finished measurement, under a name that says everything that determined it.

It is at once the cache that stops duplicates, the baseline that is run once and reused, and what survives a killed
sweep. Entries are JSON files written atomically; a measurement's array lies beside it as .npy and is written first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Measurement:
    """A flat record, and per-token losses (n, 2: position, nats) where there are any."""

    record: dict[str, Any]
    losses: np.ndarray | None = None


class MeasurementStore:
    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: dict[str, Any]) -> Measurement | None:
        """The measurement of that key; a damaged entry is kept aside as `.damaged` and counts as missing."""
        path = self._path(key)
        try:
            entry = json.loads(path.read_text())
            losses = np.load(path.with_suffix(".npy"), allow_pickle=False) if entry["has_losses"] else None
            return Measurement(entry["record"], losses)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, EOFError):
            path.rename(path.with_suffix(".damaged"))
            return None

    def put(self, key: dict[str, Any], measurement: Measurement) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        losses = measurement.losses
        if losses is not None:
            _write_atomically(path.with_suffix(".npy"), lambda file: np.save(file, losses, allow_pickle=False))
        entry = {"key": key, "record": measurement.record, "has_losses": losses is not None}
        _write_atomically(path, lambda file: file.write(json.dumps(entry, indent=1).encode()))

    def losses_file(self, name: str) -> Path:
        """Where the per-token losses of the entry of that name lie, if it has any."""
        return self.root / name[:2] / f"{name}.npy"

    def _path(self, key: dict[str, Any]) -> Path:
        return self.losses_file(entry_name(key)).with_suffix(".json")


def entry_name(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """Names the engine's code: results of different code are different measurements."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Readers see the old file or the new one, never a part; a crash of the machine included."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
