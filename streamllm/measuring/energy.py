"""Joules per token, by the device's counter over long segments, in turn with the reference's.

A counter moves in steps (of 100 ms on an H100), and a segment of a few tokens would fall between two of them. So it is
read every few milliseconds while a segment is decoded, and what counts is its power from one of its steps to a later
one: a segment lasts at least `LEAST_SEC` and `LEAST_STEPS` of them. Power times seconds per token is joules per token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from ..configuration import Configuration
from ..engine.device import synchronize
from ..engine.energy import EnergyCounter
from ..engine.model import LoadedModel
from ..errors import UnavailableError
from .pairing import FEWEST_PAIRS, in_turn
from .quality import Estimate, median_interval
from .timing import Reference, TimedDecoder, no_garbage_collection, start_decoder

LEAST_SEC = 1.0
LEAST_STEPS = 10
LONGEST_SEC = 20.0
"""For which a counter is waited for that moves too seldom."""
READ_SEC = 0.005
"""Between readings, or a token where that takes longer: by so much a step may be seen too late."""


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules per token of a configuration and of the reference beside it, segment by segment."""

    joules: list[float]
    reference_joules: list[float]
    segment_sec: float
    """The shortest segment."""
    covers: str
    """What the counter counts."""
    seconds: float
    """Time to measure all this."""

    @property
    def ratio(self) -> Estimate:
        return median_interval(np.array(self.joules) / np.array(self.reference_joules))

    def summary(self) -> dict[str, float | str]:
        return {
            **self.ratio.flat("energy_ratio"),
            **median_interval(np.array(self.joules)).flat("measured_joules_per_token"),
            "reference_joules_per_token": float(np.median(self.reference_joules)),
            "energy_segment_sec": self.segment_sec,
            "energy_of": self.covers,
            "speed_sec": self.seconds,
        }


@torch.inference_mode()
def measure_energy(
    loaded: LoadedModel, what: Configuration, tokens: np.ndarray, reference: Reference, counter: EnergyCounter
) -> Energy:
    """Of the steady state of a full cache, as times are. Raises UnavailableError for a counter that hardly moves."""
    begun = time.perf_counter()
    with what.kernel.active():
        run, *_ = start_decoder(loaded, what, tokens)
    lengths: list[float] = []

    def segment(of: TimedDecoder) -> float:
        with of.backend.active():
            joules, seconds = segment_joules(of, counter)
        lengths.append(seconds)
        return joules

    with no_garbage_collection():
        turns = in_turn((lambda: segment(run), lambda: segment(reference.decoder)))
        own, theirs = zip(*(next(turns) for _ in range(FEWEST_PAIRS)), strict=True)
    return Energy(list(own), list(theirs), min(lengths), counter.covers, time.perf_counter() - begun)


def segment_joules(run: TimedDecoder, counter: EnergyCounter) -> tuple[float, float]:
    """Joules per token of a segment of whole prune cycles, and the seconds that it lasted. Raises UnavailableError."""
    steps: list[tuple[float, float]] = []
    synchronize(run.device)
    tokens, read_at, start = 0, 0.0, time.perf_counter()
    while True:
        run.step()
        tokens += 1
        now = time.perf_counter()
        if now - read_at >= READ_SEC:
            read_at, joules = now, counter.joules()
            if not steps or joules != steps[-1][1]:
                steps.append((now, joules))
        if tokens % run.period == 0 and now - start >= LEAST_SEC:
            if len(steps) > LEAST_STEPS:  # the first is when it was first read, and no step
                break
            if now - start > LONGEST_SEC:
                raise UnavailableError(
                    f"energy: the counter moved {max(len(steps) - 1, 0)} times in {now - start:.0f} s: it takes "
                    f"{LEAST_STEPS} to tell power from it; take energy out of what is asked for"
                )
    synchronize(run.device)
    seconds = time.perf_counter() - start
    (begun, before), (ended, after) = steps[1], steps[-1]
    return (after - before) / (ended - begun) * seconds / tokens, seconds
