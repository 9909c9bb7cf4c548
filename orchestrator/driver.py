"""The driver: asks the study, keeps every worker busy, tells what came back."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Protocol

from search_spaces import SearchSpace
from streamllm.errors import UsageError
from streamllm.files import explained
from streamllm.measuring.reference_time import WORKER
from streamllm.results.schema import Row, told_name
from streamllm.results.study import BASELINE, STRICT

from .search.rows import failed_row, fixed_row, fixed_spec, increases, trial_row
from .search.sampling import BaselineSample
from .search.study import OpenTrial, Study
from .workers.messages import SweepError, TrialMeasurement, TrialSpec, UnwritableError, WorkerDescription
from .workers.pool import Finished, WorkerPool

if TYPE_CHECKING:
    import numpy as np

    from streamllm.measuring.quality import QualityComparison

Kind = tuple[tuple[str, object], ...]
"""A kind of worker: names and values of `reference_time.WORKER`."""
Task = OpenTrial | str
"""A trial; or the name of what trials are compared with, STRICT or BASELINE."""

_CANDIDATES = 5
"""Taken to be confirmed, when time is set aside for it."""
_OF_BASELINE = {"speedup", "ppl_increase_percent"}
_DEATHS = 2
"""Workers that end on a trial before it counts as failed."""


class Observer(Protocol):
    """Watches a sweep: the display, MLflow."""

    def worker_ready(self, worker: int, description: WorkerDescription) -> None: ...

    def trial_started(self, worker: int, spec: TrialSpec) -> None: ...

    def trial_finished(self, row: Row) -> None: ...


class Driver:
    def __init__(
        self,
        study: Study,
        pool: WorkerPool,
        cap: int,
        trials: int,
        observers: list[Observer],
        note: Callable[[str], None] = lambda _: None,
        *,
        until: float = math.inf,
        confirm: int = 0,
        baseline_tokens: int | None = None,
    ) -> None:
        """`until`: when all should be finished, by the monotonic clock; `confirm`: rounds that will come after the
        search, and need their time. `baseline_tokens`: see `BaselineSample.wanted`."""
        self.study = study
        self.pool = pool
        self.cap = cap
        self.observers = observers
        self.note = note
        self.fixed: dict[str, TrialMeasurement] = {}
        """Measurements that trials are compared with, as far as they have been made."""
        self.comparison: QualityComparison | None = None
        """Compares qualities, once the reference is measured; includes the baseline's as far as that has been
        measured."""
        self._budget = trials - len(study.rows)
        self._until = until
        self._confirm = confirm
        self._exhausted = False
        self._idle: deque[int] = deque()
        self._running: dict[int, Task] = {}
        """Worker -> what it measures."""
        self._retries: deque[Task] = deque([STRICT, BASELINE])
        """Tasks to hand out before anything new is asked for: at first, those that trials are compared with."""
        self._deaths = {STRICT: 0, BASELINE: 0}
        self._sample = BaselineSample(baseline_tokens)
        self._awaits_baseline = bool(_OF_BASELINE & {*map(told_name, study.space.objectives), *_limited(study.space)})
        self._started: dict[int, float] = {}
        """Worker -> when it was given what it measures, by the monotonic clock."""
        self._digests: dict[str, str] = {
            name: _unquantized(row[name])
            for row in study.rows[:1]
            for name in ("model_digest", "text_digest")
            if name in row
        }
        """Digests of the weights, whatever became of them, and of the tokens; in a new study, the first worker's."""
        self._unpaired: list[tuple[OpenTrial, TrialMeasurement, int]] = []
        """Measured before what they are compared with."""
        self._kinds: dict[int, Kind] = {}
        """Worker -> its kind."""
        self._kind: Kind | None = next((_kind(row) for row in study.rows if "device" in row), None)
        """Kind of the workers when the study began; in a new study, the first one's."""

    @property
    def confirming(self) -> tuple[tuple[int, ...], dict[str, object]]:
        """Workers that are ready and have nothing to do, all of one kind, whose times compare, and that kind: the
        study's or, where none is of it any more, that of most of them."""
        kinds = Counter(self._kinds[worker] for worker in self._idle)
        chosen = self._kind if self._kind in kinds else next((kind for kind, _ in kinds.most_common(1)), ())
        return tuple(worker for worker in self._idle if self._kinds[worker] == chosen), dict(chosen or ())

    def run(self) -> None:
        """Runs trials until the budget is spent or the space is exhausted. Raises SweepError, UsageError."""
        while self._running or self._retries or self._more() or self._is_short():
            for finished in self.pool.wait(timeout=0.5):
                self._handle(finished)
                self._assign()
        self._announce_fixed(BASELINE)

    def increases(self, losses_of: Callable[[str], np.ndarray]) -> list[Row]:
        """The cost of the finished trials and the reference beside the baseline, as well as it is known by now. See
        `rows.increases`."""
        if self.comparison is None or BASELINE not in self.fixed:
            return []
        strict = self.fixed[STRICT].record | {"trial": STRICT, "state": "complete"}
        return increases([strict, *self.study.rows], self.comparison, losses_of)

    def _is_short(self) -> bool:
        return self._sample.is_short() and self._has_time()

    def _more(self) -> bool:
        """Whether there is anything new to ask for, be there workers just now or not."""
        return self._budget > 0 and not self._exhausted and self._has_time()

    def _has_time(self) -> bool:
        """For one trial more on every worker, and for confirming what is on the front by then."""
        if self._until == math.inf:
            return True
        rows = [row for row in self.study.rows if "speed_sec" in row]
        speed = median(row["speed_sec"] for row in rows) if rows else 0.0
        quality = median(row["quality_sec"] for row in rows) if rows else 0.0
        baseline = self.fixed[BASELINE].record.get("speed_sec", 0.0) if BASELINE in self.fixed else 0.0
        workers = len(self._idle) + len(self._running)
        needed = quality + workers * speed + self._confirm * (_CANDIDATES * speed + baseline)
        return time.monotonic() + needed < self._until

    def _assign(self) -> None:
        """Gives idle workers something to do."""
        while self._idle and (task := self._next()) is not None:
            worker = self._idle.popleft()
            spec = task.spec if isinstance(task, OpenTrial) else self._fixed_spec(task)
            self._running[worker] = task
            self._started[worker] = time.monotonic()
            self.pool.submit(worker, spec)
            for observer in self.observers:
                observer.trial_started(worker, spec)

    def _next(self) -> Task | None:
        if self._retries:
            return self._retries.popleft()
        known = self.comparison is not None and BASELINE in self.fixed  # or a batch would be asked for twice
        grows = known and BASELINE not in self._running.values() and self._has_time()
        if self._more():
            if grows and self._sample.is_due():
                return BASELINE
            if (asked := self._ask()) is not None:
                self._budget -= 1
                return asked
            self._exhausted = True
        return BASELINE if grows and self._sample.is_short() else None

    def _fixed_spec(self, name: str) -> TrialSpec:
        """The baseline with a sample one batch larger; where trials wait for it, with all the tokens that are
        needed."""
        first = self._sample.least if self._awaits_baseline else 0
        return fixed_spec(name, self.cap, max(self._sample.next_size, first))

    def _handle(self, finished: Finished) -> None:
        worker = finished.worker
        if finished.description is not None:
            self._check_same(finished.description)
            self._check_kind(worker, finished.description)
            for observer in self.observers:
                observer.worker_ready(worker, finished.description)
            for warning in finished.description.get("warnings", ()):
                self.note(f"warning: worker {worker}: {warning}")
        elif worker not in self._running:
            if not finished.died:  # what one worker cannot load, none can
                raise UsageError(finished.error)
        else:
            task = self._running.pop(worker)
            self._sample.spent(time.monotonic() - self._started.pop(worker), task == BASELINE)
            if finished.measurement is not None:
                self._measured(task, finished.measurement, worker)
            else:
                self._failed(task, finished)
        if not finished.died:
            self._idle.append(worker)

    def _check_same(self, description: WorkerDescription) -> None:
        """A study is of one model and one text, whoever measures and whenever. Raises UsageError."""
        digests = {"model": description.get("model_digest"), "text": description.get("text_digest")}
        for what, found in digests.items():
            if found is None:
                continue
            found = _unquantized(found)
            known = self._digests.setdefault(f"{what}_digest", found)
            if found != known:
                raise UsageError(
                    f"{what} on {description['host']}: {found:.12}..., the study's is {known:.12}...; its "
                    f"files have been changed; put them back, or give another --study"
                )

    def _check_kind(self, worker: int, description: WorkerDescription) -> None:
        """Warns of a worker whose times do not compare with the study's; tables tell them apart, and it does not
        confirm."""
        found = self._kinds[worker] = _kind(description)
        if self._kind is None:
            self._kind = found
        if found != self._kind:
            differ = "; ".join(
                f"{name} {value}, then {was or 'not known'}"
                for (name, value), (_, was) in zip(found, self._kind, strict=True)
                if value != was and was is not None
            )
            if not differ:  # an older study does not say with which versions
                return
            self.note(f"warning: worker {worker} is of another kind than when the study began: {differ}")

    def _measured(self, task: Task, measurement: TrialMeasurement, worker: int) -> None:
        if isinstance(task, str):
            is_first = task not in self.fixed
            self.fixed[task] = measurement
            self._compare()
            if is_first and self.comparison is not None:
                self._announce_fixed(task)
        else:
            self._unpaired.append((task, measurement, worker))
        baseline = self.fixed.get(BASELINE)
        if self.comparison is None or (baseline is None and self._awaits_baseline):
            return
        for waiting, measured, by in self._unpaired:
            self._tell(waiting, trial_row(waiting, measured, baseline, self.comparison, by))
        self._unpaired.clear()

    def _compare(self) -> None:
        """With what there is of the reference and the baseline."""
        from streamllm.measuring.quality import QualityComparison

        strict, baseline = self.fixed.get(STRICT), self.fixed.get(BASELINE)
        if strict is None:
            return
        assert strict.losses is not None
        self.comparison = QualityComparison(strict.losses, baseline.losses if baseline else None)
        if baseline is not None:
            self._sample.measured(baseline, strict.losses)

    def _announce_fixed(self, name: str) -> None:
        assert self.comparison is not None
        self._announce(fixed_row(name, self.fixed[name], self.fixed.get(BASELINE), self.comparison))

    def _failed(self, task: Task, finished: Finished) -> None:
        """A task that took a worker down is tried once more, by whoever is free first; one that raised would raise
        again."""
        reason = str(finished.error)
        if finished.died:
            if self._died(task) < _DEATHS:
                self._retries.append(task)
                return
            reason = f"quarantined: {_DEATHS} workers ended on it: {reason}"
        if isinstance(task, str):
            if task in self.fixed:  # there is a sample, if a small one
                self.note(f"warning: the baseline's sample stays at {self._sample.tokens} tokens: {reason}")
                self._sample.is_whole = True
                return
            what = {STRICT: "strict StreamingLLM, the reference,", BASELINE: "the baseline"}[task]
            raise SweepError(f"{what} could not be measured: {reason}")
        self._tell(task, failed_row(task, reason, finished.worker))

    def _died(self, task: Task) -> int:
        """How many workers have ended on it, this one included."""
        if isinstance(task, str):
            self._deaths[task] += 1
            return self._deaths[task]
        with _writing():
            return self.study.died(task.number)

    def _ask(self) -> OpenTrial | None:
        with _writing():
            return self.study.ask()

    def _tell(self, trial: OpenTrial, row: Row) -> None:
        with _writing():
            judged = self.study.tell(trial.number, row)
        self._announce(judged)

    def _announce(self, row: Row) -> None:
        with _writing():
            for observer in self.observers:
                observer.trial_finished(row)


def _kind(of: Mapping[str, object]) -> Kind:
    """The kind in a worker's description, or in a row."""
    return tuple((name, of.get(name)) for name in WORKER)


def _limited(space: SearchSpace) -> list[str]:
    return [constraint.metric for constraint in space.constraints]


def _unquantized(digest: str) -> str:
    """The digest of the weights that were loaded, from that of a model in memory, in which its quantization follows."""
    return digest.partition(" ")[0]


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwritableError(
            f"the study cannot be written: {explained(error)}, then give the same command again; what is finished is "
            f"kept"
        ) from error
