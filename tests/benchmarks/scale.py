"""What the driver itself costs per trial, with a thousand workers and ten thousand trials.

`python -m tests.benchmarks.scale`: the real driver, scheduler, study and its files on disk, store and display; only the
workers, each a node of its own, are pretended. They take as long as real ones, in simulated time, so that nothing but
the driver's own work passes; with `--pace N` in real time, at the speed at which they finish N trials a second. With
`--mlflow URI` (of a server, or sqlite:///FILE) the real tracker follows in its process; its backlog and both processes'
memory are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import driver as driver_module
from orchestrator.driver import Driver
from orchestrator.scheduler import Scheduler
from orchestrator.screen.display import Display
from orchestrator.search.study import Study
from orchestrator.tracking.follower import Tracker
from orchestrator.tracking.mlflow_runs import Projection, Report
from orchestrator.trials_file import TrialsFile
from orchestrator.workers.messages import Assignment, Variant
from orchestrator.workers.pool import Finished
from search_spaces import SearchSpace, load_space
from streamllm.measuring.quality import perplexity
from streamllm.measuring.sample import sample_batches
from streamllm.measuring.store import Arrays, Measurement, MeasurementStore
from streamllm.measuring.text import TokenStream
from streamllm.results.study import BASELINE, STRICT
from streamllm.results.study_folder import StudyFolder

from ..pretended import VARIANT, description
from .made_up import made_up_settings
from .reporting import machine

CAP = 2048
SPACE = f"""
cap: {CAP}
parameters:
  method: [ours, mit, ring]
  attn_backend: [math, flash]
  n_sink: {list(range(0, 64, 2))}
  compress_every: {[2**n for n in range(8)]}
  cache_slack: {list(range(0, 128, 8))}
  max_drop: {list(range(0, 128, 16))}
"""
QUALITY_SEC, SPEED_SEC, SPREAD = 12.0, 8.0, 0.5
"""Medians of a trial's two jobs; durations are log-normal."""
TEXT = TokenStream(np.arange(1025), "simulated", "5" * 64)
PARTS = ("ask", "tell", "row", "observers", "store", "other")
"""Of what the driver does."""


class SimulatedPool:
    """Workers whose loading and measuring takes simulated time. What they would do themselves is timed apart."""

    def __init__(self, workers: int, seed: int, pace: float | None) -> None:
        """pace: trials a second that all workers finish together; without, no time passes."""
        self.count = workers
        self.seconds = 0.0
        self.idle_seconds = 0.0
        self.clock = 0.0
        mean = (QUALITY_SEC + SPEED_SEC) * math.exp(SPREAD**2 / 2)
        self._speed = math.inf if pace is None else pace / (workers / mean)
        """Simulated seconds that pass in one."""
        self._began = time.perf_counter()
        self._random = np.random.default_rng(seed)
        self._order = itertools.count()
        self._events: list[tuple[float, int, int, Assignment | None]] = []
        for worker in range(workers):
            self._later(self._random.uniform(5, 15), worker, None)

    def share(self, text: TokenStream) -> None:
        pass

    def lend(self, names: Sequence[str], arrays: Callable[[str], Arrays]) -> None:
        pass

    def submit(self, worker: int, assignment: Assignment) -> None:
        median = SPEED_SEC if assignment.job.is_timed else QUALITY_SEC
        self._later(self._random.lognormal(np.log(median), SPREAD), worker, assignment)

    def ask_conditions(self, worker: int, variant: Variant) -> None:
        raise AssertionError("there is one model")

    def wait(self, timeout: float) -> Iterator[Finished]:
        self._sleep_until(self._events[0][0])
        started = time.perf_counter()
        self.clock, _, worker, assignment = heapq.heappop(self._events)
        if assignment is None:
            kind = {"device": "simulated"}
            finished = Finished(worker, description=description(f"node {worker}", kind, "simulated"))
        else:
            finished = Finished(worker, measurement=self._measured(assignment))
        self.seconds += time.perf_counter() - started
        yield finished

    def _sleep_until(self, clock: float) -> None:
        started = time.perf_counter()
        time.sleep(max(self._began + clock / self._speed - started, 0.0))
        self.idle_seconds += time.perf_counter() - started

    def _later(self, seconds: float, worker: int, assignment: Assignment | None) -> None:
        heapq.heappush(self._events, (self.clock + seconds, next(self._order), worker, assignment))

    def _measured(self, assignment: Assignment) -> Measurement:
        what, policy = assignment.job.what, assignment.job.what.policy
        if assignment.job.is_timed:
            noise = self._random.exponential(0.04, 2)
            ratio = 1.0 + 4.0 / max(policy.compress_every, 1) + policy.n_sink / 320 + noise[0]
            return Measurement(
                {
                    "backend": what.backend,
                    "backend_requested": what.backend,
                    "time_ratio": ratio,
                    "time_ratio_low": 0.99 * ratio,
                    "time_ratio_high": 1.01 * ratio,
                    "measured_tpot_ms": 5.0 * ratio,
                    "reference_tpot_ms": 5.0 + noise[1],
                    "speed_sec": SPEED_SEC,
                }
            )
        tokens = len(TEXT.tokens)
        places = np.arange(float(tokens - 1))
        if assignment.job.batch is not None:
            places = places[list(sample_batches(tokens, policy.kept))[assignment.job.batch]]
        losses = np.column_stack((places, self._random.normal(3.0, 1.0, len(places))))
        quality = {"peak_kv": policy.kept + policy.compress_every, "quality_sec": QUALITY_SEC}
        quality |= {"evaluated_tokens": len(places)} | perplexity(losses[:, 1]).flat("perplexity")
        return Measurement(quality, losses)


