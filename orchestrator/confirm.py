"""Confirming: after the search, the speed of the front's candidates and of the baseline is measured again, in rounds.

A search picks lucky noise; what it measured does not count here. In a round each candidate is measured once, all on the
same worker, so that what differs between rounds or workers differs for all of them alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from dashboards.front import Row, pareto_front
from streamllm.policy import EvictionPolicy
from streamllm.quality import joint_draws

from .pool import Finished
from .trial import TrialMeasurement, TrialSpec

OTHERS = 6
"""Candidates at most besides those on the front."""

_ATTEMPTS = 2
_DRAWS = 2000


class Pool(Protocol):
    def submit(self, worker: int, spec: TrialSpec) -> None: ...

    def wait(self, timeout: float) -> Any: ...


@dataclass(frozen=True)
class Sample:
    """What the rounds brought for one candidate."""

    row: Row
    segments: np.ndarray
    """(rounds, segments): ms per token."""
    losses: np.ndarray
    """(n, 2): position, nats."""


def candidates(rows: Sequence[Row], objectives: Mapping[str, str], others: int = OTHERS) -> list[Row]:
    """The front, and the `others` nearest to it among the trials that no row of the front beats for certain: of each,
    in some objective, the two intervals overlap."""
    front = pareto_front(rows, objectives)
    feasible = [row for row in rows if row["state"] == "complete" and row.get("feasible", True) and row not in front]
    reach = [(max((_reach(row, better, objectives) for better in front), default=0.0), row) for row in feasible]
    near = sorted((pair for pair in reach if pair[0] <= 1), key=lambda pair: pair[0])
    return [*front, *(row for _, row in near[:others])]


def confirm(
    pool: Pool,
    workers: Sequence[int],
    rows: Sequence[Row],
    baseline: Row,
    rounds: int,
    announce: Callable[[int, TrialSpec], None],
) -> tuple[list[Sample], Sample | None, list[str]]:
    """Measures `rows` and the baseline in `rounds` rounds; each round on the next of the ready `workers`, every
    candidate in turn. What the store has is not measured again. Returns the samples, the baseline's, and why candidates
    are missing.

    announce: told worker and spec before each measurement."""
    turns = _Turns(pool, workers, announce)
    measured: dict[Any, list[TrialMeasurement]] = {row["trial"]: [] for row in (baseline, *rows)}
    failed: dict[Any, str] = {}
    for number in range(1, rounds + 1):
        turns.next_worker()
        for row in (baseline, *rows):
            if row["trial"] not in failed:
                result = turns.measure(_spec(row, number))
                if isinstance(result, str):
                    failed[row["trial"]] = f"trial {row['trial']} cannot be confirmed: {result}"
                else:
                    measured[row["trial"]].append(result)
    samples = {
        row["trial"]: Sample(
            row,
            np.array([one.segment_tpot_ms for one in measured[row["trial"]]]),
            measured[row["trial"]][0].losses,
        )
        for row in (baseline, *rows)
        if row["trial"] not in failed
    }
    return (
        [samples[row["trial"]] for row in rows if row["trial"] in samples],
        samples.get(baseline["trial"]),
        list(failed.values()),
    )


def confirmed_rows(samples: Sequence[Sample], baseline: Sample, objectives: Mapping[str, str]) -> list[dict[str, Any]]:
    """What is added to the rows of the candidates and the baseline: time and speedup, the median over rounds of their
    medians, with 95% intervals, and the share of bootstrap draws that have the candidate on the front.

    A draw takes rounds, the same for all, then segments within each; and tokens, the same for all, for the quality.
    Of few rounds the interval is about their range. Objectives that are not measured again stay as they are."""
    times = _time_draws([baseline, *samples])
    added = []
    probabilities = front_probabilities(samples, baseline, times, objectives)
    for index, sample in enumerate((baseline, *samples)):
        values = {"trial": sample.row["trial"], "confirmed_rounds": len(sample.segments)}
        values |= _estimate("confirmed_tpot_ms", _median(sample), times[:, index])
        if index:
            speedup = _median(baseline) / _median(sample)
            values |= _estimate("confirmed_speedup", speedup, times[:, 0] / times[:, index])
            values["front_probability"] = probabilities[index - 1]
        else:
            values["confirmed_speedup"] = 1.0
        added.append(values)
    return added


def front_probabilities(
    samples: Sequence[Sample], baseline: Sample, times: np.ndarray, objectives: Mapping[str, str]
) -> list[float]:
    """The share of draws in which no other sample dominates the sample. times: (draws, 1 + samples), baseline first."""
    if not samples:
        return []
    points = np.stack(
        [
            (-1 if direction == "maximize" else 1) * _objective_draws(name, samples, baseline, times)
            for name, direction in objectives.items()
        ],
        axis=-1,
    )  # (draws, samples, objectives), all to be minimised
    one, other = points[:, :, None], points[:, None]
    dominated = ((other <= one).all(-1) & (other < one).any(-1)).any(-1)
    return [float(share) for share in 1 - dominated.mean(axis=0)]


def _objective_draws(name: str, samples: Sequence[Sample], baseline: Sample, times: np.ndarray) -> np.ndarray:
    if name == "tpot_ms":
        return times[:, 1:]
    if name == "speedup":
        return times[:, :1] / times[:, 1:]
    if name in ("perplexity", "ppl_increase_percent"):
        reference = baseline.losses if name == "ppl_increase_percent" else None
        return joint_draws([sample.losses for sample in samples], reference, len(times))
    return np.broadcast_to([float(sample.row[name]) for sample in samples], (len(times), len(samples)))


def _time_draws(samples: Sequence[Sample]) -> np.ndarray:
    """(draws, samples): bootstrap over rounds, jointly, and over the segments of each."""
    random = np.random.default_rng(0)
    rounds = len(samples[0].segments)
    drawn = random.integers(rounds, size=(_DRAWS, rounds))
    columns = []
    for sample in samples:
        segments = random.integers(sample.segments.shape[1], size=(*drawn.shape, sample.segments.shape[1]))
        columns.append(np.median(np.median(sample.segments[drawn[..., None], segments], axis=-1), axis=-1))
    return np.stack(columns, axis=-1)


def _median(sample: Sample) -> float:
    return float(np.median(np.median(sample.segments, axis=1)))


def _estimate(name: str, value: float, draws: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return {name: value, f"{name}_low": min(float(low), value), f"{name}_high": max(float(high), value)}


def _reach(row: Row, better: Row, objectives: Mapping[str, str]) -> float:
    """How much of their intervals' half-widths the row is from being as good as `better` in some objective: 0 if it is,
    up to 1 if intervals overlap."""
    needed = []
    for name, direction in objectives.items():
        sign, end, other_end = (-1, "high", "low") if direction == "maximize" else (1, "low", "high")
        gap = sign * (row[name] - better[name])
        if gap < 0:
            return 0.0
        width = abs(row[name] - row.get(f"{name}_{end}", row[name]))
        width += abs(better.get(f"{name}_{other_end}", better[name]) - better[name])
        needed.append(gap / width if gap and width else np.inf)  # equal ones are the same policy's, and stay equal
    return min(needed)


def _spec(row: Row, number: int) -> TrialSpec:
    policy = EvictionPolicy(**{field.name: row[field.name] for field in fields(EvictionPolicy)})
    return TrialSpec(row["method"], row["backend_requested"], policy, row.get("execution", "eager"), number)


class _Turns:
    """One measurement at a time, on a worker that is ready."""

    def __init__(self, pool: Pool, workers: Sequence[int], announce: Callable[[int, TrialSpec], None]) -> None:
        self._pool = pool
        self._ready = deque(workers)
        self._starting: set[int] = set()
        self._announce = announce

    def next_worker(self) -> None:
        self._ready.rotate(-1)

    def measure(self, spec: TrialSpec) -> TrialMeasurement | str:
        """The measurement, or why there is none; after the worker's death on the next one, once."""
        reason = "no worker is left"
        for _ in range(_ATTEMPTS):
            if not self._recovered():
                break
            worker = self._ready[0]
            self._announce(worker, spec)
            self._pool.submit(worker, spec)
            finished = self._answer(worker)
            if finished.measurement is not None:
                return finished.measurement
            reason = str(finished.error)
            if not finished.died:
                break
            self._ready.popleft()
            if not finished.lost:
                self._starting.add(worker)
        return reason

    def _answer(self, worker: int) -> Finished:
        while True:
            for finished in self._pool.wait(timeout=0.5):
                if finished.worker == worker:
                    return finished
                self._noticed(finished)

    def _recovered(self) -> bool:
        """Waits for a worker that is ready; False if there will be none."""
        while not self._ready and self._starting:
            for finished in self._pool.wait(timeout=0.5):
                self._noticed(finished)
        return bool(self._ready)

    def _noticed(self, finished: Finished) -> None:
        """Takes in a worker that has started, forgets one that never will."""
        if finished.description is not None:
            self._starting.discard(finished.worker)
            self._ready.append(finished.worker)
        elif finished.lost or not finished.died:
            self._starting.discard(finished.worker)
