"""What is expected of configurations that were not measured, and how surely: Gaussian processes over features that say
what a configuration does, not what it is called."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from streamllm.configuration import Configuration
from streamllm.policy import EvictionPolicy, Schedule

_METHOD, _PRUNES = 3, 6
"""Places of a name, and of a number."""
_CYCLES = 4
_ENOUGH = 4
"""Measurements, before a kernel is chosen by them."""
_LEAST_NOISE = 1e-3
"""Standard deviation of a measurement in the model's units, whatever its interval says."""


def work_of(policy: EvictionPolicy) -> tuple[float, float, float]:
    """Of a full cache, on average: keys that a query attends to, tokens after which something is evicted, tokens that
    are evicted at once where something is."""
    more, prunes, at_once = _cycle(policy.compress_every, policy.cache_slack, policy.max_drop)
    return policy.kept + more, prunes, at_once


@cache
def _cycle(compress_every: int, cache_slack: int, max_drop: int) -> tuple[float, float, float]:
    """The same, with the keys beyond sinks and window: it does not depend on those."""
    if not compress_every:
        return 0.0, 0.0, 0.0
    schedule = Schedule(
        EvictionPolicy(
            n_sink=0, window_size=1, compress_every=compress_every, cache_slack=cache_slack, max_drop=max_drop
        )
    )
    span = _CYCLES * max(compress_every, cache_slack)
    for _ in range(span):
        schedule.after_token()
    keys = prunes = dropped = 0
    for _ in range(span):
        keys += schedule.held
        drop = schedule.after_token()
        prunes += drop > 0
        dropped += drop
    return keys / span, prunes / span, dropped / max(prunes, 1)


def plainest(policy: EvictionPolicy) -> EvictionPolicy:
    """The same evictions by fewer knobs: without a `max_drop` that never holds anything back."""
    _, _, at_once = work_of(replace(policy, max_drop=0))
    return replace(policy.canonical, max_drop=0) if policy.max_drop >= at_once else policy.canonical


def features(configurations: Sequence[Configuration], *, of_quality: bool = False) -> np.ndarray:
    """(n, d): numbers of policies on a scale where equal steps matter alike, and a column for each name of a method,
    backend, execution, number format or layer budgets that not all share; of_quality: without those that no prediction
    depends on."""
    numbers = np.array([_numbers(plainest(what.effective)) for what in configurations])
    names = [
        (what.quantization, what.policy.kv_dtype, what.policy.layer_budgets, what.method, what.backend, what.execution)
        for what in configurations
    ]
    columns = [numbers]
    for kind in range(_METHOD if of_quality else len(names[0])):
        known = sorted({str(one[kind]) for one in names})
        if len(known) > 1:
            which = np.array([[str(one[kind]) == name for name in known] for one in names], dtype=float)
            columns.append(which)
            if kind == _METHOD:  # what a prune costs is each method's own
                columns.append(which * numbers[:, [_PRUNES]])
    together = np.concatenate(columns, axis=1)
    return together[:, np.ptp(together, axis=0) > 0]


def _numbers(policy: EvictionPolicy) -> tuple[float, ...]:
    keys, prunes, at_once = work_of(policy)
    return (
        math.log2(1 + policy.n_sink),
        math.log2(policy.compress_every or 2**16),
        math.log2(1 + policy.cache_slack),
        math.log2(1 + policy.max_drop),
        math.log2(keys),
        math.log2(1 + at_once),
        2 * prunes,
        float(policy.keeps_positions),
    )


