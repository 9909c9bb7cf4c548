"""Whether accelerators of one node are timed side by side: asked for, or found out by timing one alone and beside the
others, all of them busy.

Found out once per kind of node: the kind of its workers, and how many they are. What counts is the ratio to the
reference, as everywhere. Re-computation is timed, which waits for arithmetic, beside a reference whose small kernels
wait for Python: what disturbs one of them more than the other is seen. One worker is timed alone and beside the others
in turn, so that it is compared with itself; the others time the same, over and over, until it has ended.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from streamllm.configuration import Configuration
from streamllm.files import write_atomically
from streamllm.measuring.done import Done
from streamllm.measuring.jobs import Job, Plan
from streamllm.policy import EvictionPolicy
from streamllm.results.checks import checked_timing
from streamllm.results.damaged import DamagedError, keep_aside, read_json
from streamllm.results.study_folder import StudyFolder

from .scheduler import Scheduler
from .unwritable import writing
from .waiting import JobError
from .workers.kinds import Kind, kind_of

if TYPE_CHECKING:
    from streamllm.measuring.quality import Estimate

    from .workers.messages import Subject

CLOSE = 1.02
"""Factor within which both times have to agree."""
_LOOKS = (6, 12)
"""Numbers of repetitions after which it is decided, if that is possible then: with six the distribution-free interval
has 97%. To look after each would be to wait for luck."""
_SETTLED_SEC = 20.0
"""A node's workers become ready one after the other: none more for so long, and it is taken to have all."""
_LOOK_SEC = 1.0
_TRIES = 2
"""A worker may have died."""

