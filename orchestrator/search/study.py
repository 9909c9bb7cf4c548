"""The study: which configurations were tried, are running and come next, in a journal that survives being killed.

It is an Optuna study, in a journal on disk. A trial is one line when it is handed out and another few, written
together, when it is finished; its table row is a user attribute, so that the journal alone can rebuild tables and
MLflow. What was running when the driver died is handed out again, under its number.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from search_spaces import SearchSpace, Value
from streamllm.configuration import Configuration
from streamllm.errors import UsageError
from streamllm.measuring.reference_time import ReferencePool
from streamllm.results.constraint import judged
from streamllm.results.schema import Row, told_name
from streamllm.results.study_folder import SETTINGS

from .journal import DEATHS, ROW, SKIPPED, Journal, trial_of
from .points import configuration_of
from .samplers import Result, Suggestion, sampler_of

_NEIGHBOURS = 8
"""Neighbours tried at each distance, in place of a configuration that was tried already."""


@dataclass(frozen=True, slots=True)
class OpenTrial:
    """A trial that was asked for and not told yet."""

    number: int
    params: dict[str, Value]
    configuration: Configuration


@dataclass(frozen=True, slots=True)
class Look:
    """A configuration whose quality is to be known before it is decided what to time."""

    params: dict[str, Value]
    configuration: Configuration


class Study:
    def __init__(
        self, name: str, journal: Path, space: SearchSpace, cap: int, seed: int, sampler: str = "auto"
    ) -> None:
        """Opens the study, or begins it; a journal that is damaged is made anew first, and that is said. Raises
        UsageError."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name = name
        self.space = space
        self.cap = cap
        self._random = random.Random(seed)
        self._size = space.size
        opened = Journal(name, journal, space, cap).opened()
        self._file, self._storage, self._study = opened.file, opened.storage, opened.study
        rows, trials = opened.rows, opened.trials
        self._times = ReferencePool(rows.values())
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.number in rows:  # killed in the middle of tell
                self._finish(self._reopened(trial), rows[trial.number])
        settled = [trial for trial in trials if trial.user_attrs.keys() & {ROW, SKIPPED}]
        self.rows = [rows[trial.number] for trial in settled if trial.number in rows]
        """The finished trials. Milliseconds are not in them: what those are in is known when all are measured."""
        self._seen = {self._identity(space.complete(trial.params)) for trial in settled}
        self._interrupted = deque(t for t in trials if t.state == TrialState.RUNNING and t.number not in rows)
        self._known = deque(space.known)
        self._points = space.points()
        self._open: dict[int, tuple[Trial, OpenTrial, Suggestion]] = {}
        self._params = {t.number: space.complete(t.params) for t in settled if t.number in rows}
        past = [self._result(params, rows[number]) for number, params in self._params.items()]
        self._sampler = sampler_of(sampler, space, cap, seed, past)

    def keep(self, settings: dict[str, object]) -> None:
        """Keeps a copy of what `sweep.json` says, from which that file can be made again."""
        if self._study.user_attrs.get(SETTINGS) != settings:
            self._study.set_user_attr(SETTINGS, settings)

    @property
    def threads(self) -> int:
        """Threads of a worker on a CPU, when the study began; 0 if not known yet, or if it runs on accelerators."""
        return next((row["threads"] for row in self.rows if row.get("threads")), 0)

    def ask(self, *, may_look: bool = False) -> OpenTrial | Look | None:
        """A configuration that no trial had yet, interrupted and known ones first; None when none is left. may_look:
        whether a quality alone may be asked for, which is no trial."""
        while self._interrupted:
            frozen = self._interrupted.popleft()
            trial = self._reopened(frozen)
            if open_trial := self._hand_out(trial, Suggestion(self.space.complete(frozen.params))):
                return open_trial
        while len(self._seen) < self._size:
            suggestion = self._next(may_look)
            if suggestion.only_quality:
                return Look(suggestion.params, configuration_of(suggestion.params, self.space, self.cap))
            if open_trial := self._hand_out(None, suggestion):
                return open_trial
        return None

    def chance_of(self, share: float) -> float | None:
        """How probable it is that the configurations that were not timed would add that share of the hypervolume, or
        more; None if the sampler cannot tell."""
        return self._sampler.chance_of(share)

    def expectations(self) -> list[dict[str, Any]]:
        """What the sampler expects of what was measured, and of the best of the rest."""
        return self._sampler.expectations()

    def effects(self) -> dict[str, dict[str, float]]:
        """Objective -> knob -> what the knob by itself decides of it, where the sampler can tell."""
        return self._sampler.effects()

    def looked(self, look: Look, row: Row) -> None:
        """What was measured of it; nothing, if that failed."""
        self._sampler.looked(look.params, row)

    def _next(self, may_look: bool) -> Suggestion:
        while self._known:
            params = dict(self._known.popleft())
            if self._identity(params) not in self._seen:
                return Suggestion(params)
        if self._sampler.kind == "grid":
            return Suggestion(self._first_unseen())
        suggestion = self._sampler.suggest(len(self._open), may_look=may_look)
        if suggestion.only_quality:
            return suggestion
        if self._identity(suggestion.params) in self._seen:
            suggestion = replace(suggestion, params=self._unseen_near(suggestion.params))
        return suggestion

    def died(self, number: int) -> int:
        """Notes that a worker ended on an open trial. Returns how many have, in all starts of the sweep."""
        trial, *_ = self._open[number]
        deaths = int(trial.user_attrs.get(DEATHS, 0)) + 1
        trial.set_user_attr(DEATHS, deaths)
        return deaths

    def tell(self, number: int, row: Row) -> Row:
        """Finishes a trial with its table row. Returns the row as it is kept: `feasible` by the space's constraints,
        `violated` naming those it breaks, and failed if an objective is not a finite number."""
        trial, open_trial, suggestion = self._open.pop(number)
        row = self._judged(row)
        with self._file.together():
            trial.set_user_attr(ROW, row.to_json())
            self._finish(trial, row)
        self.rows.append(row)
        self._params[number] = open_trial.params
        complete = row["state"] == "complete"
        self._sampler.learn(suggestion, self._result(open_trial.params, row) if complete else None)
        return row

    def confirmed(self, rows: Iterable[Row]) -> None:
        """Takes in what is known better of finished trials that were timed again: what is left to find follows from
        it."""
        better = {row["trial"]: row for row in rows}
        for row in self.rows:
            if (known := better.get(row["trial"])) is not None:
                params = self._params[int(row["trial"])]
                self._sampler.learn(Suggestion(params), self._result(params, row | known))

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
            configuration = configuration_of(params, self.space, self.cap)
        except UsageError as error:
            self._skip(trial, params, str(error))
            self._sampler.learn(suggestion, None)
            return None
        trial = trial or self._created(params, TrialState.RUNNING)
        open_trial = OpenTrial(trial.number, params, configuration)
        self._open[trial.number] = (trial, open_trial, suggestion)
        return open_trial

    def _skip(self, trial: Trial | None, params: dict[str, Value], reason: str) -> None:
        if trial is None:
            self._created(params, TrialState.FAIL, {SKIPPED: reason})
        else:
            trial.set_user_attr(SKIPPED, reason)
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _created(self, params: dict[str, Value], state: TrialState, attributes: dict[str, str] | None = None) -> Trial:
        """In one line of the journal: all of it is there after a kill, or none."""
        trial = trial_of(params, self.space, state, attributes)
        return self._trial(self._storage.create_new_trial(self._study._study_id, trial))

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
