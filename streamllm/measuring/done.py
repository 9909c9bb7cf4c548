"""What came of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .keys import Keys
    from .store import Measurement


@dataclass(frozen=True, slots=True)
class Done:
    """A job's result."""

    measurement: Measurement
    keys: Keys
    """Of the conditions that it was measured under."""
    entry: str
    """Its name in the store."""
    is_fresh: bool
    """False where the store had it."""
    seconds: float = 0.0
    """That somebody measured it just now."""
    worker: int | None = None
