"""The study: which configurations were tried, are running and come next, in a journal that survives being killed.

It is an Optuna study, in a journal on disk. A trial is one line when it is handed out and another few, written
together, when it is finished; its table row is a user attribute, so that the journal alone can rebuild tables and
MLflow. What was running when the driver died is handed out again, under its number.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from search_spaces import SearchSpace, Value, judged
from streamllm.errors import UsageError
from streamllm.measuring.reference_time import ReferencePool
from streamllm.results.schema import OBJECTIVES, Row, told_name

from ..workers.messages import TrialSpec
from .points import configuration_of
from .samplers import Result, Sampler, Suggestion

_ROW = "row"
_SKIPPED = "skipped"
_DEATHS = "deaths"
_NEIGHBOURS = 8
"""Neighbours tried at each distance, in place of a configuration that was tried already."""


@dataclass(frozen=True, slots=True)
class OpenTrial:
    """A trial that was asked for and not told yet."""

    number: int
    params: dict[str, Value]
    spec: TrialSpec


class Study:
    def __init__(
        self, name: str, journal: Path, space: SearchSpace, cap: int, seed: int, sampler: str = "auto"
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _mend(journal)
        self.name = name
        self.space = space
        self.cap = cap
        self._random = random.Random(seed)
        self._size = space.size
        self._backend = _Journal(str(journal))
        self._storage = JournalStorage(self._backend)
        self._study = optuna.create_study(
            study_name=name,
            storage=self._storage,
            sampler=optuna.samplers.RandomSampler(),  # never asked: `samplers` suggests
            directions=[OBJECTIVES[objective] for objective in space.objectives],  # type: ignore[misc]
            load_if_exists=True,
        )
        if self._study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is experimental in Optuna
                self._study.set_metric_names([told_name(objective) for objective in space.objectives])
        trials = self._study.get_trials(deepcopy=False)
        self._times = ReferencePool(_row(trial) for trial in trials if _ROW in trial.user_attrs)
        for trial in trials:
            if trial.state == TrialState.RUNNING and _ROW in trial.user_attrs:  # killed in the middle of tell
                self._finish(self._reopened(trial), _row(trial))
        settled = [trial for trial in trials if trial.user_attrs.keys() & {_ROW, _SKIPPED}]
        self.rows = [_row(trial) for trial in settled if _ROW in trial.user_attrs]
        """The finished trials. Milliseconds are not in them: what those are in is known when all are measured."""
        self._seen = {self._identity(space.complete(trial.params)) for trial in settled}
        self._interrupted = deque(t for t in trials if t.state == TrialState.RUNNING and _ROW not in t.user_attrs)
        self._known = deque(space.known)
        self._points = space.points()
        self._open: dict[int, tuple[Trial, OpenTrial, Suggestion]] = {}
        past = [self._result(space.complete(t.params), _row(t)) for t in settled if _ROW in t.user_attrs]
        self._sampler = Sampler(sampler, space, seed, [result for result in past if result.row["state"] == "complete"])

    @property
    def threads(self) -> int:
        """Threads of a worker on a CPU, when the study began; 0 if not known yet, or if it runs on accelerators."""
        return next((row["threads"] for row in self.rows if row.get("threads")), 0)

    def ask(self) -> OpenTrial | None:
        """A configuration that no trial had yet, interrupted and known ones first; None when none is left."""
        while self._interrupted:
            frozen = self._interrupted.popleft()
            trial = self._reopened(frozen)
            if open_trial := self._hand_out(trial, Suggestion(self.space.complete(frozen.params))):
                return open_trial
        while len(self._seen) < self._size:
            if open_trial := self._hand_out(None, self._next()):
                return open_trial
        return None

    def _next(self) -> Suggestion:
        while self._known:
            params = dict(self._known.popleft())
            if self._identity(params) not in self._seen:
                return Suggestion(params)
        if self._sampler.kind == "grid":
            return Suggestion(self._first_unseen())
        suggestion = self._sampler.suggest(len(self._open))
        if self._identity(suggestion.params) in self._seen:
            suggestion = replace(suggestion, params=self._unseen_near(suggestion.params))
        return suggestion

    def died(self, number: int) -> int:
        """Notes that a worker ended on an open trial. Returns how many have, in all starts of the sweep."""
        trial, *_ = self._open[number]
        deaths = int(trial.user_attrs.get(_DEATHS, 0)) + 1
        trial.set_user_attr(_DEATHS, deaths)
        return deaths

    def tell(self, number: int, row: Row) -> Row:
        """Finishes a trial with its table row. Returns the row as it is kept: `feasible` by the space's constraints,
        `violated` naming those it breaks, and failed if an objective is not a finite number."""
        trial, open_trial, suggestion = self._open.pop(number)
        row = self._judged(row)
        with self._backend.together():
            trial.set_user_attr(_ROW, row.to_json())
            self._finish(trial, row)
        self.rows.append(row)
        complete = row["state"] == "complete"
        self._sampler.learn(suggestion, self._result(open_trial.params, row) if complete else None)
        return row

    def _result(self, params: dict[str, Value], row: Row) -> Result:
        return Result(params, self._times.with_time(row))

    def _judged(self, row: Row) -> Row:
        if row["state"] != "complete":
            return row
        for objective in map(told_name, self.space.objectives):
            value = row.get(objective)
            if not isinstance(value, int | float) or not math.isfinite(value):
                return row | {"state": "failed", "feasible": False, "reason": f"{objective} is {value}"}
        self._times.add(row)
        return row | judged(self._times.with_time(row), self.space.constraints)

    def _finish(self, trial: Trial, row: Row) -> None:
        if row["state"] != "complete":
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            return
        timed = self._times.with_time(row)
        for constraint in self.space.constraints:
            trial.set_constraint(str(constraint), constraint.excess(timed))
        values = [float(row[told_name(objective)]) for objective in self.space.objectives]
        self._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, values)

    def _hand_out(self, trial: Trial | None, suggestion: Suggestion) -> OpenTrial | None:
        """The configuration as a trial, new unless given; None if no window is left for it under the cap."""
        params = suggestion.params
        self._seen.add(self._identity(params))
        try:
            spec = TrialSpec(configuration_of(params, self.space, self.cap))
        except UsageError as error:
            self._skip(trial, params, str(error))
            self._sampler.learn(suggestion, None)
            return None
        trial = trial or self._created(params, TrialState.RUNNING)
        open_trial = OpenTrial(trial.number, params, spec)
        self._open[trial.number] = (trial, open_trial, suggestion)
        return open_trial

    def _skip(self, trial: Trial | None, params: dict[str, Value], reason: str) -> None:
        if trial is None:
            self._created(params, TrialState.FAIL, {_SKIPPED: reason})
        else:
            trial.set_user_attr(_SKIPPED, reason)
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _created(self, params: dict[str, Value], state: TrialState, attributes: dict[str, str] | None = None) -> Trial:
        """In one line of the journal: all of it is there after a kill, or none."""
        chosen: dict[str, Value] = {}
        distributions: dict[str, BaseDistribution] = {}

        def take(name: str, choices: tuple[Value, ...]) -> Value:
            chosen[name] = params[name]
            distributions[name] = CategoricalDistribution(choices)
            return params[name]

        self.space.draw(take)
        template = create_trial(state=state, params=chosen, distributions=distributions, user_attrs=attributes)
        return self._trial(self._storage.create_new_trial(self._study._study_id, template))

    def _reopened(self, frozen: FrozenTrial) -> Trial:
        return self._trial(frozen._trial_id)

    def _trial(self, trial_id: int) -> Trial:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that trials are meant to come from `Study.ask`
            return Trial(self._study, trial_id)

    def _unseen_near(self, params: dict[str, Value]) -> dict[str, Value]:
        """An untried configuration with values close by in the order of the choices, or else the first there is."""
        free = [name for name, choices in self.space.parameters.items() if len(choices) > 1]
        reach, longest = 1, max(len(choices) for choices in self.space.parameters.values())
        while reach < 2 * longest:
            for _ in range(_NEIGHBOURS):
                near = dict(params)
                for name in self._random.sample(free, self._random.randint(1, len(free))):
                    near[name] = self._shifted(name, params[name], self._random.randint(-reach, reach))
                near = self._fitted(near)
                if self._identity(near) not in self._seen:
                    return near
            reach *= 2
        return self._first_unseen()

    def _first_unseen(self) -> dict[str, Value]:
        """In the order of the space; what was passed over is never looked at again."""
        return next(point for point in self._points if self._identity(point) not in self._seen)

    def _shifted(self, name: str, value: Value, by: int) -> Value:
        choices = self.space.parameters[name]
        if value not in choices:  # it does not exist there
            return value
        return choices[min(max(choices.index(value) + by, 0), len(choices) - 1)]

    def _fitted(self, params: dict[str, Value]) -> dict[str, Value]:
        """The nearest configuration there is: what begins to exist, by a change elsewhere, gets any of its values."""
        return self.space.draw(
            lambda name, choices: params[name] if params[name] in choices else self._random.choice(choices)
        )

    def _identity(self, params: dict[str, Value]) -> tuple[Value, ...]:
        return tuple(params[name] for name in self.space.parameters)


def _row(trial: FrozenTrial) -> Row:
    return Row.from_json(trial.user_attrs[_ROW], f"trial {trial.number} of the journal")


class _Journal(JournalFileBackend):  # type: ignore[misc]
    """Optuna's journal file, flushed to the disk with every write; writes that belong together go in one."""

    _held: list[dict[str, object]] | None = None

    def append_logs(self, logs: list[dict[str, object]]) -> None:
        if self._held is not None:
            self._held += logs
        else:
            super().append_logs(logs)

    @contextmanager
    def together(self) -> Iterator[None]:
        self._held = []
        try:
            yield
            held, self._held = self._held, None
            super().append_logs(held)
        finally:
            self._held = None


def _mend(journal: Path) -> None:
    """Cuts a line torn by a kill in mid-write, and removes the lock such a process left: we hold the study's own."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        content = journal.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)
