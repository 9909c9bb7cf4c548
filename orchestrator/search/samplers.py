"""Which configuration to try next: Optuna's samplers, kept in memory over the front and the latest results.

What a suggestion costs therefore does not grow with the number of trials; the study on disk (`study`) keeps them all.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState, create_trial

from search_spaces import SearchSpace, Value
from streamllm.results.front import pareto_front
from streamllm.results.schema import OBJECTIVES, Row, told_name

from ..options import AUTO_FRONT_TRIALS, SAMPLERS

_POPULATION = 50
_HISTORY = 200


@dataclass(frozen=True, slots=True)
class Suggestion:
    params: dict[str, Value]
    trial: Trial | None = None
    """In the sampler's memory, where it is to know what is being measured."""
    only_quality: bool = False
    """It is not to be timed yet."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished trial as samplers see it."""

    params: dict[str, Value]
    row: Row


@dataclass(frozen=True, slots=True)
class Start:
    """The conditions that one of Optuna's samplers is made for."""

    seed: int
    conditional: bool
    """Some parameters exist with some values of others only."""
    in_flight: int


SamplerMaker = Callable[[Start], BaseSampler]
"""The type of function that an entry of `options.SAMPLERS` names."""


class Sampler(Protocol):
    """Says which configuration of a space to try next."""

    kind: str

    def suggest(self, in_flight: int, *, may_look: bool = False) -> Suggestion:
        """The next configuration, beside so many that are being measured; it may have been suggested before. may_look:
        whether a quality alone may be wanted."""
        ...

    def learn(self, suggestion: Suggestion, result: Result | None) -> None:
        """Takes in how a suggestion went (None: no result), or what was measured in its stead."""
        ...

    def looked(self, params: dict[str, Value], row: Row) -> None:
        """Takes in a quality that was wanted; nothing, if it could not be measured."""
        ...

    def chance_of(self, share: float) -> float | None:
        """How probable it is that measuring all the rest would add that share of the hypervolume, or more; None if
        nobody knows."""
        ...

    def expectations(self) -> list[dict[str, Any]]:
        """`FrontSampler.expectations`; none of those who expect nothing."""
        ...

    def effects(self) -> dict[str, dict[str, float]]:
        """`FrontSampler.effects`; none of those who expect nothing."""
        ...


def sampler_of(kind: str, space: SearchSpace, cap: int, seed: int, past: Sequence[Result] = ()) -> Sampler:
    """One of `options.SAMPLERS` over a space. past: everything finished so far, oldest first, what failed too."""
    if kind == "front":
        return FrontThenOthers(space, cap, seed, past)
    if kind == "auto":
        return FrontThenOthers(space, cap, seed, past, "nsga2", AUTO_FRONT_TRIALS)
    return OptunaSampler(kind, space, seed, _complete(past))


def _complete(past: Sequence[Result]) -> list[Result]:
    return [result for result in past if result.row["state"] == "complete"]


def tpe(start: Start) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=start.seed, multivariate=True, group=start.conditional, constant_liar=True)


def nsga2(start: Start) -> BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=start.seed, population_size=max(_POPULATION, start.in_flight))


def gp(start: Start) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=start.seed, deterministic_objective=False)


def qmc(start: Start) -> BaseSampler:
    return optuna.samplers.QMCSampler(seed=start.seed, scramble=True)


class FrontThenOthers:
    """`front` for a number of trials; then another, and for what `front` does not look at: configurations that do the
    same as others, whose policy could not be measured, or that were not drawn of a very large space."""

    kind = "front"

    def __init__(
        self,
        space: SearchSpace,
        cap: int,
        seed: int,
        past: Sequence[Result],
        others: str = "random",
        trials: float = math.inf,
    ) -> None:
        from .front_sampler import FrontSampler

        self._others = OptunaSampler(others, space, seed, _complete(past))
        self._front = FrontSampler(space, cap, seed + len(past))
        self._trials = trials
        self._suggested = len(past)
        for result in past if self._knows else ():
            self._take(result.params, result)

    @property
    def _knows(self) -> bool:
        """Whether `front` still says what comes next."""
        return self._suggested < self._trials

    def suggest(self, in_flight: int, *, may_look: bool = False) -> Suggestion:
        choice = self._front.next(may_look=may_look) if self._knows else None
        if choice is None:
            self._suggested += 1
            return self._others.suggest(in_flight)
        self._suggested += not choice.only_quality
        return Suggestion(choice.params, only_quality=choice.only_quality)

    def learn(self, suggestion: Suggestion, result: Result | None) -> None:
        if self._knows:
            self._take(suggestion.params, result)
        self._others.learn(suggestion, result)

    def looked(self, params: dict[str, Value], row: Row) -> None:
        self._front.known(params, row, only_quality=True)

    def chance_of(self, share: float) -> float | None:
        return self._front.chance_of(share) if self._knows else None

    def expectations(self) -> list[dict[str, Any]]:
        return self._front.expectations() if self._knows else []

    def effects(self) -> dict[str, dict[str, float]]:
        return self._front.effects() if self._knows else {}

    def _take(self, params: dict[str, Value], result: Result | None) -> None:
        if result is None or result.row["state"] != "complete":
            self._front.failed(params)
        else:
            self._front.known(result.params, result.row, only_quality=False)


