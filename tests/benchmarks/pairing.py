"""Paired against single timing: the ratio of a configuration's time to the reference's, and how it spreads when it is
taken again, by segments in turn and by one after the other.

python -m tests.benchmarks.pairing [--shape testbed|pythia-70m] [--load 2] [--json FILE]

Single: the configuration alone, then the reference alone, each for as long as a pair timing takes in all; the quotient
of their medians. Paired: `measure_times`, as everything in the engine is timed. Every repetition has decoders of its
own, and the two kinds take turns at being first. On a quiet machine both must say the same: what a paired segment loses
to caches that the other decoder has filled, would be seen there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model
from streamllm.engine.model import LoadedModel
from streamllm.measuring.pairing import PairedTimes, load_average
from streamllm.measuring.quality import median_interval
from streamllm.measuring.timing import SEGMENT_SEC, Reference, TimedDecoder, measure_times, no_garbage_collection
from streamllm.policy import EvictionPolicy, strict_policy

from .reporting import SHAPES, asked_for, busy_processes, report, segment_of, warm

TOTAL = 256
EMBEDDED = "testbed"
TOKENS = np.arange(1000)
"""Speed does not depend on them."""


class Chosen(NamedTuple):
    method: str
    compress_every: int = 1
    execution: str = "eager"

    @property
    def name(self) -> str:
        return f"{self.method} R={self.compress_every}{'' if self.execution == 'eager' else f' {self.execution}'}"

    @property
    def configuration(self) -> Configuration:
        policy = EvictionPolicy(n_sink=4, window_size=TOTAL - 4, compress_every=self.compress_every)
        return Configuration(self.method, policy, execution=self.execution)


CONFIGURATIONS = (
    Chosen("ours"),
    Chosen("ours", 64),
    Chosen("mit"),
    Chosen("ring", execution="compile"),
)


def paired(loaded: LoadedModel, of: Chosen) -> PairedTimes:
    reference = Reference.start(loaded, TOTAL, TOKENS)
    return measure_times(loaded, of.configuration, TOKENS, reference)


def single(loaded: LoadedModel, of: Chosen, segments: int) -> tuple[float, float]:
    """Milliseconds of both, medians over so many segments of the one and as long ones of the other."""
    own = _alone(warm(loaded, of.configuration), segments)
    return own, _alone(warm(loaded, Configuration("ring", strict_policy(TOTAL))), segments)


def _alone(decoder: TimedDecoder, segments: int) -> float:
    segment = segment_of(decoder, SEGMENT_SEC)
    with no_garbage_collection():
        return float(np.median([segment() for _ in range(segments)]))


class Repetition(NamedTuple):
    """Ratios, and the milliseconds of configuration and reference that they are of."""

    paired: float
    paired_ms: tuple[float, float]
    single: float
    single_ms: tuple[float, float]
    pairs: int
    load: float
    """Before it; the busy processes are in it only after a minute."""


def repeat(loaded: LoadedModel, of: Chosen, repetitions: int) -> list[Repetition]:
    """Single times are as long as the pair timing before them; a first one, not counted, says how long that is."""
    pairs, found = len(paired(loaded, of).ms), []
    for index in range(repetitions):
        load = load_average()
        if index % 2:
            alone = single(loaded, of, 2 * pairs)
            times = paired(loaded, of)
        else:
            times = paired(loaded, of)
            alone = single(loaded, of, 2 * len(times.ms))
        pairs = len(times.ms)
        in_pairs = float(np.median(times.ms)), float(np.median(times.reference_ms))
        one = Repetition(times.ratio.value, in_pairs, alone[0] / alone[1], alone, pairs, load)
        print(f"{of.name}, {index + 1}/{repetitions}: paired {one.paired:.3f}, single {one.single:.3f}", flush=True)
        found.append(one)
    return found


def row(of: Chosen, repetitions: Sequence[Repetition]) -> dict[str, Any]:
    """Medians over repetitions, and the standard deviation of the logarithm of each."""
    both, alone = (np.array(values) for values in zip(*((one.paired, one.single) for one in repetitions), strict=True))
    quotient = median_interval(both / alone)
    return {
        "configuration": of.name,
        "paired ratio": float(np.median(both)),
        "single ratio": float(np.median(alone)),
        "paired / single": f"{quotient.value:.3f} [{quotient.low:.3f}, {quotient.high:.3f}]",
        "sd log paired": float(np.log(both).std(ddof=1)),
        "sd log single": float(np.log(alone).std(ddof=1)),
        "pairs": int(np.median([one.pairs for one in repetitions])),
    }


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=(EMBEDDED, *SHAPES), default=EMBEDDED, help=f"({EMBEDDED})")
    options.add_argument("--dtype", default="float32", help="(float32)")
    options.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    options.add_argument("--load", type=int, default=0, metavar="N", help="busy processes beside it (0)")
    options.add_argument("--repetitions", type=int, default=8, metavar="N", help="of each kind (8)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return options


@torch.inference_mode()
def main() -> None:
    options = parser()
    arguments = options.parse_args()
    if arguments.repetitions < 2:
        options.error("--repetitions: a spread needs 2 or more")
    limit_threads(arguments.threads)
    loaded = load_model(EMBEDDED, arguments.dtype) if arguments.shape == EMBEDDED else asked_for(arguments)
    before = load_average()
    with busy_processes(arguments.load):
        found = {of: repeat(loaded, of, arguments.repetitions) for of in CONFIGURATIONS}
        during = load_average()
    more = {
        "total_kv": TOTAL,
        "busy_processes": arguments.load,
        "load_before": before,
        "load_at_the_end": during,
        "repetitions": {of.name: [one._asdict() for one in repetitions] for of, repetitions in found.items()},
    }
    rows = [row(of, repetitions) for of, repetitions in found.items()]
    report(f"paired and single times, {arguments.load} busy processes", loaded, rows, arguments.json, more)


if __name__ == "__main__":
    main()
