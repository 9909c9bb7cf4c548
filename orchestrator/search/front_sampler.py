"""The sampler made for this search: it times what is expected to move the front most.

Two things set speed-quality trade-offs apart from what general samplers are made for. Quality is exact, depends on the
policy alone and costs a fraction of a timing; so it is looked up before a timing is spent, and what cannot win by it is
never timed. And a time per token follows from little: method, kernel, how often is pruned, how many keys are attended
to. So a Gaussian process knows most of a space after few timings, and how surely it does (`surrogate`).

What comes next is what has the largest expected gain of hypervolume (Emmerich, Giannakoglou and Naujoks 2006) under
both uncertainties; if that hangs on a quality that is not known, the quality comes first.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from search_spaces import SearchSpace, Value
from streamllm.configuration import Configuration
from streamllm.engine.methods import sampled_losses
from streamllm.errors import UsageError
from streamllm.results.schema import OBJECTIVES, AnyRow, is_score, number, told_name

from .gain import Gain
from .points import configuration_of
from .surrogate import Quantity, features, plainest

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST = 20_000
"""Points that are looked at; of a larger space, so many drawn at random."""
_DRAWS = 32
"""Of a point's unknown values, to average over."""
_TAILS = 3
"""Degrees of freedom of a Student's t, by which unknown values are scattered in place of a normal distribution: a knob
that matters in one corner only makes policies that are far from all that the others let expect."""
_TOLD = 200
"""Configurations that were not timed, of which it is said what is expected."""
_EXPECTED = ("expected", "expected_low", "expected_high")
_WORLDS = 100
_CONTENDERS = 400
"""Points that may add something, for all of which it is drawn at once what they do."""
_FIRST_LOOKS = 8
"""Qualities, of policies far apart, before anything is timed."""
_FIRST = 4
"""Timings, far apart, before anything is expected."""
_WELL_MEASURED, _WELL_EXPLAINED = 12, 0.5
"""Measurements of an objective, and the share of their variance that the others let expect, before it is said what
decides it."""
_TIMED = (
    *("time_ratio", "tpot_ms", "speedup", "peak_memory_mb"),
    *("ttft_ratio", "ttft_ms", "energy_ratio", "joules_per_token"),
)
"""Measures that a configuration has to be timed for; others are of its policy, but for scores of tasks."""


def of_policy(metric: str) -> bool:
    """Whether all configurations of a policy share it, so that it is known without a timing."""
    return metric not in _TIMED and not is_score(metric)


@dataclass(frozen=True, slots=True)
class Choice:
    """What to measure next."""

    params: dict[str, Value]
    only_quality: bool


class Candidates:
    """The points of a space that can be measured, of those that do the same only the first; and which of them share a
    policy."""

    def __init__(self, space: SearchSpace, cap: int, seed: int) -> None:
        self.params: list[dict[str, Value]] = []
        self.configurations: list[Configuration] = []
        self._places: dict[tuple[Value, ...], int] = {}
        self.points: list[tuple[dict[str, Value], int]] = []
        """All of them, each with its place: that of the first one that does the same."""
        alike: dict[object, int] = {}
        for params in _points(space, seed):
            if (name := self._identity(params)) in self._places:
                continue
            try:
                what = configuration_of(params, space, cap)
            except UsageError:
                continue
            work = what.method, what.backend, what.execution, what.quantization, plainest(what.effective)
            self._places[name] = alike.setdefault(work, len(self.params))
            self.points.append((params, self._places[name]))
            if self._places[name] < len(self.params):
                continue
            self.params.append(params)
            self.configurations.append(what)
        first: dict[object, int] = {}
        self.policy = np.array([first.setdefault(_quality_key(w), len(first)) for w in self.configurations], dtype=int)
        """(n,): the number of each point's policy."""
        self.representatives = [int(np.argmax(self.policy == number)) for number in range(len(first))]

    def place(self, params: Mapping[str, Value]) -> int | None:
        return self._places.get(self._identity(params))

    @cached_property
    def features(self) -> np.ndarray:
        return features(self.configurations)

    @cached_property
    def policy_features(self) -> np.ndarray:
        return features([self.configurations[place] for place in self.representatives], of_quality=True)

    @staticmethod
    def _identity(params: Mapping[str, Value]) -> tuple[Value, ...]:
        return tuple(params[name] for name in sorted(params))


