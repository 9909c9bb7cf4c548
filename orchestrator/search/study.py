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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from search_spaces import SearchSpace, Value, judged
from streamllm.errors import UsageError
from streamllm.files import write_atomically
from streamllm.measuring.reference_time import ReferencePool
from streamllm.results.checks import measured_row
from streamllm.results.damaged import DamagedError, all_told, keep_aside, read_lines
from streamllm.results.schema import OBJECTIVES, NewerFormatError, Row, told_name
from streamllm.results.schema import number as number_in
from streamllm.results.study_folder import SETTINGS, StudyFolder, rows_and_damage

from ..workers.messages import TrialSpec
from .journal import ROW, JournalFile, checked_line, cut_torn_line, digests, is_of, rebuilt, rows_in
from .points import configuration_of
from .samplers import Result, Sampler, Suggestion

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
        """Opens the study, or begins it; a journal that is damaged is made anew first, and that is said. Raises
        UsageError."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name = name
        self.space = space
        self.cap = cap
        self._random = random.Random(seed)
        self._size = space.size
        trials = self._opened(journal)
        self._times = ReferencePool(_row(trial) for trial in trials if ROW in trial.user_attrs)
        for trial in trials:
            if trial.state == TrialState.RUNNING and ROW in trial.user_attrs:  # killed in the middle of tell
                self._finish(self._reopened(trial), _row(trial))
        settled = [trial for trial in trials if trial.user_attrs.keys() & {ROW, _SKIPPED}]
        self.rows = [_row(trial) for trial in settled if ROW in trial.user_attrs]
        """The finished trials. Milliseconds are not in them: what those are in is known when all are measured."""
        self._seen = {self._identity(space.complete(trial.params)) for trial in settled}
        self._interrupted = deque(t for t in trials if t.state == TrialState.RUNNING and ROW not in t.user_attrs)
        self._known = deque(space.known)
        self._points = space.points()
        self._open: dict[int, tuple[Trial, OpenTrial, Suggestion]] = {}
        past = [self._result(space.complete(t.params), _row(t)) for t in settled if ROW in t.user_attrs]
        self._sampler = Sampler(sampler, space, seed, [result for result in past if result.row["state"] == "complete"])

    def _opened(self, journal: Path) -> list[FrozenTrial]:
        """Opens the journal, made anew if it is damaged, and returns its trials. Raises UsageError."""
        try:
            written, _ = rows_and_damage(StudyFolder(journal.parent).trials, measured_row)
        except NewerFormatError:  # so are the journal's, or it is damaged
            written = []
        told = {row.trial: row for row in written if isinstance(row.trial, int)}
        try:
            cut_torn_line(journal)
            trials = self._loaded(journal, told)
        except NewerFormatError:
            raise
        except Exception as error:  # Optuna raises anything of a journal that is damaged
            if isinstance(error, OSError) and not journal.is_dir() and not journal.is_symlink():
                raise UsageError(f"{journal}: cannot be used ({error.strerror}); make it writable") from None
            self._rebuild(journal, told, error)
            trials = self._loaded(journal, {})
        return trials

    def _loaded(self, journal: Path, told: Mapping[int, Row]) -> list[FrozenTrial]:
        """The trials of a new journal, or of one whose lines all mean something and that has the trials of these rows.
        Raises anything for another."""
        rows = rows_in(journal)
        _, wrong = read_lines(journal, checked_line)
        if wrong:
            raise DamagedError(all_told(wrong))
        self._backend = JournalFile(str(journal))
        self._storage = JournalStorage(self._backend)
        is_new = not journal.stat().st_size
        self._study = self._begun(self._storage, is_new)
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            self._check(journal, trial)
        ours = {digests(row) for row in rows.values()}
        finished = rows.keys() | {number for number, row in told.items() if not ours or digests(row) in ours}
        if lost := finished - {trial.number for trial in trials if ROW in trial.user_attrs}:
            raise DamagedError(f"{journal}: trial {min(lost)}, which had finished, is not in it")
        return trials

    def _begun(self, storage: JournalStorage, is_new: bool = True) -> optuna.Study:
        """Raises KeyError if it should be there, and is not."""
        sampler = optuna.samplers.RandomSampler()  # never asked: `samplers` suggests
        if is_new:
            directions = [OBJECTIVES[objective] for objective in self.space.objectives]
            optuna.create_study(study_name=self.name, storage=storage, sampler=sampler, directions=directions)
        study = optuna.load_study(study_name=self.name, storage=storage, sampler=sampler)
        if study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is experimental in Optuna
                study.set_metric_names([told_name(objective) for objective in self.space.objectives])
        return study

    def _check(self, journal: Path, trial: FrozenTrial) -> None:
        """Raises anything for a trial that cannot be."""
        has_row, deaths = ROW in trial.user_attrs, trial.user_attrs.get(_DEATHS, 0)
        if not has_row and _SKIPPED not in trial.user_attrs and trial.state != TrialState.RUNNING:
            return
        point = self.space.complete(trial.params)
        row = _row(trial) if has_row else None
        if not isinstance(deaths, int) or (row is not None and not self._is_result(trial.number, row, point)):
            raise DamagedError(f"{journal}: trial {trial.number} is not what was written")

    def _is_result(self, number: int, row: Row, point: dict[str, Value]) -> bool:
        return row.trial == number and self._is_told(row) and is_of(row, point, self.space, self.cap)

    def _is_told(self, row: Row) -> bool:
        """Whether it is a row as `tell` keeps it."""
        values = [number_in(row, told_name(objective)) for objective in self.space.objectives]
        return row.state == "failed" or (row.state == "complete" and None not in values)

    def _rebuild(self, journal: Path, told: Mapping[int, Row], error: Exception) -> None:
        """Makes the journal anew of what is readable in it and in `trials.jsonl`, keeps the damaged one aside, and says
        so. Raises UsageError."""
        rows = {number: row for number, row in {**rows_in(journal), **told}.items() if self._is_told(row)}
        lines, count = rebuilt(rows, self.space, self.cap, self._begun, self._template)
        why = str(error) if isinstance(error, DamagedError) else f"{journal}: Optuna cannot read it ({error!r:.200})"
        mended = journal.with_name(f".{journal.name}.mended")
        write_atomically(mended, lines)
        keep_aside(journal, [why], f"made anew with the {count} finished trials whose rows can be read")
        mended.replace(journal)

    def keep(self, settings: dict[str, object]) -> None:
        """Keeps a copy of what `sweep.json` says, from which that file can be made again."""
        if self._study.user_attrs.get(SETTINGS) != settings:
            self._study.set_user_attr(SETTINGS, settings)

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
            trial.set_user_attr(ROW, row.to_json())
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
        template = self._template(params, state, attributes)
        return self._trial(self._storage.create_new_trial(self._study._study_id, template))

    def _template(
        self,
        params: dict[str, Value],
        state: TrialState = TrialState.RUNNING,
        attributes: dict[str, str] | None = None,
    ) -> FrozenTrial:
        chosen: dict[str, Value] = {}
        distributions: dict[str, BaseDistribution] = {}

        def take(name: str, choices: tuple[Value, ...]) -> Value:
            chosen[name] = params[name]
            distributions[name] = CategoricalDistribution(choices)
            return params[name]

        self.space.draw(take)
        return create_trial(state=state, params=chosen, distributions=distributions, user_attrs=attributes)

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
    return Row.from_json(trial.user_attrs[ROW], f"trial {trial.number} of the journal")
