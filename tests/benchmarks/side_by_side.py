"""Trials per hour against the number of accelerators, timed one at a time on a node or side by side.

`python -m tests.benchmarks.side_by_side [--json FILE]`: the real driver, scheduler and calibration over pretended
workers, whose measurements take simulated time. How much a timing is disturbed by those beside it is a parameter: it
says whether `--timing auto` tells the one from the other, and what that costs.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from orchestrator import scheduler as scheduler_module
from orchestrator import timing as timing_module
from orchestrator.driver import Driver
from orchestrator.scheduler import Scheduler
from orchestrator.search.study import Study
from orchestrator.timing import Calibration, Timing
from orchestrator.workers.kinds import Kinds
from orchestrator.workers.messages import Assignment, Variant
from orchestrator.workers.pool import Finished
from search_spaces import load_space
from streamllm.measuring.store import Arrays, Measurement, MeasurementStore
from streamllm.measuring.text import TokenStream
from streamllm.results.schema import Row
from streamllm.results.study_folder import StudyFolder

from ..pretended import CONDITIONS, TEXT, VARIANT, description, measured

CAP = 32
SPACE = f"""
cap: {CAP}
parameters:
  method: [ours, mit, ring]
  n_sink: {list(range(16))}
  compress_every: {[2**n for n in range(8)]}
  cache_slack: {list(range(8))}
  max_drop: {list(range(8))}
"""
QUALITY_SEC, TIMING_SEC, LOADING_SEC = 4.0, 10.0, 60.0
"""Medians; one at a time, eight workers then give 1.4 times the trials of one."""
PER_NODE = 8
COUNTS = (1, 2, 4, 8, 16, 32, 64)
_LEAST_TRIALS = 480
"""Of few workers too, whose rate is otherwise that of a few long measurements."""
DISTURBED = 0.05
"""Share by which a timing is longer beside all others of its node, where they disturb one another."""
_PAIRS, _OF_PAIRS, _OF_TIMINGS = 12, 0.01, 0.003
"""Pairs of a timing; standard deviations of their log ratios, and of those of whole timings."""


@dataclass
class _Node:
    """Timings that run there, and how many that has been in all: the integral over time, in seconds."""

    timing: int = 0
    area: float = 0.0
    since: float = 0.0

    def change(self, now: float, by: int) -> float:
        """Returns the area until now."""
        self.area += self.timing * (now - self.since)
        self.timing += by
        self.since = now
        return self.area


class SimulatedPool:
    """Workers on nodes, whose loading and measuring takes simulated time."""

    def __init__(self, hosts: Sequence[str], disturbed: float = 0.0, seed: int = 0) -> None:
        """hosts: by worker. disturbed: share by which a timing is longer beside all others of its node."""
        self.clock = 0.0
        self.most: Counter[str] = Counter()
        """Timings at most that a node had at once."""
        self._hosts = hosts
        self._disturbed = disturbed
        self._random = np.random.default_rng(seed)
        self._order = itertools.count()
        self._nodes = {host: _Node() for host in hosts}
        self._began: dict[int, tuple[float, float]] = {}
        """Of a worker that times: when, and its node's area then."""
        self._events: list[tuple[float, int, int, Assignment | Variant | None]] = []
        for worker in range(len(hosts)):
            self._later(LOADING_SEC * self._random.lognormal(0, 0.1), worker, None)

    def share(self, text: TokenStream) -> None:
        pass

    def lend(self, names: Sequence[str], arrays: Callable[[str], Arrays]) -> None:
        pass

    def submit(self, worker: int, assignment: Assignment) -> None:
        seconds = TIMING_SEC if assignment.job.is_timed else QUALITY_SEC
        if assignment.job.is_timed:
            host = self._hosts[worker]
            self._began[worker] = self.clock, self._nodes[host].change(self.clock, 1)
            self.most[host] = max(self.most[host], self._nodes[host].timing)
        self._later(seconds * self._random.lognormal(0, 0.2), worker, assignment)

    def ask_conditions(self, worker: int, variant: Variant) -> None:
        self._later(LOADING_SEC, worker, variant)

    def wait(self, timeout: float) -> Iterator[Finished]:
        if not self._events or self._events[0][0] > self.clock + timeout:
            self.clock += timeout
            return
        self.clock, _, worker, what = heapq.heappop(self._events)
        if what is None:
            kind = {"device": "simulated", "threads": None}
            yield Finished(worker, description=description(self._hosts[worker], kind, "simulated"))
        elif isinstance(what, Variant):
            yield Finished(worker, conditions=CONDITIONS)
        else:
            yield Finished(worker, measurement=self._measured(worker, what))

    def _later(self, seconds: float, worker: int, what: Assignment | Variant | None) -> None:
        heapq.heappush(self._events, (self.clock + seconds, next(self._order), worker, what))

    def _measured(self, worker: int, assignment: Assignment) -> Measurement:
        if not assignment.job.is_timed:
            return measured(assignment.job, TEXT, quality_sec=QUALITY_SEC)
        found = measured(assignment.job, TEXT, speed_sec=TIMING_SEC)
        started, area = self._began.pop(worker)
        seconds = self.clock - started
        beside = (self._nodes[self._hosts[worker]].change(self.clock, -1) - area) / seconds - 1
        others = max(self._hosts.count(self._hosts[worker]) - 1, 1)
        ratio = found.record["time_ratio"] * (1 + self._disturbed * beside / others)
        pairs = ratio * np.exp(self._random.normal(0, _OF_TIMINGS) + self._random.normal(0, _OF_PAIRS, _PAIRS))
        more = {"ratios": pairs.tolist()} if assignment.job.kind == "times" else {}
        return Measurement(found.record | {"time_ratio": float(np.median(pairs))} | more)


