"""What a sweep does where its study's folder takes nothing more: it says so in a line, and ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from streamllm.files import explained

from .workers.messages import SweepError


class UnwritableError(SweepError):
    """The study's folder takes nothing more."""


@contextmanager
def writing(what: str = "the study") -> Iterator[None]:
    """Raises UnwritableError for any OSError herein."""
    try:
        yield
    except OSError as error:
        raise UnwritableError(
            f"{what} cannot be written: {explained(error)}, then give the same command again; what is finished is kept"
        ) from error
