"""The driver: asks the study, keeps every worker busy, tells what came back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from streamllm.errors import UsageError

from .pool import Finished, SweepError, WorkerPool
from .results import baseline_row, baseline_spec, failed_row, trial_row
from .study import OpenTrial, Study
from .trial import TrialMeasurement, TrialSpec

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
        self.baseline: TrialMeasurement | None = None
        self._budget = trials - len(study.rows)
        self._until = math.inf if time_budget is None else time.monotonic() + time_budget
        self._exhausted = False
        self._idle: deque[int] = deque()
        self._running: dict[int, OpenTrial | None] = {}
        """Worker -> its trial; None is the baseline."""
        self._retries: deque[OpenTrial | None] = deque([None])
        """To be handed out before anything new is asked for: at first, the baseline."""
        self._baseline_deaths = 0
        self._unpaired: list[tuple[OpenTrial, TrialMeasurement, int]] = []
        """Measured before the baseline was."""

    @property
    def idle(self) -> tuple[int, ...]:
        """Workers that are ready and have nothing to do."""
        return tuple(self._idle)

    def run(self) -> None:
        """Runs trials until the budget is spent or the space is exhausted. Raises SweepError, UsageError."""
        while self._running or self._retries or self.baseline is None or self._more():
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
                trial = self._retries.popleft()
            elif (asked := self._ask()) is not None:
                self._budget -= 1
                trial = asked
            else:
                self._exhausted = True
                return
            worker = self._idle.popleft()
            spec = baseline_spec(self.cap) if trial is None else trial.spec
            self._running[worker] = trial
            self.pool.submit(worker, spec)
            for observer in self.observers:
                observer.trial_started(worker, spec)

    def _handle(self, finished: Finished) -> None:
        worker = finished.worker
        if finished.description is not None:
            for observer in self.observers:
                observer.worker_ready(worker, finished.description)
            for warning in finished.description.get("warnings", ()):
                self.note(f"warning: worker {worker}: {warning}")
        elif worker not in self._running:
            if not finished.died:  # what one worker cannot load, none can
                raise UsageError(finished.error)
        else:
            trial = self._running.pop(worker)
            if finished.measurement is not None:
                self._measured(trial, finished.measurement, worker)
            else:
                self._failed(trial, finished)
        if not finished.died:
            self._idle.append(worker)

    def _measured(self, trial: OpenTrial | None, measurement: TrialMeasurement, worker: int) -> None:
        if trial is None:
            self.baseline = measurement
            self._announce(baseline_row(measurement))
        else:
            self._unpaired.append((trial, measurement, worker))
        if self.baseline is not None:
            for waiting, measured, by in self._unpaired:
                self._tell(waiting, trial_row(waiting, measured, self.baseline, by))
            self._unpaired.clear()

    def _failed(self, trial: OpenTrial | None, finished: Finished) -> None:
        """What took a worker down is tried once more, by whoever is free first; what raised would raise again."""
        reason = str(finished.error)
        if finished.died:
            if self._died(trial) < _DEATHS:
                self._retries.append(trial)
                return
            reason = f"quarantined: {_DEATHS} workers ended on it: {reason}"
        if trial is None:
            raise SweepError(f"the baseline could not be measured: {reason}")
        self._tell(trial, failed_row(trial, reason, finished.worker))

    def _died(self, trial: OpenTrial | None) -> int:
        """How many workers have ended on the trial, this one included."""
        if trial is None:
            self._baseline_deaths += 1
            return self._baseline_deaths
        with _writing():
            return self.study.died(trial.number)

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