class FrontSampler:
    def __init__(self, space: SearchSpace, cap: int, seed: int) -> None:
        self.candidates = Candidates(space, cap, seed)
        self._constraints = space.constraints
        self._signs = {told_name(name): 1.0 if OBJECTIVES[name] == "minimize" else -1.0 for name in space.objectives}
        self._random = np.random.default_rng(seed)
        metrics = dict.fromkeys([*self._signs, *(constraint.metric for constraint in space.constraints)])
        self._quantities = {
            name: Quantity(
                self.candidates.policy_features if of_policy(name) else self.candidates.features,
                is_ratio=name in _TIMED,
                is_exact=of_policy(name),
            )
            for name in metrics
        }
        self._pending: dict[int, bool] = {}
        """Places of what is being measured; whether for its quality alone."""
        self._timed: set[int] = set()
        """Places of what was."""
        self._given_up: set[int] = set()
        """Places of what cannot be."""

    # -- what is known

    def known(self, params: Mapping[str, Value], row: AnyRow, *, only_quality: bool) -> None:
        """Takes in a finished trial, or a quality; where that could not be measured, nothing of its policy is asked for
        again."""
        place = self.candidates.place(params)
        if place is None:
            return
        self._pending.pop(place, None)
        if not only_quality:
            self._timed.add(place)
        elif not row:
            self._given_up.update(np.nonzero(self.candidates.policy == self.candidates.policy[place])[0].tolist())
        for name, quantity in self._quantities.items():
            value = number(row, name)
            if value is not None and (of_policy(name) or not only_quality):
                unit = int(self.candidates.policy[place]) if of_policy(name) else place
                quantity.measured(unit, value, _relative_noise(row, name, value))

    def failed(self, params: Mapping[str, Value]) -> None:
        """It is not asked for again."""
        if (place := self.candidates.place(params)) is not None:
            self._pending.pop(place, None)
            self._given_up.add(place)

    # -- what comes next

    def next(self, *, may_look: bool = True) -> Choice | None:
        """may_look: whether a quality alone can be measured now. None if everything has been, or is being, timed."""
        free = self._free()
        if not len(free):
            return None
        if may_look and (place := self._first_look()) is not None:
            return self._chosen(place, only_quality=True)
        if len(self._timed) + len(self._pending) < _FIRST:
            return self._chosen(self._far_from_all(self._promising(free)), only_quality=False)
        gains = self._gains()
        order = free[np.argsort(-gains[free], kind="stable")]
        known = self._known_policies()
        looked_at = {int(self.candidates.policy[place]) for place, only in self._pending.items() if only}
        for place in order:
            policy = int(self.candidates.policy[place])
            if policy in known or not may_look:
                return self._chosen(int(place), only_quality=False)
            if policy not in looked_at:
                return self._chosen(int(place), only_quality=True)
        return self._chosen(int(order[0]), only_quality=False)

    def expectations(self) -> list[dict[str, Any]]:
        """Of what was measured, and of the rest that may add most to the front, a row each: its knobs, every objective
        with the ends of 95% as far as they are not known for sure, the expected `gain`; and of what was timed, what was
        to be expected of it by all else (`expected`, `of` the first objective that takes a timing)."""
        if len(self._timed) < _FIRST:
            return []
        gains = self._gains()
        free = self._free()
        best = free[np.argsort(-gains[free], kind="stable")][:_TOLD].tolist()
        values = {name: self._quantities[name].interval() for name in self._signs}
        first = next((name for name in self._signs if not of_policy(name)), None)
        expected = {} if first is None else self._quantities[first].left_out()
        rows = []
        for place in [*sorted(self._timed), *best]:
            row = {name: value for name, value in self.candidates.params[place].items() if name != "total_kv"}
            row |= {"timed": place in self._timed, "gain": 0.0 if place in self._timed else float(gains[place])}
            for name, ends in values.items():
                unit = self.candidates.policy[place] if of_policy(name) else place
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), (float(end[unit]) for end in ends), strict=True))
            if place in expected and first is not None:
                measured = self._quantities[first].measurement(place)
                row |= {"of": first, "measured": measured, **dict(zip(_EXPECTED, expected[place], strict=True))}
            rows.append(row)
        return rows

    def effects(self) -> dict[str, dict[str, float]]:
        """Of each objective that is expected well: knob -> the share of its variance over the space that the knob
        accounts for by itself (the first-order index of Sobol 1993; all configurations count alike, whichever were
        measured), of the logarithm, where it is a factor."""
        if len(self._timed) < _FIRST:
            return {}
        places = np.array([place for _, place in self.candidates.points])
        found = {}
        for name in self._signs:
            quantity = self._quantities[name]
            if len(quantity.known) < _WELL_MEASURED or quantity.explained() < _WELL_EXPLAINED:
                continue
            values = _factors(name, self._of_all(name, quantity.middle()))[places]
            if (variance := float(values.var())) > 0:
                found[name] = {knob: share / variance for knob, share in self._between(values).items()}
        return found

    def _between(self, values: np.ndarray) -> dict[str, float]:
        """Of each knob with several choices, the variance of its choices' means; values: of all points."""
        shares = {}
        for knob in {knob: None for params, _ in self.candidates.points for knob in params}:
            groups: dict[Value | None, list[int]] = {}
            for index, (params, _) in enumerate(self.candidates.points):
                groups.setdefault(params.get(knob), []).append(index)
            if len(groups) > 1:
                distances = [(len(group), values[group].mean() - values.mean()) for group in groups.values()]
                shares[knob] = float(sum(n * distance**2 for n, distance in distances) / len(values))
        return shares

    def chance_of(self, share: float) -> float:
        """How probable it is that timing all the rest would add this share of the hypervolume, or more, to what the
        timed ones have. 1 before anything is expected."""
        timed, free = sorted(self._timed), self._free()
        if len(timed) < _FIRST:
            return 1.0
        if not len(free):
            return 0.0
        gains = self._gains()
        contenders = [int(place) for place in free[np.argsort(-gains[free])][:_CONTENDERS] if gains[place] > 0]
        if not contenders:
            return 1.0 if gains.min() < 0 else 0.0  # nothing that can be had is feasible, as far as is known
        places = [*timed, *contenders]
        values = {name: self._together(name, quantity, places) for name, quantity in self._quantities.items()}
        points = self._objectives(values)  # (n, k, m)
        reference = self._reference(points.mean(axis=1))
        if not np.all(np.isfinite(reference)):
            return 1.0
        volumes = [[_volume(points[:end, world], reference) for end in (len(timed), None)] for world in range(_WORLDS)]
        return float(np.mean([after > 0 and after - before >= share * before for before, after in volumes]))

    def _together(self, name: str, quantity: Quantity, places: list[int]) -> np.ndarray:
        """(len(places), k)"""
        units = self.candidates.policy[places] if of_policy(name) else np.array(places)
        once, where = np.unique(units, return_inverse=True)
        shape = len(once), _WORLDS
        # Times are as smooth as they are taken to be: with tails of theirs a search goes on, and finds nothing more.
        deviates = self._random.standard_t(_TAILS, shape) if of_policy(name) else self._random.standard_normal(shape)
        return quantity.drawn_together(once.tolist(), deviates)[where]

    def _chosen(self, place: int, *, only_quality: bool) -> Choice:
        self._pending[place] = only_quality
        return Choice(self.candidates.params[place], only_quality)

    def _free(self) -> np.ndarray:
        """Places that are not timed, nor being timed, and can be."""
        taken = self._timed | self._given_up | {place for place, only in self._pending.items() if not only}
        return np.array([place for place in range(len(self.candidates.params)) if place not in taken], dtype=int)

    def _known_policies(self) -> set[int]:
        of_policies = [quantity for name, quantity in self._quantities.items() if of_policy(name)]
        if not of_policies:
            return set(range(len(self.candidates.representatives)))
        return set.intersection(*(set(quantity.known) for quantity in of_policies))

    def _first_look(self) -> int | None:
        """A point of a policy far from those whose quality is known, or will be; None when those are enough."""
        places = [*self._pending, *self._timed, *self._given_up]
        known = self._known_policies() | {int(self.candidates.policy[place]) for place in places}
        unknown = np.array([policy for policy in range(len(self.candidates.representatives)) if policy not in known])
        if len(known) >= _FIRST_LOOKS or not len(unknown):
            return None
        return self.candidates.representatives[self._farthest(self.candidates.policy_features, unknown, sorted(known))]

    def _promising(self, free: np.ndarray) -> np.ndarray:
        """Those that are no worse than the middle, by all that is known without a timing; or all."""
        likely = self._objectives({name: self._of_all(name, q.middle()) for name, q in self._quantities.items()})
        columns = [place for place, name in enumerate(self._signs) if of_policy(name)]
        kept = free[np.all(likely[free][:, columns] <= np.median(likely[:, columns], axis=0), axis=1)]
        return kept if len(kept) else free

    def _far_from_all(self, free: np.ndarray) -> int:
        return self._farthest(self.candidates.features, free, [*self._timed, *self._pending])

    def _farthest(self, features: np.ndarray, free: np.ndarray, taken: list[int]) -> int:
        if not taken:
            return int(self._random.choice(free))
        features = features / np.maximum(np.ptp(features, axis=0), 1e-9)
        distances = ((features[free, None] - features[None, taken]) ** 2).sum(axis=-1).min(axis=1)
        return int(free[np.argmax(distances + 1e-9 * self._random.random(len(free)))])

    def _gains(self) -> np.ndarray:
        """(n,): the expected gain of timing each point, as a share of the hypervolume there is. What is being timed
        counts as what is expected of it."""
        likely = self._objectives({name: self._of_all(name, q.middle()) for name, q in self._quantities.items()})
        reference = self._reference(likely)
        if not np.all(np.isfinite(reference)):
            return -self._excess()
        timed = likely[[*self._timed, *(place for place, only in self._pending.items() if not only)]]
        gain = Gain(timed, reference)
        points = self._objectives(self._drawn())  # (n, k, m)
        n, k, m = points.shape
        worth = np.nonzero(np.all(points.min(axis=1) < reference, axis=1))[0]
        values = np.zeros(n)
        if not len(worth):
            return values
        values[worth] = gain.of(points[worth].reshape(-1, m)).reshape(-1, k).mean(axis=1)
        return values / (_volume(timed, reference) or 1.0)

    @staticmethod
    def _reference(points: np.ndarray) -> np.ndarray:
        """The middle of what there is: to be better than bad is no feat. (n, m) -> (m,)"""
        feasible = points[np.all(np.isfinite(points), axis=1)]
        return np.median(feasible, axis=0) if len(feasible) else np.full(points.shape[1], np.inf)

    def _excess(self) -> np.ndarray:
        """(n,): by how much each point is likely to violate constraints, in all."""
        total = np.zeros(len(self.candidates.params))
        for constraint in self._constraints:
            quantity = self._quantities[constraint.metric]
            excess = self._of_all(constraint.metric, quantity.middle()) - constraint.limit
            excess = np.maximum(excess if constraint.relation == "<=" else -excess, 0.0)
            total += excess / (excess.max(initial=0.0) or 1.0)
        return total

    def _drawn(self) -> dict[str, np.ndarray]:
        """metric -> (n, k): values that each point may have, in the k-th of as many worlds; each metric by itself."""
        from scipy.stats import t

        quantiles = t.ppf((np.arange(_DRAWS) + 0.5) / _DRAWS, _TAILS)
        return {
            name: self._of_all(name, q.drawn(np.broadcast_to(self._random.permutation(quantiles), (len(q), _DRAWS))))
            for name, q in self._quantities.items()
        }

    def _of_all(self, name: str, values: np.ndarray) -> np.ndarray:
        """Of points, from those of policies."""
        return values[self.candidates.policy] if of_policy(name) else values

    def _objectives(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """(..., m): to be minimised; infinite where a constraint is violated."""
        together = np.stack([sign * values[name] for name, sign in self._signs.items()], axis=-1)
        for constraint in self._constraints:
            excess = values[constraint.metric] - constraint.limit
            together[(excess if constraint.relation == "<=" else -excess) > 0] = np.inf
        return together


def _factors(name: str, values: np.ndarray) -> np.ndarray:
    """Their logarithms, where an objective says how many times something is taken."""
    if name in _TIMED:
        return np.log(values)
    return np.log1p(np.maximum(values, -99.0) / 100) if name.endswith("_percent") else values


def _points(space: SearchSpace, seed: int) -> Iterable[dict[str, Value]]:
    if space.size <= _MOST:
        return space.points()
    chance = random.Random(seed)
    return [space.draw(lambda _, choices: chance.choice(choices)) for _ in range(_MOST)]


def _volume(points: np.ndarray, reference: np.ndarray) -> float:
    """The hypervolume of (n, m) points."""
    import moocore

    inside = points[np.all(points < reference, axis=1)]
    return float(moocore.hypervolume(inside, ref=reference)) if len(inside) else 0.0


def _quality_key(what: Configuration) -> object:
    method = "" if sampled_losses(what.method) is None else what.method
    keys = "" if what.policy.kv_dtype == "auto" else what.keys
    return plainest(what.effective), what.quantization, method, keys


def _relative_noise(row: AnyRow, name: str, value: float) -> float:
    """Standard deviation, from the interval of 95%."""
    low, high = number(row, f"{name}_low"), number(row, f"{name}_high")
    return 0.0 if low is None or high is None else (high - low) / 3.92 / abs(value or 1.0)
