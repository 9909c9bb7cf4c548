"""Times taken in turn: what disturbs one of two things that alternate disturbs the other as well, and leaves their
ratio in peace.

On two shared cores at a load of 19 the time of one configuration spreads by 20% from one minute to the next, the ratio
of two that alternate by 3%. So every timing of the engine is a ratio to a reference decoder that is kept warm beside
it, and every benchmark times its variants in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .quality import Estimate, median_interval

LEAST_PAIRS, MOST_PAIRS = 12, 100
FEWEST_PAIRS = 7
"""Pairs for what takes seconds a token: as many as an interval of 95% needs."""
_PRECISE = 0.01
"""Half the interval's width, as a share of the ratio, at which there are pairs enough."""
ENOUGH_SEC = 3.0
"""On a noisy machine a decoder's median differs by 4.0 to 4.5% from one that was begun anew, after six seconds by 3.6%:
twice as many rounds tell as much, and a timing of a search, which is one among many, costs half."""
_TOO_LONG_SEC = 15.0
LONGEST_REFERENCE_SEC = 1.0
"""The most seconds that a segment of the reference lasts, however long the other one was."""


@dataclass(frozen=True, slots=True)
class PairedTimes:
    """Milliseconds per token of a configuration and of the reference beside it, segment by segment."""

    ms: Sequence[float]
    reference_ms: Sequence[float]
    timed_at: float
    """Seconds since 1970, at the start."""
    load: float
    """Processes that ran or waited for a core, on average over the minute before (`os.getloadavg`)."""
    reference_execution: str = "eager"

    @property
    def ratios(self) -> np.ndarray:
        """(pairs): time of the configuration over time of the reference."""
        return np.array(self.ms) / np.array(self.reference_ms)

    @property
    def ratio(self) -> Estimate:
        return median_interval(self.ratios)


def in_turn(timed: Sequence[Callable[[], float]]) -> Iterator[tuple[float, ...]]:
    """Rounds without end: what each of `timed` returned, in their order. They take turns from first to last and, in the
    next round, from last to first, so that a machine that slows down favours none."""
    places = list(range(len(timed)))
    while True:
        found = {place: timed[place]() for place in places}
        yield tuple(found[place] for place in range(len(timed)))
        places.reverse()


def take_pairs(
    segment: Callable[[], float], reference: Callable[[], float], reference_execution: str = "eager"
) -> PairedTimes:
    """Times both in turn until the ratio's interval is narrow, or time is up. Each returns milliseconds per token."""
    at, load = time.time(), load_average()
    started = time.perf_counter()
    pairs: list[tuple[float, ...]] = []
    for pair in in_turn((segment, reference)):
        pairs.append(pair)
        if _enough(pairs, time.perf_counter() - started):
            break
    own, theirs = zip(*pairs, strict=True)
    return PairedTimes(own, theirs, at, load, reference_execution)


def seconds_of_pairs(segment_sec: float) -> float:
    """The time `take_pairs` takes for segments of this length, if their ratio is not known well any sooner."""
    pair = segment_sec + min(segment_sec, LONGEST_REFERENCE_SEC)
    if LEAST_PAIRS * pair <= ENOUGH_SEC:
        return min(ENOUGH_SEC, MOST_PAIRS * pair)
    return min(LEAST_PAIRS * pair, max(FEWEST_PAIRS * pair, _TOO_LONG_SEC))


def between_references(
    ms: Sequence[float], reference_ms: Sequence[float], at: float, load: float, reference_execution: str = "eager"
) -> PairedTimes:
    """Pairs of n segments with the mean of the n + 1 reference segments before and after each."""
    around = [(before + after) / 2 for before, after in pairwise(reference_ms)]
    return PairedTimes(ms, around, at, load, reference_execution)


def load_average() -> float:
    """The load average over the last minute; NaN where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def _enough(pairs: Sequence[tuple[float, ...]], seconds: float) -> bool:
    if len(pairs) < LEAST_PAIRS:
        return len(pairs) >= FEWEST_PAIRS and seconds > _TOO_LONG_SEC
    if len(pairs) >= MOST_PAIRS or seconds > ENOUGH_SEC:
        return True
    ratio = median_interval(np.array([own / reference for own, reference in pairs]))
    return (ratio.high - ratio.low) / 2 < _PRECISE * ratio.value
