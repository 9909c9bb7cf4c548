"""Rotary position embedding (Su et al. 2021) as a function of position, composed from the model's own.

The engine decides positions: it calls models with `position_ids` of its choice, and rotates further itself. Position 0
makes the model's own rotation the identity, so that a state that needs raw keys simply asks for position 0.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnsupportedModelError(UsageError):
    """The engine cannot evaluate this model exactly; the message says why."""


class Rotary:
    """Rotates queries and keys by whole positions, from a table whose angles are computed in float64."""

    def __init__(self, model: PreTrainedModel) -> None:
        embedding = _rotary_embedding(model)
        self.interleaved = _is_interleaved(embedding)
        self._frequencies: Tensor = embedding.inv_freq.to(model.device, torch.float64)
        # Half-precision sines would add an error of their own at every re-rotation.
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        self._cos = self._sin = torch.empty(0)
        self._extend(512)

    def _extend(self, length: int) -> None:
        positions = torch.arange(length, device=self._frequencies.device, dtype=torch.float64)
        angles = torch.outer(positions, self._frequencies)
        angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), -1)
        self._cos, self._sin = angles.cos().to(self._dtype), angles.sin().to(self._dtype)

    def reserve(self, length: int) -> None:
        """Grows the table to positions 0 .. length-1; `at` and `span` expect them to be there."""
        if length > len(self._cos):
            self._extend(max(length, 2 * len(self._cos)))

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (n, rotary size) for a tensor of positions (n)."""
        return self._cos[positions], self._sin[positions]

    def span(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """cos and sin (stop - start, rotary size) of consecutive positions, without a copy."""
        self.reserve(stop)
        return self._cos[start:stop], self._sin[start:stop]

    def backwards(self, distance: int) -> tuple[Tensor, Tensor]:
        """cos and sin (1, rotary size) that turn vectors back by `distance` positions."""
        cos, sin = self.span(distance, distance + 1)
        return cos, -sin

    def rotate(self, vectors: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """vectors (..., n, head size) turned by the angles of `at`, `span` or `backwards`; dims past the rotary size,
        where a model rotates only a part, stay as they are."""
        cos, sin = angles
        size = cos.shape[-1]
        turning, fixed = vectors[..., :size], vectors[..., size:]
        turned = (turning * cos + self._quarter_turn(turning) * sin).to(vectors.dtype)
        return torch.cat((turned, fixed), -1) if fixed.shape[-1] else turned

    def _quarter_turn(self, x: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)


def _rotary_embedding(model: nn.Module) -> Any:
    found = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no rotary position embedding")
    kind = getattr(found[0], "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UnsupportedModelError(f"rope_type {kind!r} changes with the length of the text: no rotation to undo")
    if len(found) > 1:
        raise UnsupportedModelError(f"{type(model).__name__} has {len(found)} different rotary embeddings")
    return found[0]


def _is_interleaved(embedding: Any) -> bool:
    """Which component the model's own function turns the first one into: its neighbour, or the one half a size away."""
    modelling = sys.modules[type(embedding).__module__]
    apply = getattr(modelling, "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModelError(f"{modelling.__name__} has no apply_rotary_pos_emb")
    inv_freq = embedding.inv_freq
    unit = torch.zeros(1, 1, 1, 2 * len(inv_freq), device=inv_freq.device)
    unit[..., 0] = 1
    cos, sin = embedding(unit, position_ids=torch.ones(1, 1, dtype=torch.long, device=inv_freq.device))
    turned = apply(unit, unit, cos, sin)[0].flatten()
    neighbour = int(turned[1:].abs().argmax()) + 1
    if neighbour not in (1, len(inv_freq)):
        raise UnsupportedModelError(f"{modelling.__name__} pairs rotary components in an unknown way")
    return neighbour == 1 and len(inv_freq) > 1
