"""When the baseline's sample grows while a sweep runs: beside the trials, within a share of the workers' time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamllm.measuring.sample import BATCH, LEAST_TOKENS, MOST_TOKENS, is_precise

if TYPE_CHECKING:
    import numpy as np

_SHARE = 0.25
"""Share of the time that workers have measured."""


@dataclass(slots=True)
class BaselineSample:
    """Hears of everything that was measured, and says whether the sample is to grow next."""

    wanted: int | None = None
    """Tokens; 0: all; None: until it is precise, within the share of the time, from `LEAST_TOKENS` to `MOST_TOKENS`."""
    tokens: int = 0
    is_whole: bool = False
    """It covers all tokens, or cannot grow."""
    _is_precise: bool = False
    _on_it: float = 0.0
    _on_all: float = 0.0

    @property
    def least(self) -> int:
        return LEAST_TOKENS if self.wanted is None else self.wanted

    @property
    def next_batches(self) -> int:
        """How many it grows by next; a large sample by an eighth, as each time it is compared as a whole."""
        return max(self.tokens // 8 // BATCH, 1)

    def spent(self, seconds: float, on_it: bool) -> None:
        """Counts a worker's time."""
        self._on_all += seconds
        self._on_it += seconds * on_it

    def measured(self, losses: np.ndarray, reference: np.ndarray) -> None:
        """losses: the sample's; reference: those of strict StreamingLLM, of all tokens."""
        self.tokens = len(losses)
        self.is_whole = self.tokens == len(reference)
        self._is_precise = is_precise(reference, losses)

    def is_short(self) -> bool:
        """Whether a sweep that has nothing else to do should still wait for it."""
        return not self.is_whole and (self.wanted == 0 or self.tokens < self.least)

    def is_due(self) -> bool:
        """Whether it is its turn beside trials."""
        if self.is_whole or not self._on_all or self._on_it > _SHARE * self._on_all:
            return False
        improves = self.wanted is None and self.tokens < MOST_TOKENS and not self._is_precise
        return self.is_short() or improves
