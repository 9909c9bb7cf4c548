"""Rotary position embedding (Su et al. 2021) as a function of position, composed from the model's own.

The engine decides positions: it calls models with `position_ids` of its choice, and rotates further itself. Position 0
makes the model's own rotation the identity, so that a state that needs raw keys simply asks for position 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .device import float64_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rotary:
    """Rotates queries and keys by whole positions. All angles are computed in float64: float32 ones are off by some
    hundredths at position 1,000,000. A device that has no float64 gets them from the CPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.embedding = _rotary_embedding(model)
        if isinstance(getattr(self.embedding.forward, "__self__", None), Rotary):
            del self.embedding.forward  # which was ours: its own is to be asked
        self.interleaved = _is_interleaved(self.embedding)
        self._arrange = _arrangement(self.embedding)
        self._device = model.device
        self._frequencies: Tensor = self.embedding.inv_freq.to(float64_device(model.device)).double()
        self._scaling = float(getattr(self.embedding, "attention_scaling", 1.0))  # yarn's
        # Half-precision sines would add an error of their own at every rotation.
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        self._cos = self._sin = torch.empty(0)
        self._extend(512)

    @property
    def size(self) -> int:
        """Dimensions of a head that are rotated."""
        return 2 * len(self._frequencies)

    def turns_like(self, other: Rotary) -> bool:
        same = self._frequencies.shape == other._frequencies.shape and self.interleaved == other.interleaved
        return same and bool((self._frequencies == other._frequencies.to(self._frequencies.device)).all())

    def take_over(self, in_its_dtype: bool = False) -> None:
        """From now on the model rotates by these angles, exact at any position, instead of its own. Their sines come
        in float32 at least, which the engine's attention expects, or in the dtype of the model's hidden states."""
        self._in_its_dtype = in_its_dtype
        self.embedding.forward = self._embed

    def _embed(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The result of the model's rotary embedding: position_ids (batch, n) -> cos and sin (batch, n, _). Models of
        images and text give positions for time, height and width (3, batch, n), which are one and the same for text."""
        if position_ids.ndim == 3:
            if not (position_ids == position_ids[:1]).all():
                raise UnsupportedModelError(f"{type(self.embedding).__name__} is to rotate by more than one position")
            position_ids = position_ids[0]
        positions = position_ids[..., None].to(self._frequencies.device)
        angles = self._arrange(positions * self._frequencies)
        dtype = x.dtype if self._in_its_dtype else self._dtype
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        return cos.to(dtype).to(x.device), sin.to(dtype).to(x.device)

    def turn(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (n, rotary size) that turn vectors on by `distances` (n), back where they are negative."""
        angles = torch.outer(distances.to(self._frequencies.device).double(), self._frequencies)
        angles = _neighbours(angles) if self.interleaved else _halves(angles)
        return angles.cos().to(self._dtype).to(self._device), angles.sin().to(self._dtype).to(self._device)

    def _extend(self, length: int) -> None:
        self._cos, self._sin = self.turn(torch.arange(length, device=self._frequencies.device))

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

    def by(self, distance: int) -> tuple[Tensor, Tensor]:
        """cos and sin (1, rotary size) that turn vectors on by `distance` positions, back if it is negative."""
        # Filled in on the device: a tensor made of a Python number would wait for all that the device still has to do.
        return self.turn(torch.full((1,), distance, device=self._frequencies.device))

    def rotate(self, vectors: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """vectors (..., n, head size) turned by the angles of `at`, `span`, `by` or `turn`; dims past the rotary size,
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


def _halves(angles: Tensor) -> Tensor:
    return torch.cat((angles, angles), -1)


def _neighbours(angles: Tensor) -> Tensor:
    return angles.repeat_interleave(2, -1)


def _once(angles: Tensor) -> Tensor:
    return angles


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the part that reads and writes text, where a model has others."""
    return model.config.get_text_config(decoder=True)


def _rotary_embedding(model: PreTrainedModel) -> Any:
    modules, name = list(model.get_decoder().modules()), type(model).__name__
    found = [module for module in modules if hasattr(module, "inv_freq")]
    if not found:
        raise UnsupportedModelError(f"{name} has {_other_positions(model, modules)}")
    kind = getattr(found[0], "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"{name} has rope_type {kind!r}, which changes with the length of the text: no rotation to undo"
        )
    if not found[0].inv_freq.numel():
        raise UnsupportedModelError(f"{name} has a rotary position embedding of no dimensions")
    if len(found) > 1:
        raise UnsupportedModelError(f"{name} has {len(found)} different rotary embeddings")
    return found[0]


def _other_positions(model: PreTrainedModel, modules: list[nn.Module]) -> str:
    """A description of what the model has in place of one rotary embedding."""
    config = text_config(model)
    several = {name.removesuffix("_inv_freq") for m in modules for name in vars(m).get("_buffers", {})
               if name.endswith("_inv_freq") and "original" not in name}  # fmt: skip
    if several:
        return f"a rotary embedding for each kind of layer ({', '.join(sorted(several))}), not a single one"
    if getattr(config, "rotary_dim", None) or getattr(config, "rotary_pct", None):
        return "rotary positions that its attention computes in code of its own: no embedding to ask for angles"
    alibi = getattr(config, "alibi", None) or getattr(getattr(config, "attn_config", None), "alibi", None)
    if alibi or any(hasattr(module, "build_alibi_tensor") for module in modules):
        return "no rotary positions but linear biases (ALiBi)"
    learned = [type(m).__name__ for m in modules if "position" in type(m).__name__.lower()]
    named = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding) and _is_of_positions(name)]
    if learned or named:
        return f"no rotary positions but embedded ones ({(named or learned)[0]})"
    return "no rotary position embedding"


def _is_of_positions(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return "position" in last or last in ("wpe", "embed_positions")


def _arrangement(embedding: Any) -> Callable[[Tensor], Tensor]:
    """How the model's own embedding lays out the angles of position 1."""
    device = embedding.inv_freq.device
    frequencies = embedding.inv_freq.to(float64_device(device)).double()
    x = torch.zeros(1, device=device)
    cos, sin = embedding(x, position_ids=torch.ones(1, 1, dtype=torch.long, device=device))
    found = torch.atan2(sin, cos).flatten().to(frequencies.device).double()
    for arrange in (_halves, _neighbours, _once):
        expected = arrange(frequencies)
        if found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5):
            return arrange
    raise UnsupportedModelError(f"{type(embedding).__name__} gives angles that are not position times inv_freq")


def _is_interleaved(embedding: Any) -> bool:
    """Which component the model's own function turns the first one into: its neighbour, or the one half a size away."""
    modelling = sys.modules[type(embedding).__module__]
    apply = getattr(modelling, "apply_rotary_pos_emb", None)
    if apply is None:
        raise UnsupportedModelError(f"{modelling.__name__} rotates in another way than by apply_rotary_pos_emb")
    inv_freq = embedding.inv_freq
    unit = torch.zeros(1, 1, 1, 2 * len(inv_freq), device=inv_freq.device)
    unit[..., 0] = 1
    cos, sin = embedding(unit, position_ids=torch.ones(1, 1, dtype=torch.long, device=inv_freq.device))
    turned = apply(unit, unit, cos, sin)[0].flatten()
    neighbour = int(turned[1:].abs().argmax()) + 1
    if neighbour not in (1, len(inv_freq)):
        raise UnsupportedModelError(f"{modelling.__name__} pairs rotary components in an unknown way")
    return neighbour == 1 and len(inv_freq) > 1