class _Times:
    """When trials were finished, by the simulated clock."""

    def __init__(self, pool: SimulatedPool) -> None:
        self._pool = pool
        self.times: list[float] = []

    def trial_finished(self, row: Row) -> None:
        if isinstance(row.trial, int):
            self.times.append(self._pool.clock)

    @property
    def per_hour(self) -> float:
        """Over the middle half of the trials."""
        low, high = len(self.times) // 4, 3 * len(self.times) // 4
        return 3600 * (high - low) / (self.times[high] - self.times[low])


@contextmanager
def simulated_time(pool: SimulatedPool) -> Iterator[None]:
    class Clock:
        def monotonic(self) -> float:
            return pool.clock

    with patch.object(scheduler_module, "time", Clock()), patch.object(timing_module, "time", Clock()):
        yield


def nodes_of(workers: int) -> list[str]:
    return [f"node {worker // PER_NODE}" for worker in range(workers)]


def run(folder: Path, workers: int, trials: int, timing: str, disturbed: float, seed: int = 0) -> dict[str, Any]:
    """A search of so many trials."""
    (folder / "space.yaml").write_text(SPACE)
    study = Study("s", folder / "journal.log", load_space(str(folder / "space.yaml")), CAP, seed, "random")
    pool, notes = SimulatedPool(nodes_of(workers), disturbed, seed), list[str]()
    times = _Times(pool)
    turns = Timing(timing, StudyFolder(folder), lambda line: notes.append(f"{line} (after {pool.clock:.0f} s)"))
    kinds = Kinds([], notes.append)
    store = MeasurementStore(folder / "store")
    scheduler = Scheduler(pool, store, VARIANT, notes.append, (), kinds.check, turns)
    started = time.perf_counter()
    with simulated_time(pool):
        Driver(study, scheduler, TEXT, VARIANT, trials, [times], notes.append, baseline_tokens=8).run()
    modes = Counter(str(row.timing) for row in study.rows)
    return {
        "workers": workers,
        "timing": timing,
        "disturbed": disturbed,
        "trials": len(study.rows),
        "per_hour": times.per_hour,
        "hours": times.times[-1] / 3600,
        "timings_at_once": max(pool.most.values()),
        "trials_by_timing": dict(modes),
        "notes": notes,
        "driver_sec": time.perf_counter() - started,
    }


def chances(disturbed: float, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How often a calibration of workers that disturb one another so much says `concurrent`, and how long it takes."""
    random, found = np.random.default_rng(seed), []
    while len(found) < draws:
        alone: list[float] = []
        beside: list[float] = []
        result = None
        while result is None:
            for among, ratio in ((alone, 1.0), (beside, 1 + disturbed)):
                pairs = random.normal(0, _OF_TIMINGS) + random.normal(0, _OF_PAIRS, _PAIRS)
                among.append(ratio * float(np.median(np.exp(pairs))))
            result = Calibration.of((), PER_NODE, alone, beside)
        found.append(result)
    return {
        "disturbed": disturbed,
        "concurrent": sum(one.mode == "concurrent" for one in found) / draws,
        "repetitions": sum(one.repetitions for one in found) / draws,
    }


def main() -> None:
    from .reporting import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40, metavar="N", help="per worker (40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    ways = [("exclusive", 0.0), ("concurrent", 0.0), ("auto", 0.0), ("auto", DISTURBED)]
    found = []
    print(f"trials per hour; a quality takes {QUALITY_SEC:g} s, a timing {TIMING_SEC:g} s, nodes of {PER_NODE}")
    print("| workers | one at a time | side by side | auto | auto, where others add 5% |\n|---|---|---|---|---|")
    for workers in COUNTS:
        trials = max(arguments.trials * workers, _LEAST_TRIALS)
        for timing, disturbed in ways:
            with tempfile.TemporaryDirectory() as folder:
                found.append(run(Path(folder), workers, trials, timing, disturbed))
        one = [result["per_hour"] for result in found[: len(ways)]]
        now = [result["per_hour"] for result in found[-len(ways) :]]
        cells = [f"{rate:.0f} ({rate / of_one:.1f}x)" for rate, of_one in zip(now, one, strict=True)]
        print(f"| {workers} | " + " | ".join(cells) + " |", flush=True)
    for result in found:
        if result["timing"] == "auto":
            print(
                f"{result['workers']} workers, {100 * result['disturbed']:g}% disturbed: {'; '.join(result['notes'])}"
            )
    decided = [chances(disturbed) for disturbed in (0.0, 0.01, 0.015, 0.02, 0.025, 0.03, DISTURBED)]
    print("\n| others add | said to be side by side | repetitions |\n|---|---|---|")
    for one in decided:
        print(f"| {100 * one['disturbed']:g}% | {100 * one['concurrent']:.1f}% | {one['repetitions']:.1f} |")
    if arguments.json is not None:
        whole = {"benchmark": "side_by_side"} | machine() | {"results": found, "decisions": decided}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