class NoTracking:
    """MLflow follows at its own pace (tests/benchmarks/tracking.py); the driver never waits for it."""

    backlog = 0
    problem = None


class Stopwatch:
    """Seconds by part; what `timed` returns adds to one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds[part] += time.perf_counter() - started

        return call


class Marks:
    """An observer that notes the time of every so-manieth trial, and what each part has taken until then."""

    def __init__(self, every: int, now: Callable[[], dict[str, float]]) -> None:
        self.every = every
        self.now = now
        self.marks = [now()]
        self._finished = 0

    def trial_finished(self, row: dict[str, Any]) -> None:
        if row["trial"] in (STRICT, BASELINE):
            return
        self._finished += 1
        if self._finished % self.every == 0:
            self.marks.append(self.now())


def follower(folder: Path, trials: TrialsFile, space: SearchSpace, uri: str) -> Tracker:
    settings = made_up_settings(uuid.uuid4().hex, space)
    (folder / "sweep.json").write_text(json.dumps(settings))
    return Tracker(Projection(StudyFolder(folder), settings, uri), trials)


def drain(folder: Path, tracker: Tracker, sweep_sec: float) -> dict[str, Any]:
    """Waits until MLflow has everything."""
    StudyFolder(folder).write_outcome("FINISHED")
    behind, started = tracker.backlog, time.perf_counter()
    most: dict[str, float] = {}

    def look(_: int) -> None:
        most.update({name: max(value, most.get(name, 0.0)) for name, value in memory().items()})

    problem = tracker.finish(Report(), look, limit_sec=3600.0)
    assert problem is None, problem
    seconds = time.perf_counter() - started
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "behind_at_the_end": behind,
        "drained_sec": seconds,
        "share_of_the_sweep": seconds / sweep_sec,
        "cpu_sec": spent.ru_utime + spent.ru_stime,
        **most,
    }


def megabytes(process: int) -> float:
    """Of memory that it has to itself, or shares."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory() -> dict[str, float]:
    """Of the driver and, where it follows, of MLflow's process."""
    following = {f"{child.name} MB": child.pid for child in multiprocessing.active_children() if child.name == "mlflow"}
    return {name: megabytes(pid) for name, pid in ({"driver MB": os.getpid()} | following).items() if pid is not None}


