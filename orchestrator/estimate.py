"""A sweep's cost, before anything has run: the driver's steps, at the pace of a few layers of the model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import TYPE_CHECKING

from streamllm.errors import UsageError
from streamllm.measuring.energy import LEAST_SEC
from streamllm.measuring.first_token import WARMUP
from streamllm.measuring.pairing import FEWEST_PAIRS, seconds_of_pairs
from streamllm.measuring.plans import more_for
from streamllm.measuring.sample import LEAST_TOKENS, MOST_TOKENS
from streamllm.measuring.timing import LONGEST_SEGMENT_SEC, WARMUP_TOKENS, segment_tokens
from streamllm.policy import EvictionPolicy, steady_state, strict_policy
from streamllm.results.schema import Row
from streamllm.terminal.progress import spoken

from .search.points import configuration_of

if TYPE_CHECKING:
    from streamllm.measuring.pace import Pace

    from .configuration import SweepConfiguration

_CANDIDATES = 7
"""Candidates in a round of confirming, on average: on a front and near it."""
_AGAIN = 0.9
"""Time of a round's timing over the search's, which has the attention's share besides."""
_START_SEC, _END_SEC = 25.0, 15.0
"""Ray and its workers, the model, the checks; tables, figures, MLflow."""
_SLOWER = 1.2
"""Time of a method over the reference's, on average."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds."""

    losses: float
    """For one trial, on one worker."""
    timing: float
    """For one trial; trials are timed one at a time."""
    baseline: float
    confirming: float
    trials: int
    workers: int
    source: str

    @property
    def trial(self) -> float:
        return self.timing + self.losses / self.workers

    @property
    def seconds(self) -> float:
        return _START_SEC + self.trials * self.trial + self.baseline + self.confirming + _END_SEC

    def __str__(self) -> str:
        return (
            f"about {spoken(self.seconds)}: {self.trials} trials of {spoken(self.losses)} for their losses, "
            f"{self.workers} at a time, and {spoken(self.timing)} of timing, one at a time; "
            f"{spoken(self.baseline)} for the baseline, {spoken(self.confirming)} for confirming, if it is of "
            f"{_CANDIDATES} candidates ({self.source})"
        )


def estimate(
    pace: Pace,
    n_tokens: int,
    configuration: SweepConfiguration,
    workers: int,
    like: Sequence[Row],
) -> Estimate:
    """workers: how many there will be.
    like: trials that were measured alike, which are believed more than the pace is."""
    trials = configuration.trials
    policies = _policies(configuration)
    losses = pace.losses(n_tokens) * len(set(policies)) / len(policies)
    timing = fmean(timing_sec(pace, policy) for policy in policies) + _more_sec(pace, configuration)
    source = "a few layers of this shape were run"
    if like:
        losses, timing = (median(row[name] for row in like) for name in ("quality_sec", "speed_sec"))
        source = f"medians of {len(like)} trials"
    window = pace.window()
    sample = _sample_sec(configuration, n_tokens, window, trials * (timing + losses / workers))
    baseline_timing = _baseline_timing_sec(window)
    return Estimate(
        losses=losses,
        timing=timing,
        baseline=baseline_timing + (pace.losses(n_tokens) + sample) / workers,
        confirming=configuration.confirm.rounds * (_CANDIDATES * _AGAIN * timing + baseline_timing),
        trials=trials,
        workers=workers,
        source=source,
    )


def timing_sec(pace: Pace, policy: EvictionPolicy) -> float:
    """Seconds for one configuration beside the reference: finding its kernel, filling and warming it, pairs,
    attention."""
    token = _SLOWER * pace.token_sec
    steady = steady_state(policy)
    cycle, start = (steady.cycle, steady.start) if steady is not None else (1, policy.kept)
    growing = max(start - policy.kept + 1, 0)
    warm = cycle * math.ceil(min(WARMUP_TOKENS, max(LONGEST_SEGMENT_SEC / token, 1)) / cycle)
    tokens = 3 * growing + min(cycle, 256) + 3 * warm + cycle
    segment = segment_tokens(token, cycle) * token
    return 3 * pace.losses(policy.kept) + tokens * token + seconds_of_pairs(segment)


def _baseline_timing_sec(window: float) -> float:
    """Seconds for re-computation beside the reference, a window a token: finding its kernel, warming it, pairs."""
    warm = math.ceil(min(WARMUP_TOKENS, max(LONGEST_SEGMENT_SEC / window, 1)))
    return (1 + 3 * warm) * window + seconds_of_pairs(segment_tokens(window, 1) * window)


def _more_sec(pace: Pace, configuration: SweepConfiguration) -> float:
    """Seconds for what else is measured of one configuration, where the space asks for it."""
    prompt = pace.losses(configuration.identity.cap)
    each = {
        "first_token": 2 * WARMUP * prompt + seconds_of_pairs(prompt),
        "energy": 2 * FEWEST_PAIRS * LEAST_SEC,
    }
    return sum(each[kind] for kind in more_for(configuration.identity.space.measures))


def _sample_sec(configuration: SweepConfiguration, n_tokens: int, window: float, trials_sec: float) -> float:
    wanted = configuration.search.baseline_tokens
    if wanted is not None:
        return min(wanted or n_tokens, n_tokens) * window
    return min(max(LEAST_TOKENS * window, trials_sec / 3), MOST_TOKENS * window)


def _policies(configuration: SweepConfiguration) -> list[EvictionPolicy]:
    """Such as the search will try: those known first, then any of the space."""
    space, cap, chance = configuration.identity.space, configuration.identity.cap, random.Random(0)
    drawn = [dict(known) for known in space.known[: configuration.trials]]
    while len(drawn) < min(configuration.trials, 100):
        drawn.append(space.draw(lambda _, choices: chance.choice(choices)))
    policies = []
    for params in drawn:
        try:
            policy = configuration_of(params, space, cap).policy
        except UsageError:
            continue
        policies.append(
            replace(policy, layer_budgets="uniform")
        )  # nobody has loaded the model: as if all were the mean
    return policies or [strict_policy(cap)]
