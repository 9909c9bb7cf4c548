"""The driver: asks the study, keeps every worker busy, tells what came back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from streamllm.errors import UsageError

from .pool import Finished, SweepError, WorkerPool
from .results import BASELINE, STRICT, failed_row, fixed_row, fixed_spec, trial_row
from .study import OpenTrial, Study
from .trial import TrialMeasurement, TrialSpec

if TYPE_CHECKING:
    from streamllm.quality import QualityComparison

Task = OpenTrial | str
"""A trial; or the name of what trials are compared with, STRICT or BASELINE."""

_DEATHS = 2
"""Workers that end on a trial before it counts as failed."""


class Observer(Protocol):
    """Watches a sweep: the display, MLflow."""

    def worker_ready(self, worker: int, description: dict[str, Any]) -> None: ...

    def trial_started(self, worker: int, spec: TrialSpec) -> None: ...

    def trial_finished(self, row: dict[str, Any]) -> None: ...


class Driver:
    def __init__(
        self,
        study: Study,
        pool: WorkerPool,
        cap: int,
        trials: int,
        observers: list[Observer],
        note: Callable[[str], None] = lambda _: None,
        time_budget: float | None = None,
    ) -> None:
        """`time_budget`: seconds from now after which nothing new is asked for."""
        self.study = study
        self.pool = pool
        self.cap = cap
        self.observers = observers
        self.note = note
        self.fixed: dict[str, TrialMeasurement] = {}
        """What trials are compared with, as far as it has been measured."""
        self.comparison: QualityComparison | None = None
        """Of qualities, once all that is measured."""
        self._budget = trials - len(study.rows)
        self._until = math.inf if time_budget is None else time.monotonic() + time_budget
        self._exhausted = False
        self._idle: deque[int] = deque()
        self._running: dict[int, Task] = {}
        """Worker -> what it measures."""
        self._retries: deque[Task] = deque([STRICT, BASELINE])
        """To be handed out before anything new is asked for: at first, what trials are compared with."""
        self._deaths = {STRICT: 0, BASELINE: 0}
        self._digests: dict[str, str] = {
            name: row[name] for row in study.rows[:1] for name in ("model_digest", "text_digest") if name in row
        }
        """Of weights and tokens; of a new study, the first worker's."""
        self._unpaired: list[tuple[OpenTrial, TrialMeasurement, int]] = []
        """Measured before all that was."""

    @property
    def idle(self) -> tuple[int, ...]:
        """Workers that are ready and have nothing to do."""
        return tuple(self._idle)

    def run(self) -> None:
        """Runs trials until the budget is spent or the space is exhausted. Raises SweepError, UsageError."""
        while self._running or self._retries or self.comparison is None or self._more():
            for finished in self.pool.wait(timeout=0.5):
                self._handle(finished)
                self._assign()

    def _more(self) -> bool:
        """Whether there is anything new to ask for, be there workers just now or not."""
        return self._budget > 0 and not self._exhausted and time.monotonic() < self._until

    def _assign(self) -> None:
        """Gives idle workers something to do."""
        while self._idle and (self._retries or self._more()):
            if self._retries:
                task = self._retries.popleft()
            elif (asked := self._ask()) is not None:
                self._budget -= 1
                task = asked
            else:
                self._exhausted = True
                return
            worker = self._idle.popleft()
            spec = fixed_spec(task, self.cap) if isinstance(task, str) else task.spec
            self._running[worker] = task
            self.pool.submit(worker, spec)
            for observer in self.observers:
                observer.trial_started(worker, spec)

    def _handle(self, finished: Finished) -> None:
        worker = finished.worker
        if finished.description is not None:
            self._check_same(finished.description)
            for observer in self.observers:
                observer.worker_ready(worker, finished.description)
            for warning in finished.description.get("warnings", ()):
                self.note(f"warning: worker {worker}: {warning}")
        elif worker not in self._running:
            if not finished.died:  # what one worker cannot load, none can
                raise UsageError(finished.error)
        else:
            task = self._running.pop(worker)
            if finished.measurement is not None:
                self._measured(task, finished.measurement, worker)
            else:
                self._failed(task, finished)
        if not finished.died:
            self._idle.append(worker)

    def _check_same(self, description: Mapping[str, Any]) -> None:
        """A study is of one model and one text, whoever measures and whenever. Raises UsageError."""
        for what in ("model", "text"):
            found = description.get(f"{what}_digest")
            if found is None:
                continue
            known = self._digests.setdefault(f"{what}_digest", found)
            if found != known:
                raise UsageError(
                    f"{what} on {description['host']}: {found:.12}..., the study's is {known:.12}...; its "
                    f"files have been changed; put them back, or give another --study"
                )

    def _measured(self, task: Task, measurement: TrialMeasurement, worker: int) -> None:
        if isinstance(task, str):
            self.fixed[task] = measurement
            if len(self.fixed) == len(self._deaths):
                self._compare()
        else:
            self._unpaired.append((task, measurement, worker))
        if self.comparison is not None:
            baseline = self.fixed[BASELINE]
            for waiting, measured, by in self._unpaired:
                self._tell(waiting, trial_row(waiting, measured, baseline, self.comparison, by))
            self._unpaired.clear()

    def _compare(self) -> None:
        """All that trials are compared with is there."""
        from streamllm.quality import QualityComparison

        strict, baseline = self.fixed[STRICT], self.fixed[BASELINE]
        assert strict.losses is not None
        self.comparison = QualityComparison(strict.losses, baseline.losses)
        for name, measurement in self.fixed.items():
            self._announce(fixed_row(name, measurement, baseline, self.comparison))

    def _failed(self, task: Task, finished: Finished) -> None:
        """What took a worker down is tried once more, by whoever is free first; what raised would raise again."""
        reason = str(finished.error)
        if finished.died:
            if self._died(task) < _DEATHS:
                self._retries.append(task)
                return
            reason = f"quarantined: {_DEATHS} workers ended on it: {reason}"
        if isinstance(task, str):
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

    def _tell(self, trial: OpenTrial, row: dict[str, Any]) -> None:
        with _writing():
            judged = self.study.tell(trial.number, row)
        self._announce(judged)

    def _announce(self, row: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.trial_finished(row)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SweepError(
            f"the study cannot be written ({error.strerror or error}): make room for it, then give the same command "
            f"again; what is finished is kept"
        ) from error
