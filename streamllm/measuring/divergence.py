"""How far a policy's predictions are from a reference's, at fixed positions of a text: what perplexity, which looks at
the true token alone, does not see.

By the conventions of llama.cpp's perplexity tool: KL(reference || policy) in nats; how often both rank the same token
first; the root mean square of the change of the true token's probability. A reference's distributions are kept as
float16, so that they take a stated size. What is rounded are log-probabilities less their mean under the distribution:
numbers near 0 where the probability is, where float16 is finest. Read again and normalised, their divergence from what
they were is 1/2 Var(rounding), at most 4e-8 of the surprisal's variance: below 1e-6 wherever that is below 25 nats^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.device import float64_device
from .quality import mean_at, quantile_at, share_at
from .sample import BATCH, sample_positions
from .store import Arrays

MOST_POSITIONS = 1024
MOST_BYTES = 256 * 2**20
"""Of a reference's distributions on one text: 894 positions of a vocabulary of 150,000, of a smaller one all."""
VS_RECOMPUTE = "_vs_recompute"
_LEAST_FLOAT16 = -65504.0
_TAIL = 0.99
_ROWS = 8
"""Distributions computed with at a time: few enough for a CPU's caches."""


def fixed_positions(n_tokens: int, total: int, vocabulary: int) -> np.ndarray:
    """Ascending: where distributions are compared on a text, the first of the order in which re-computation by windows
    of `total` is sampled."""
    most = max(min(MOST_POSITIONS, MOST_BYTES // (2 * vocabulary)) // BATCH, 1) * BATCH
    places = sample_positions(n_tokens, total, most)
    return places if len(places) <= most else places[np.arange(most) * len(places) // most]


@dataclass(frozen=True, slots=True)
class Distributions:
    """A reference's predictions."""

    positions: np.ndarray
    """Ascending (n): after token positions[i], of token positions[i] + 1."""
    values: np.ndarray
    """float16 (n, vocabulary): log-probabilities, but for a constant in each row."""
    first: np.ndarray
    """(n): the most probable token. Of two that are rounded to the same, it cannot be told from the values."""
    true: np.ndarray
    """float64 (n): log-probability of the true token."""

    @classmethod
    def of(cls, parts: Sequence[Arrays]) -> Distributions:
        """Of a reference whose distributions are kept in these parts."""
        if len(parts) == 1:
            return cls(**{name: parts[0][name] for name in cls.__slots__})
        order = np.argsort(np.concatenate([part["positions"] for part in parts]))
        return cls(**{name: np.concatenate([part[name] for part in parts])[order] for name in cls.__slots__})

    @property
    def arrays(self) -> Arrays:
        return {name: getattr(self, name) for name in self.__slots__}

    def summary(self, n_losses: int) -> dict[str, Any]:
        return {}

    def from_itself(self) -> dict[str, Any]:
        """What the summary of its own divergences would be, but for rounding."""
        values = {"kl": 0.0, "kl_p99": 0.0, "same_top_percent": 100.0, "dp_rms_percent": 0.0}
        ends = {f"{name}{end}": value for name, value in values.items() for end in ("_low", "_high")}
        return values | ends | {"kl_positions": len(self.positions)}


@dataclass(frozen=True, slots=True)
class Divergences:
    """Of a policy's predictions from a reference's."""

    positions: np.ndarray
    """Ascending (n)."""
    kl: np.ndarray
    """float64 nats (n): KL(reference || policy)."""
    same: np.ndarray
    """bool (n): whether both have the same most probable token."""
    dp: np.ndarray
    """float64 (n): the true token's probability less the reference's."""
    reference: str = ""
    """Part of the names: empty of strict StreamingLLM."""

    @property
    def arrays(self) -> Arrays:
        return {f"{name}{self.reference}": getattr(self, name) for name in ("positions", "kl", "same", "dp")}

    def summary(self, n_losses: int) -> dict[str, Any]:
        """With 95% intervals: of the text's `n_losses` predictions, and of text of its kind."""
        known = self.positions, n_losses
        mean, same, square = mean_at(self.kl, *known), share_at(self.same, *known), mean_at(self.dp**2, *known)
        of = self.reference
        return {
            **replace(mean, low=np.maximum(mean.low, 0.0)).flat(f"kl{of}"),
            **quantile_at(_TAIL, self.kl, *known, name=f"kl{of}_p99"),
            **{f"same_top{of}_percent{end}": 100 * value for end, value in same.flat("").items()},
            **{f"dp_rms{of}_percent{end}": 100 * math.sqrt(max(x, 0.0)) for end, x in square.flat("").items()},
            f"kl{of}_positions": len(self.positions),
        }


class Keeping:
    """Makes a reference's distributions of the logits that pass by."""

    def __init__(self, positions: np.ndarray) -> None:
        self._positions = positions
        self._rows: list[np.ndarray] = []
        self._first: list[np.ndarray] = []

    def see(self, start: int, logits: Tensor) -> None:
        """logits (queries, vocabulary) after tokens start, start + 1, ...: each once, in order."""
        rows, _ = _rows_at(self._positions, start, logits)
        if rows is None:
            return
        self._rows.append(encoded(rows))
        self._first.append(rows.argmax(-1).cpu().numpy())

    def found(self, places: np.ndarray, losses: np.ndarray) -> Distributions:
        """losses (n): those of the same pass, at ascending `places`."""
        true = -losses[np.searchsorted(places, self._positions)]
        return Distributions(self._positions, np.concatenate(self._rows), np.concatenate(self._first), true)


class Comparing:
    """Compares the logits that pass by with a reference's distributions."""

    def __init__(self, reference: Distributions, name: str = "") -> None:
        """name: the reference's part of the names in what is `found`."""
        self._reference = reference
        self._name = name
        self._kl: list[np.ndarray] = []
        self._same: list[np.ndarray] = []

    def see(self, start: int, logits: Tensor) -> None:
        """As `Keeping.see`."""
        rows, which = _rows_at(self._reference.positions, start, logits)
        if rows is None:
            return
        self._kl.append(divergence(self._reference.values[which], rows))
        self._same.append(self._reference.first[which] == rows.argmax(-1).cpu().numpy())

    def found(self, places: np.ndarray, losses: np.ndarray) -> Divergences:
        """As `Keeping.found`."""
        positions, true = self._reference.positions, self._reference.true
        dp = np.exp(-losses[np.searchsorted(places, positions)]) - np.exp(true)
        return Divergences(positions, np.concatenate(self._kl), np.concatenate(self._same), dp, self._name)


def comparing(references: Sequence[Arrays]) -> list[Comparing]:
    """Compares with strict StreamingLLM, whose distributions come first, and with re-computation, if there are parts of
    its sample."""
    strict, *recomputed = references
    beside = [Comparing(Distributions.of(recomputed), VS_RECOMPUTE)] if recomputed else []
    return [Comparing(Distributions.of([strict])), *beside]


def encoded(logits: Tensor) -> np.ndarray:
    """logits (n, vocabulary) -> float16, of which `divergence` makes the distributions again."""
    found = []
    for rows in _exact(logits).split(_ROWS):
        logs = rows.log_softmax(-1)
        p = logs.exp()
        mean = torch.where(p > 0, p * logs, 0.0).sum(-1, keepdim=True)
        found.append((logs - mean).clamp(min=_LEAST_FLOAT16).half())
    return torch.cat(found).cpu().numpy()


def divergence(reference: np.ndarray, logits: Tensor) -> np.ndarray:
    """reference: n rows as `encoded` gives them; logits (n, vocabulary) -> KL(reference || softmax(logits)), nats (n),
    in float64.

    Element by element float32 is enough, and much faster; but what softmax is off by is off for all elements. So sums
    are in float64, and with P = sum p and Q = sum q, nearly 1, it is sum p log(p / q) / P - log P + log Q."""
    own = _exact(logits)
    theirs = torch.from_numpy(reference.copy()).to(own.device)
    found = []
    for kept, rows in zip(theirs.split(_ROWS), own.split(_ROWS), strict=True):
        log_p, log_q = kept.to(rows.dtype).log_softmax(-1), rows.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        total, other = (one.sum(-1, dtype=torch.float64) for one in (p, q))
        apart = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1, dtype=torch.float64)
        found.append(apart / total - total.log() + other.log())
    return torch.cat(found).cpu().numpy()


def _exact(logits: Tensor) -> Tensor:
    """In float32 or better, where there is float64 for sums."""
    return logits.to(float64_device(logits.device)).to(torch.promote_types(logits.dtype, torch.float32))


def _rows_at(positions: np.ndarray, start: int, logits: Tensor) -> tuple[Tensor | None, slice]:
    """The logits at those of the positions that are in the block, and which positions these are."""
    low, high = np.searchsorted(positions, (start, start + len(logits)))
    which = slice(int(low), int(high))
    if low == high:
        return None, which
    return logits[torch.from_numpy(positions[which] - start).to(logits.device)], which
