"""The study: Optuna's ask and tell over a search space, in a journal on disk that survives being killed.

A finished trial carries its table row as a user attribute, so the journal alone can rebuild tables and MLflow. A trial
that was running when the driver died is still RUNNING in the journal: it is handed out again, under its number.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from search_spaces import OBJECTIVES, SearchSpace
from streamllm.errors import UsageError
from streamllm.methods import check_execution
from streamllm.policy import EvictionPolicy, PolicyError, with_derived_window

from .trial import TrialSpec

_DUPLICATES_IN_A_ROW = 5
_ROW = "row"
_SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class OpenTrial:
    """A trial that was asked for and not told yet."""

    number: int
    params: dict[str, Any]
    spec: TrialSpec


class Study:
    def __init__(self, name: str, journal: Path, space: SearchSpace, cap: int, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _mend(journal)
        self.space = space
        self.cap = cap
        self._random = random.Random(seed)
        self._distributions = {name: CategoricalDistribution(list(c)) for name, c in space.parameters.items()}
        self._study = optuna.create_study(
            study_name=name,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True),
            directions=[OBJECTIVES[objective] for objective in space.objectives],  # type: ignore[misc]
            load_if_exists=True,
        )
        trials = self._study.get_trials(deepcopy=False)
        self.rows: list[dict[str, Any]] = [trial.user_attrs[_ROW] for trial in trials if _ROW in trial.user_attrs]
        """The finished trials."""
        settled = [t for t in trials if t.user_attrs.keys() & {_ROW, _SKIPPED}]
        self._seen = {self._identity(t.params) for t in settled}
        self._interrupted = deque(t.number for t in trials if t.state == TrialState.RUNNING)
        self._trials: dict[int, Trial] = {}
        if not trials:
            for params in space.known:
                self._study.enqueue_trial(dict(params), skip_if_exists=True)

    def ask(self) -> OpenTrial | None:
        """A configuration that no trial had yet; None when the space holds no more of them."""
        while self._interrupted:
            open_trial = self._reopen(self._interrupted.popleft())
            if open_trial is not None:
                return open_trial
        duplicates = 0
        while len(self._seen) < self.space.size:
            if duplicates == _DUPLICATES_IN_A_ROW:
                self._study.enqueue_trial(self._unseen())
                duplicates = 0
            open_trial = self._open(self._study.ask(self._distributions))
            if open_trial is not None:
                return open_trial
            duplicates += 1
        return None

    def tell(self, number: int, row: dict[str, Any]) -> None:
        """Finishes a trial with its table row: its state, complete or failed, and the objectives."""
        trial = self._trials.pop(number)
        trial.set_user_attr(_ROW, row)
        if row["state"] == "complete":
            self._study.tell(trial, [row[objective] for objective in self.space.objectives])
        else:
            self._study.tell(trial, state=TrialState.FAIL)
        self.rows.append(row)

    def _open(self, trial: Trial) -> OpenTrial | None:
        """The trial, unless it repeats one or no window is left for it under the cap."""
        identity = self._identity(trial.params)
        if identity in self._seen:
            self._skip(trial, "a repetition")
            return None
        self._seen.add(identity)
        try:
            spec = spec_of(trial.params, self.space, self.cap)
        except UsageError as error:
            self._skip(trial, str(error))
            return None
        self._trials[trial.number] = trial
        return OpenTrial(trial.number, trial.params, spec)

    def _skip(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr(_SKIPPED, reason)
        self._study.tell(trial, state=TrialState.FAIL)

    def _reopen(self, number: int) -> OpenTrial | None:
        frozen = self._study.get_trials(deepcopy=False)[number]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = Trial(self._study, frozen._trial_id)
        if self._distributions.keys() != trial.params.keys():  # killed in the middle of ask
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        return self._open(trial)

    def _unseen(self) -> dict[str, Any]:
        while True:
            params = {name: self._random.choice(choices) for name, choices in self.space.parameters.items()}
            if self._identity(params) not in self._seen:
                return params

    def _identity(self, params: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(params[name] for name in self.space.parameters)


def spec_of(params: dict[str, Any], space: SearchSpace, cap: int) -> TrialSpec:
    """The trial that a point of the space stands for; its window is what the cap leaves."""
    knobs = {name: params[name] for name in ("n_sink", "compress_every", "cache_slack", "max_drop")}
    policy = with_derived_window(EvictionPolicy(**knobs), cap, space.cap_accounting)
    check_execution(params["method"], params["execution"])
    return TrialSpec(params["method"], params["attn_backend"], policy, params["execution"])


def check_cap(space: SearchSpace, cap: int) -> None:
    """Raises PolicyError if the cap leaves some point of the space no window."""
    widest = {name: max(int(x) for x in space.parameters[name]) for name in ("n_sink", "cache_slack")}
    try:
        with_derived_window(EvictionPolicy(**widest), cap)
    except PolicyError as error:
        raise PolicyError(f"space {space.name!r}: {error}") from error


def _mend(journal: Path) -> None:
    """Cuts a line torn by a kill in mid-write, and removes the lock such a process left: we hold the study's own."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        content = journal.read_bytes()
        if not content.endswith(b"\n"):
            journal.write_bytes(content[: content.rfind(b"\n") + 1])
