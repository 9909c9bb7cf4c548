"""Waiting for what other threads and processes do, never for ever. Without torch: faulty workers import it."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 240.0, pause: float = 0.05, what: str = "it") -> T:
    """Returns what the condition does when that is true at last. Raises AssertionError when it is not in time, by
    default shortly before the test's own limit (`timeout` in pyproject.toml)."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} never came about within {seconds:g} s"
        time.sleep(pause)
    return value