Mode = Literal["exclusive", "concurrent"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a kind of node was found to be like."""

    kind: Kind
    workers: int
    alone: float
    """Median over repetitions of the ratio to the reference."""
    beside: float
    """The same, with all others busy."""
    quotient: Estimate
    """Beside over alone, of the same repetition: the median, with its interval."""
    repetitions: int
    is_sure: bool
    """Whether the interval is on one side of what counts as close."""

    @property
    def mode(self) -> Mode:
        return "concurrent" if self.is_sure and 1 / CLOSE <= self.quotient.value <= CLOSE else "exclusive"

    @classmethod
    def of(cls, kind: Kind, workers: int, alone: list[float], beside: list[float]) -> Calibration | None:
        """None where it takes more repetitions to be sure."""
        if len(alone) not in _LOOKS:
            return None
        import numpy as np

        from streamllm.measuring.quality import median_interval

        quotient = median_interval(np.array(beside) / np.array(alone))
        within = quotient.low >= 1 / CLOSE and quotient.high <= CLOSE
        is_sure = within or quotient.high < 1 / CLOSE or quotient.low > CLOSE
        if not is_sure and len(alone) < _LOOKS[-1]:
            return None
        return cls(kind, workers, median(alone), median(beside), quotient, len(alone), is_sure)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Calibration:
        from streamllm.measuring.quality import Estimate

        quotient = Estimate(values["quotient"], values["quotient_low"], values["quotient_high"])
        ends = values["alone"], values["beside"], quotient, values["repetitions"]
        return cls(kind_of(values), values["workers"], *ends, is_sure=values.get("is_sure") is True)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self) | self.quotient.flat("quotient") | {"timing": self.mode}
        return dict(values.pop("kind")) | values

    def __str__(self) -> str:
        found = "side by side" if self.mode == "concurrent" else "one at a time"
        why = "" if self.is_sure else f", which is not sure to be within {100 * (CLOSE - 1):.0f}%"
        return (
            f"timing on {self.workers} x {dict(self.kind)['device']} of a node: {self.alone:.4g} times the reference "
            f"alone, {self.beside:.4g} beside the others, {self.quotient.value:.4f} [{self.quotient.low:.4f}, "
            f"{self.quotient.high:.4f}] as much over {self.repetitions} repetitions{why}: {found}"
        )


class Timing:
    """How a sweep's accelerators are timed, node by node; the scheduler's `Turns`."""

    def __init__(self, asked: str, folder: StudyFolder, note: Callable[[str], None]) -> None:
        """asked: `auto`, `exclusive` or `concurrent`. What was found out before is in the folder, where what is found
        out is added. note: is given lines for the user."""
        self._asked = asked
        self._folder = folder
        self._note = note
        self._known = {(one.kind, one.workers): one for one in _read(folder)} if asked == "auto" else {}
        self._failed: Counter[tuple[Kind, int]] = Counter()
        self._running: set[tuple[Kind, int]] = set()
        self._settling: dict[str, tuple[list[int], float]] = {}
        """Machine -> its workers, and since when they are these."""
        self._looked = -math.inf
        self._is_warned = False
        self._runs = itertools.count(1)
        for one in self._known.values():
            note(f"known: {one}")

    def side_by_side(self, kind: Kind, workers: int) -> bool:
        """As was asked for or found out; with fewer workers too than were found not to disturb one another."""
        if self._asked != "auto":
            return self._asked == "concurrent"
        if (known := self._known.get((kind, workers))) is not None:
            return known.mode == "concurrent"
        return any(
            of == kind and count > workers and one.mode == "concurrent" for (of, count), one in self._known.items()
        )

    def look(self, scheduler: Scheduler) -> None:
        """Begins to find out about nodes where timings wait for one another, once all of their workers are ready."""
        now = time.monotonic()
        if self._asked == "exclusive" or now - self._looked < _LOOK_SEC:
            return
        self._looked = now
        accelerators = scheduler.accelerators()
        if self._asked == "concurrent":
            self._warn(is_needed=scheduler.ready > 0 and not accelerators)
            return
        for host, (kind, workers) in accelerators.items():
            if self._settling.get(host, ([], now))[0] != workers:
                self._settling[host] = workers, now
            waiting = scheduler.next_timing()
            is_settled = not scheduler.is_restarting and now - self._settling[host][1] >= _SETTLED_SEC
            if waiting is not None and is_settled and self._is_open(node := (kind, len(workers))):
                self._running.add(node)
                _Calibrating(scheduler, waiting.subject, kind, workers, self._runs, partial(self._found, node)).go()

    def _is_open(self, node: tuple[Kind, int]) -> bool:
        if node[1] == 1 or node in self._known or node in self._running or self._failed[node] == _TRIES:
            return False
        return not self.side_by_side(*node)

    def _warn(self, is_needed: bool) -> None:
        if is_needed and not self._is_warned:
            self._is_warned = True
            self._note(
                "warning: --timing concurrent is for accelerators: on cores one worker of a node times at a time"
            )

    def _found(self, node: tuple[Kind, int], result: Calibration | JobError) -> None:
        self._running.discard(node)
        if isinstance(result, JobError):
            self._failed[node] += 1
            if self._failed[node] == _TRIES:
                self._note(
                    f"warning: whether {node[1]} workers of a node disturb one another could not be measured "
                    f"({result}): they are timed one at a time"
                )
            return
        self._known[node] = result
        self._note(str(result))
        _write(self._folder, self._known.values())


class _Calibrating:
    """A calibration under way."""

    def __init__(
        self,
        scheduler: Scheduler,
        subject: Subject,
        kind: Kind,
        workers: list[int],
        runs: Iterable[int],
        done: Callable[[Calibration | JobError], None],
    ) -> None:
        """runs: numbers that no other calibration has."""
        self._scheduler = scheduler
        self._subject = subject
        self._kind = kind
        self._workers = workers
        self._runs = iter(runs)
        self._done = done
        self._alone: list[float] = []
        self._beside: list[float] = []
        self._is_busy = False
        """Whether the others are to go on."""
        self._at_it: set[int] = set()
        """The others that do."""
        self._failure: JobError | None = None
        """Of one of the others: the first had fewer beside it than it was to have."""

    def go(self) -> None:
        """The next timing: alone and beside, beside and alone, so that what changes slowly favours neither."""
        alone, beside = len(self._alone), len(self._beside)
        if alone == beside and alone:
            found = Calibration.of(self._kind, len(self._workers), self._alone, self._beside)
            if found is not None:
                self._done(found)
                return
        first, *others = self._workers
        is_beside = alone > beside or (alone == beside and alone % 2 == 1)
        if is_beside:
            self._is_busy = True
            for other in [other for other in others if other not in self._at_it]:
                self._at_it.add(other)
                self._start(self._over_and_over(), other, True, partial(self._other_ended, other))
        then = partial(self._timed, self._beside if is_beside else self._alone)
        self._start(self._once(), first, is_beside, then)

    def _start(self, plan: Plan[Any], worker: int, beside: bool, then: Callable[[Any], None]) -> None:
        self._scheduler.start(plan, self._subject, then, on=worker, stays=True, beside=beside)

    def _timed(self, among: list[float], result: float | JobError) -> None:
        self._is_busy = False
        failure = result if isinstance(result, JobError) else self._failure
        if failure is not None:
            self._done(failure)
            return
        assert isinstance(result, float)
        among.append(result)
        self.go()

    def _other_ended(self, other: int, result: JobError | None) -> None:
        self._at_it.discard(other)
        self._failure = self._failure or result

    def _once(self) -> Plan[float]:
        done: Done
        (done,) = yield [self._job()]
        return float(median(done.measurement.record["ratios"]))

    def _over_and_over(self) -> Plan[None]:
        while self._is_busy:
            yield [self._job()]

    def _job(self) -> Job:
        """Re-computation of all that the reference holds."""
        policy = EvictionPolicy(n_sink=0, window_size=self._subject.total)
        return Job("times", Configuration("recompute", policy), run=-next(self._runs))


def _read(folder: StudyFolder) -> list[Calibration]:
    """What the study has found out; what is damaged is kept aside and found out anew."""
    if not folder.timing.exists():
        return []
    try:
        return [Calibration.from_json(one) for one in read_json(folder.timing, checked_timing)]
    except DamagedError as error:
        keep_aside(folder.timing, [str(error)], "workers are tried out anew")
        return []


def _write(folder: StudyFolder, known: Iterable[Calibration]) -> None:
    """Raises UnwritableError."""
    with writing(str(folder.timing)):
        write_atomically(folder.timing, json.dumps({"nodes": [one.to_json() for one in known]}, indent=2) + "\n")
