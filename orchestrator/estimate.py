"""What a sweep will take, before anything has run: what the driver does, at the pace of a few layers of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from streamllm.progress import spoken
from streamllm.sample import LEAST_TOKENS, MOST_TOKENS

if TYPE_CHECKING:
    from streamllm.pace import Pace

    from .configuration import SweepConfiguration

_CANDIDATES = 6
"""Of a front, and near it."""
_START_SEC, _END_SEC = 25.0, 15.0
"""Ray and its workers, the model, the checks; tables, figures, MLflow."""
_SLOWER = 1.3
"""Than the reference, a method on average."""
_PAIRS_SEC = 6.0
_FEWEST_PAIRS = 7
_WARM_UP_TOKENS = 60
"""Of a timing: to find the kernel, to warm up, to time attention."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds."""

    losses: float
    """Of one trial, on one worker."""
    timing: float
    """Of one trial; one at a time."""
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
            f"{spoken(self.baseline)} for the baseline, {spoken(self.confirming)} for confirming ({self.source})"
        )


def estimate(
    pace: Pace,
    n_tokens: int,
    configuration: SweepConfiguration,
    workers: int,
    rounds: int,
    like: Sequence[dict[str, Any]],
) -> Estimate:
    """like: trials that were measured alike, which are believed more than the pace is."""
    trials, sampled = configuration.trials, configuration.baseline_tokens
    prefill = pace.losses(pace.total)
    token, window = _SLOWER * pace.token_sec, pace.window()
    timing = 3 * prefill + _WARM_UP_TOKENS * token + max(_PAIRS_SEC, 2 * _FEWEST_PAIRS * token)
    losses = pace.losses(n_tokens)
    source = "a few layers of this shape were run"
    if like:
        losses, timing = (median(row[name] for row in like) for name in ("quality_sec", "speed_sec"))
        source = f"medians of {len(like)} trials"
    baseline_timing = (_FEWEST_PAIRS + 6) * window + _FEWEST_PAIRS
    share = trials * (timing + losses / workers) / 3
    most = MOST_TOKENS if sampled is None else sampled or n_tokens
    least = LEAST_TOKENS if sampled is None else most
    sample = min(max(least * window, share), most * window) if n_tokens > pace.total else window
    again = prefill + _WARM_UP_TOKENS / 2 * token + _PAIRS_SEC
    return Estimate(
        losses=losses,
        timing=timing,
        baseline=losses / workers + baseline_timing + sample / workers,
        confirming=rounds * (_CANDIDATES * again + baseline_timing),
        trials=trials,
        workers=workers,
        source=source,
    )