class Quantity:
    """A number that every unit (a configuration, or a policy) has: what was measured of it, and what is expected of the
    others, by a Gaussian process (Rasmussen and Williams 2006, algorithm 2.1; scikit-learn's) of the number on a scale
    where it varies evenly."""

    def __init__(self, features: np.ndarray, *, is_ratio: bool, is_exact: bool) -> None:
        """features: (n, d) of all units. is_ratio: it is positive, and ratios matter; else small differences matter
        most where it is small. is_exact: what was measured is true."""
        self._features = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-9)
        self._is_ratio = is_ratio
        self._is_exact = is_exact
        self._measured: dict[int, tuple[float, float]] = {}
        self._kernel: object | None = None
        self._fitted_at = 0
        self._process: Any = None
        self._spread = self._scatter = 1.0
        self._expected: tuple[np.ndarray, np.ndarray] | None = None
        self._middle, self._scale = 0.0, 1.0

    @property
    def known(self) -> list[int]:
        return list(self._measured)

    def __len__(self) -> int:
        return len(self._features)

    def measurement(self, unit: int) -> float:
        return self._measured[unit][0]

    def measured(self, unit: int, value: float, noise: float = 0.0) -> None:
        """noise: relative standard deviation, of a ratio."""
        if self._is_ratio and value <= 0:
            return
        self._measured[unit] = value, noise
        self._expected = None

    def drawn(self, deviates: np.ndarray) -> np.ndarray:
        """deviates: (n, k), of each unit. Returns values that it may have."""
        mean, deviation = self.expected()
        return self._unwarped(mean[:, None] + deviation[:, None] * deviates)

    def drawn_together(self, units: Sequence[int], deviates: np.ndarray) -> np.ndarray:
        """deviates: (len(units), k), independent. Returns values that these may have at once: what is alike
        errs alike."""
        mean, deviation = self.expected()
        mean, chosen = mean[units], list(units)
        if self._process is None:
            return self._unwarped(mean[:, None] + deviation[chosen, None] * deviates)
        _, covariance = self._process.predict(self._features[chosen], return_cov=True)
        covariance = covariance * self._spread**2
        noise = self._process.kernel_.k2.noise_level * self._spread**2
        free = [place for place, unit in enumerate(chosen) if not (self._is_exact and unit in self._measured)]
        errors = np.zeros_like(deviates)
        block = covariance[np.ix_(free, free)] - noise * np.eye(len(free))
        values, vectors = np.linalg.eigh(block)
        errors[free] = vectors @ (np.sqrt(np.maximum(values, 0.0))[:, None] * deviates[free])
        return self._unwarped(mean[:, None] + errors)

    def interval(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) each: the most likely value, and the ends of 95%."""
        mean, deviation = self.expected()
        return self._unwarped(mean), self._unwarped(mean - 1.96 * deviation), self._unwarped(mean + 1.96 * deviation)

    def left_out(self) -> dict[int, tuple[float, float, float]]:
        """Of each unit that was measured, what the others let expect of its measurement: value and ends of 95%."""
        self.expected()
        if self._process is None:
            return {}
        variance = _left_out_variance(self._process)
        values = self._warped(np.array([value for value, _ in self._measured.values()]))
        mean = values - self._scatter * self._process.alpha_ * variance
        deviation = self._spread * np.sqrt(variance)
        ends = (self._unwarped(mean + z * deviation) for z in (0.0, -1.96, 1.96))
        return dict(zip(self.known, zip(*(end.tolist() for end in ends), strict=True), strict=True))

    def explained(self) -> float:
        """The share of what was measured's variance, on the even scale, that the others let expect: 1 less the mean
        squared error of each prediction without it over the variance; 0 before anything is expected."""
        self.expected()
        if self._process is None:
            return 0.0
        errors = self._process.alpha_ * _left_out_variance(self._process)
        return max(0.0, 1.0 - float(np.mean(errors**2)))

    def middle(self) -> np.ndarray:
        """(n,): values, the most likely where they are not known."""
        return self._unwarped(self.expected()[0])

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each unit, on the even scale."""
        if self._expected is None:
            self._expected = self._fit()
        return self._expected

    def _fit(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self._features)
        units = self.known
        raw = np.array([self._measured[unit][0] for unit in units])
        if not self._is_ratio and len(raw):
            self._middle = float(np.median(raw))
            self._scale = max(float(np.median(np.abs(raw - self._middle))), 1e-9)
        values = self._warped(raw)
        if not len(values):
            return np.zeros(n), np.ones(n)
        middle, spread = float(values.mean()), float(values.std()) or 1.0
        noise = np.array([self._measured[unit][1] for unit in units]) / spread
        process = self._conditioned(self._features[units], (values - middle) / spread, np.maximum(noise, _LEAST_NOISE))
        mean, deviation = process.predict(self._features, return_std=True)
        deviation = np.sqrt(np.maximum(deviation**2 - process.kernel_.k2.noise_level, 1e-12))  # of the truth
        self._process, self._scatter, self._spread = process, spread, spread * _overconfidence(process)
        mean, deviation = middle + spread * mean, self._spread * deviation
        if self._is_exact:
            mean[units], deviation[units] = values, 0.0
        return mean, deviation

    def _conditioned(self, x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> Any:
        """Its kernel is chosen anew as there is a tenth more to go by."""
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        kernel = self._kernel or (
            ConstantKernel(1.0, (0.05, 20.0)) * Matern(np.full(x.shape[1], 2.0), (0.3, 3.0), nu=2.5)
            + WhiteKernel(1e-3, (1e-6, 0.3))
        )
        is_due = len(y) >= _ENOUGH and len(y) >= 1.1 * self._fitted_at
        process = GaussianProcessRegressor(kernel, alpha=noise**2, optimizer="fmin_l_bfgs_b" if is_due else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bounds that are reached, and of what does not converge
            process.fit(x, y)
        if is_due:
            self._kernel, self._fitted_at = process.kernel_, len(y)
        return process

    def _warped(self, values: np.ndarray) -> np.ndarray:
        return np.log(values) if self._is_ratio else np.arcsinh((values - self._middle) / self._scale)

    def _unwarped(self, values: np.ndarray) -> np.ndarray:
        return np.exp(values) if self._is_ratio else self._middle + self._scale * np.sinh(values)


def _overconfidence(process: Any) -> float:
    """By how much the measurements are further from what the others predict of them than the process thinks, at least
    1 (Rasmussen and Williams 2006, section 5.4.2: predictions of each without it, in closed form)."""
    errors = process.alpha_ * np.sqrt(_left_out_variance(process))
    return max(1.0, float(np.sqrt(np.mean(errors**2))))


def _left_out_variance(process: Any) -> np.ndarray:
    """(n,): of what the others let expect of each measurement, that one's noise included."""
    return 1.0 / np.diag(np.linalg.inv(process.L_ @ process.L_.T))
