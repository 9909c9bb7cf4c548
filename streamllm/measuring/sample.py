"""The sample of re-computation's losses: which tokens of a text, in which order, and how many.

A token costs the baseline a whole window. So its quality is known at some tokens only, and better the longer one waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np

from .quality import QualityComparison

BATCH = 8
"""Tokens by which a sample grows."""
LEAST_TOKENS, MOST_TOKENS = 64, 1024
"""Limits of a sample whose size nobody has chosen."""
PRECISION_PERCENT = 0.5
"""Half the interval of re-computation's perplexity against the reference's at which it is known well enough."""


def sample_batches(n_tokens: int, window: int) -> Iterator[np.ndarray]:
    """The order in which re-computation by windows of that length is evaluated on a text: batches of ascending indices
    into its losses, every index once. A batch has one from each of `BATCH` equal parts of the text, at random.

    A text that one window holds is one batch: one forward pass has all of it."""
    places = np.arange(n_tokens - 1)
    if len(places) <= window:
        yield places
        return
    random = np.random.default_rng(0)  # the same for all studies, who share them
    parts = [random.permutation(part) for part in np.array_split(places, BATCH)]
    for number in range(len(parts[0])):
        yield np.array([part[number] for part in parts if number < len(part)])


def sample_positions(n_tokens: int, window: int, least: int) -> np.ndarray:
    """Ascending: the first batches that are `least` tokens together."""
    batches = islice(sample_batches(n_tokens, window), -(-least // BATCH))
    return np.sort(np.concatenate(list(batches)))


class SampleSize(Protocol):
    """How many tokens are enough. `table`: the sample's losses so far (n, 2: position, nats)."""

    def reached(self, table: np.ndarray) -> bool: ...

    def expected(self, table: np.ndarray) -> int:
        """How many tokens it will be in the end, as far as can be told."""
        ...


@dataclass(frozen=True, slots=True)
class FixedSize:
    """So many tokens, or all there are."""

    tokens: int = LEAST_TOKENS

    def reached(self, table: np.ndarray) -> bool:
        return len(table) >= self.tokens

    def expected(self, table: np.ndarray) -> int:
        return self.tokens


class AsItIs:
    """Enough as soon as there is any."""

    def reached(self, table: np.ndarray) -> bool:
        return True

    def expected(self, table: np.ndarray) -> int:
        return len(table)


@dataclass(frozen=True, slots=True)
class AutoSize:
    """Until perplexity is known to `PRECISION_PERCENT`, or for so many seconds: `LEAST_TOKENS` to `MOST_TOKENS`."""

    reference: np.ndarray
    """(n, 2): the losses of strict StreamingLLM at every token."""
    seconds: float
    _started: float = field(default_factory=time.monotonic)

    def reached(self, table: np.ndarray) -> bool:
        if len(table) < LEAST_TOKENS:
            return False
        elapsed = time.monotonic() - self._started
        return len(table) >= MOST_TOKENS or elapsed > self.seconds or is_precise(self.reference, table)

    def expected(self, table: np.ndarray) -> int:
        share = (time.monotonic() - self._started) / self.seconds
        return min(max(LEAST_TOKENS, round(len(table) / share) if 0 < share < 1 else 0), MOST_TOKENS)


def is_precise(reference: np.ndarray, table: np.ndarray) -> bool:
    known = QualityComparison(reference, table).increase(reference)
    return known.high - known.low <= 2 * PRECISION_PERCENT