def run(
    folder: Path,
    workers: int,
    trials: int,
    seed: int,
    sampler: str | None = None,
    mlflow: str | None = None,
    pace: float | None = None,
) -> dict[str, Any]:
    folder.mkdir()
    (folder / "space.yaml").write_text(SPACE)
    space = load_space(str(folder / "space.yaml"))
    more = {} if sampler is None else {"sampler": sampler}
    study = Study("scale", folder / "journal.log", space, CAP, seed, **more)
    pool, store = SimulatedPool(workers, seed, pace), MeasurementStore(StudyFolder(folder).store)
    watch = Stopwatch()
    store.get = watch.timed("store", store.get)  # type: ignore[method-assign]
    store.put = watch.timed("store", store.put)  # type: ignore[method-assign]
    study.ask = watch.timed("ask", study.ask)  # type: ignore[method-assign]
    study.tell = watch.timed("tell", study.tell)  # type: ignore[method-assign]
    file = TrialsFile(StudyFolder(folder), [])
    tracker = None if mlflow is None else follower(folder, file, space, mlflow)
    display = Display(trials, [], space.objectives, tracker or NoTracking())
    observers = [file, display, *([tracker] if tracker else [])]
    for observer in observers:
        observer.trial_finished = watch.timed("observers", observer.trial_finished)  # type: ignore[method-assign]
    for method in ("worker_ready", "worker_idle", "job_started"):
        setattr(display, method, watch.timed("observers", getattr(display, method)))
    original = driver_module.trial_row
    driver_module.trial_row = watch.timed("row", original)
    started, spent = time.perf_counter(), time.process_time()

    def now() -> dict[str, float]:
        parts = {part: watch.seconds[part] for part in PARTS if part != "other"}
        wall = time.perf_counter() - started
        working = wall - pool.idle_seconds
        parts |= {"other": working - pool.seconds - sum(parts.values()), "workers": pool.seconds, "wall": wall}
        return parts | {"working": working} | memory() | ({"MLflow's backlog": tracker.backlog} if tracker else {})

    marks = Marks(max(trials // 10, 1), now)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            scheduler = Scheduler(pool, store, VARIANT, watchers=[display])
            Driver(study, scheduler, TEXT, VARIANT, trials, [*observers, marks]).run()  # type: ignore[list-item]
    finally:
        driver_module.trial_row = original
    last = marks.marks[-1]
    return {
        "workers": workers,
        "trials": len(study.rows),
        "pace": pace,
        "simulated_sec": pool.clock,
        "wall_sec": last["wall"],
        "cpu_sec": time.process_time() - spent,
        "driver_trials_per_sec": len(study.rows) / (last["working"] - last["workers"]),
        "ms_per_trial": [
            part_of_the_sweep(number * marks.every, before, after, marks.every)
            for number, (before, after) in enumerate(itertools.pairwise(marks.marks), start=1)
        ],
    } | ({"mlflow": drain(folder, tracker, last["wall"])} if tracker else {})


def part_of_the_sweep(trials: int, before: dict[str, float], after: dict[str, float], n: int) -> dict[str, float]:
    """Milliseconds per trial from one mark to the next, `n` trials later; what was there by then."""
    parts = {part: 1e3 * (after[part] - before[part]) / n for part in PARTS}
    there = {name: value for name, value in after.items() if name.endswith((" MB", "backlog"))}
    return {"trials": trials} | parts | {"driver": sum(parts[part] for part in PARTS)} | there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", help="the study's default")
    parser.add_argument("--pace", type=float, metavar="N", help="let real time pass, in which N trials a second finish")
    parser.add_argument("--mlflow", metavar="URI", help="have MLflow follow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # a database's runs have their files there
        result = run(
            Path(folder, "study"),
            arguments.workers,
            arguments.trials,
            arguments.seed,
            arguments.sampler,
            arguments.mlflow,
            arguments.pace,
        )
    result |= {"load": {"before": load, "after": os.getloadavg()[0]}}
    print(
        f"{result['workers']} workers, {result['trials']} trials, {result['driver_trials_per_sec']:.0f} "
        f"trials/s; ms per trial:"
    )
    columns = list(result["ms_per_trial"][0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in result["ms_per_trial"]:
        print(
            "| "
            + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )
    if "mlflow" in result:
        print(
            "MLflow: {behind_at_the_end} runs behind at the end, drained in {drained_sec:.0f} s, "
            "{share_of_the_sweep:.0%} of the sweep's time; {cpu_sec:.0f} s of CPU".format(**result["mlflow"])
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"benchmark": "scale"} | machine() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