class OptunaSampler:
    """One of `options.SAMPLERS` but grid over a space; `past` is everything complete so far, oldest first."""

    def __init__(self, kind: str, space: SearchSpace, seed: int, past: Sequence[Result] = ()) -> None:
        self.kind = kind
        self.space = space
        self._directions = {told_name(name): OBJECTIVES[name] for name in space.objectives}
        self._seed = seed + len(past)  # going on is no repetition
        self._random = random.Random(self._seed)
        self._in_flight = 0
        self._recent = list(past)
        self._ordered = {name: sorted(choices) for name, choices in space.parameters.items() if _is_number(choices)}
        self._maker = SAMPLERS[kind]
        if self._maker is not None:
            self._start(self._maker.get())

    def suggest(self, in_flight: int, *, may_look: bool = False) -> Suggestion:
        if self._maker is None:
            return Suggestion(self.space.draw(self._any))
        self._in_flight = in_flight
        if len(self._recent) >= 2 * self._history:
            self._start(self._maker.get())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is experimental in Optuna
            trial = self._study.ask()
            params = self.space.draw(lambda name, choices: self._suggest(trial, name, choices))
        if isinstance(self._study.sampler, optuna.samplers.TPESampler):
            return Suggestion(params, trial)
        self._generation = dict(self._study.tell(trial, state=TrialState.FAIL).system_attrs)
        return Suggestion(params)

    def looked(self, params: dict[str, Value], row: Row) -> None:
        pass  # it never wants to

    def chance_of(self, share: float) -> float | None:
        return None

    def expectations(self) -> list[dict[str, Any]]:
        return []

    def effects(self) -> dict[str, dict[str, float]]:
        return {}

    def learn(self, suggestion: Suggestion, result: Result | None) -> None:
        trial = suggestion.trial
        if trial is not None and trial.study is self._study:
            self._study.tell(trial, state=TrialState.FAIL)
        if result is not None and self._maker is not None:
            self._recent.append(result)
            self._add(result)

    def _start(self, make: SamplerMaker) -> None:
        """A fresh memory of the front and the latest results."""
        self._seed += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is experimental in Optuna
            sampler = make(Start(self._seed, bool(self.space.when), self._in_flight))
        self._study = optuna.create_study(sampler=sampler, directions=list(self._directions.values()))
        front = {id(row) for row in pareto_front([result.row for result in self._recent], self._directions)}
        old, latest = self._recent[: -self._history], self._recent[-self._history :]
        self._recent = [result for result in old if id(result.row) in front][-self._history // 2 :] + latest
        # The latest of the generations, as nsga2 calls them: whatever is measured counts towards it.
        self._generation = {optuna.samplers.NSGAIISampler._get_generation_key(): 0}
        for result in self._recent:
            self._add(result)

    @property
    def _history(self) -> int:
        """Results a memory starts with; at twice as many it is made anew."""
        return max(_HISTORY, 2 * self._in_flight)

    def _suggest(self, trial: Trial, name: str, choices: tuple[Value, ...]) -> Value:
        if name not in self._ordered:
            return trial.suggest_categorical(name, choices)
        return self._ordered[name][trial.suggest_int(name, 0, len(choices) - 1)]

    def _add(self, result: Result) -> None:
        params: dict[str, Value] = {}
        distributions: dict[str, BaseDistribution] = {}

        def take(name: str, choices: tuple[Value, ...]) -> Value:
            value = params[name] = result.params[name]
            if name in self._ordered:
                params[name] = self._ordered[name].index(value)
                distributions[name] = IntDistribution(0, len(choices) - 1)
            else:
                distributions[name] = CategoricalDistribution(choices)
            return value

        self.space.draw(take)
        self._study.add_trial(
            create_trial(
                params=params,
                distributions=distributions,
                values=[result.row[name] for name in self._directions],
                constraints={str(constraint): constraint.excess(result.row) for constraint in self.space.constraints},
                system_attrs=dict(self._generation),
            )
        )

    def _any(self, name: str, choices: tuple[Value, ...]) -> Value:
        return self._random.choice(choices)


def _is_number(choices: Iterable[Value]) -> bool:
    return all(isinstance(choice, int) for choice in choices)
