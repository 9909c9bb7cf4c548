"""Rotary position embedding (Su et al. 2021) as a function of position, composed from the model's own.

The engine decides positions: it calls models with `position_ids` of its choice, and rotates further itself. Position 0
makes the model's own rotation the identity, so that a state that needs raw keys simply asks for position 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .device import float64_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Angles = tuple[Tensor, Tensor]
"""cos and sin (n, rotary size)"""


class Rotary:
    """Rotates queries and keys by whole positions. All angles are computed in float64: float32 ones are off by some
    hundredths at position 1,000,000. A device that has no float64 gets them from the CPU."""

    def __init__(
        self, frequencies: Tensor, model: PreTrainedModel, interleaved: bool = False, at_end: bool = False
    ) -> None:
        """frequencies (rotary size / 2): radians per position, in float64; negative where a model turns the other way
        round (nanochat). interleaved: whether a component's partner is its neighbour, not the one half a size away.
        at_end: whether a head's last dimensions turn, not the first ones (latent attention)."""
        self.frequencies = frequencies
        self.interleaved = interleaved
        self.at_end = at_end
        self._device = model.device
        # Half-precision sines would add an error of their own at every rotation.
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        self._cos = self._sin = torch.empty(0)
        self._extend(512)

    @property
    def size(self) -> int:
        """Dimensions of a head that are rotated: 0 in layers whose keys are the same at every position."""
        return 2 * len(self.frequencies)

    def turns_like(self, other: Rotary) -> bool:
        shapes = [(x.frequencies.shape, x.interleaved, x.at_end) for x in (self, other)]
        return shapes[0] == shapes[1] and bool(
            (self.frequencies == other.frequencies.to(self.frequencies.device)).all()
        )

    def turn(self, distances: Tensor) -> Angles:
        """cos and sin (n, rotary size) that turn vectors on by `distances` (n), back where they are negative."""
        angles = torch.outer(distances.to(self.frequencies.device).double(), self.frequencies)
        angles = _neighbours(angles) if self.interleaved else _halves(angles)
        return angles.cos().to(self._dtype).to(self._device), angles.sin().to(self._dtype).to(self._device)

    def _extend(self, length: int) -> None:
        self._cos, self._sin = self.turn(torch.arange(length, device=self.frequencies.device))

    def reserve(self, length: int) -> Rotary:
        """Grows the table to positions 0 .. length-1; `at` and `span` expect them to be there."""
        if length > len(self._cos):
            self._extend(max(length, 2 * len(self._cos)))
        return self

    def at(self, positions: Tensor) -> Angles:
        """cos and sin (n, rotary size) for a tensor of positions (n)."""
        return self._cos[positions], self._sin[positions]

    def span(self, start: int, stop: int) -> Angles:
        """cos and sin (stop - start, rotary size) of consecutive positions, without a copy."""
        self.reserve(stop)
        return self._cos[start:stop], self._sin[start:stop]

    def by(self, distance: int) -> Angles:
        """cos and sin (1, rotary size) that turn vectors on by `distance` positions, back if it is negative."""
        # Filled in on the device: a tensor made of a Python number would wait for all that the device still has to do.
        return self.turn(torch.full((1,), distance, device=self.frequencies.device))

    def rotate(self, vectors: Tensor, angles: Angles) -> Tensor:
        """vectors (..., n, head size) turned by the angles of `at`, `span`, `by` or `turn`; the other dims, where a
        model rotates only a part, stay as they are."""
        cos, sin = angles
        size = cos.shape[-1]
        if not size:
            return vectors
        fixed = vectors.shape[-1] - size
        rest, turning = vectors.tensor_split([fixed], -1) if self.at_end else vectors.tensor_split([size], -1)[::-1]
        turned = (turning * cos + self._quarter_turn(turning) * sin).to(vectors.dtype)
        if not fixed:
            return turned
        return torch.cat((rest, turned) if self.at_end else (turned, rest), -1)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        if self.interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)


class RotaryEmbedding:
    """The module of a model that gives the angles of positions, to layers of one kind or of several."""

    def __init__(self, module: Any, model: PreTrainedModel) -> None:
        if isinstance(getattr(module.forward, "__self__", None), RotaryEmbedding):
            del module.forward  # which was ours: its own is to be asked
        self.module = module
        self._own = module.forward
        for kind in _kinds(module):
            _as_in_a_short_text(module, kind)
        self._frequencies = {kind: _frequencies(module, kind) for kind in _kinds(module)}
        """By kind of layer, as the module is told it; None where there is one for all."""
        self._arrange = {kind: _arrangement(module, kind) for kind in self._frequencies}
        self._scaling = {
            kind: float(getattr(module, _named(kind, "attention_scaling"), 1.0)) for kind in self._frequencies
        }
        """Yarn's."""
        self._complex = {kind: len(_given_at_one(module, kind)) == 1 for kind in self._frequencies}
        self.rotaries = [
            Rotary(direction * frequencies, model, interleaved, at_end)
            for frequencies in self._frequencies.values()
            for at_end in (False, True)
            for interleaved in (False, True)
            for direction in (1, -1)
        ]
        """All ways to turn by its angles: which of them a layer has, is found by trying."""
        self._dtype = torch.promote_types(model.dtype, torch.float32)

    def take_over(self, in_its_dtype: bool = False) -> None:
        """From now on the model rotates by these angles, exact at any position, instead of its own. Their sines come
        in float32 at least, which the engine's attention expects, or in the dtype of the model's hidden states."""
        self._in_its_dtype = in_its_dtype
        self.module.forward = self._embed

    def give_back(self) -> None:
        """The model rotates by its own angles again."""
        self.module.forward = self._own

    def _embed(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Angles | Tensor:
        """The result of the model's rotary embedding: position_ids (batch, n) -> cos and sin (batch, n, _), or both in
        complex numbers. Models of images and text give positions for time, height and width (3, batch, n), which are
        one and the same for text."""
        if layer_type not in self._frequencies:  # layers without positions
            others: Angles = self._own(x, position_ids, layer_type)
            return others
        if position_ids.ndim == 3:
            if not (position_ids == position_ids[:1]).all():
                raise UnsupportedModelError(f"{type(self.module).__name__} is to rotate by more than one position")
            position_ids = position_ids[0]
        frequencies, scaling = self._frequencies[layer_type], self._scaling[layer_type]
        angles = self._arrange[layer_type](position_ids[..., None].to(frequencies.device) * frequencies)
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        if self._complex[layer_type]:
            return torch.complex(cos.to(self._dtype), sin.to(self._dtype)).to(x.device)
        dtype = x.dtype if self._in_its_dtype else self._dtype
        return cos.to(dtype).to(x.device), sin.to(dtype).to(x.device)


def rotary_embeddings(model: PreTrainedModel) -> list[RotaryEmbedding]:
    """Raises UnsupportedModelError if there are none, or some that cannot be composed from."""
    modules, name = list(text_part(model).modules()), type(model).__name__
    found = [module for module in modules if _kinds(module)]
    if not found:
        raise UnsupportedModelError(f"{name} has {_other_positions(model, modules)}")
    for module in found:
        if not all(_frequencies(module, kind).numel() for kind in _kinds(module)):
            raise UnsupportedModelError(f"{name} has a rotary position embedding of no dimensions")
    return [RotaryEmbedding(module, model) for module in found]


def distinct_rotaries(embeddings: list[RotaryEmbedding], model: PreTrainedModel) -> list[Rotary]:
    """Those that turn differently, and one that turns nothing."""
    nothing = Rotary(torch.empty(0, dtype=torch.float64, device=float64_device(model.device)), model)
    found: list[Rotary] = []
    for rotary in [rotary for embedding in embeddings for rotary in embedding.rotaries]:
        if not any(rotary.turns_like(other) for other in found):
            found.append(rotary)
    return [*found, nothing]


_INV_FREQ = "inv_freq"


def _named(kind: str | None, name: str) -> str:
    return name if kind is None else f"{kind}_{name}"


def _kinds(module: nn.Module) -> list[str | None]:
    """The kinds of layers that a rotary embedding has angles for: None if it has one `inv_freq`; nothing of any other
    module."""
    if hasattr(module, _INV_FREQ):
        return [None]
    names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith(f"_{_INV_FREQ}")]
    return [name.removesuffix(f"_{_INV_FREQ}") for name in names if "original" not in name]


CHANGING = ("dynamic", "longrope")
"""Values of `rope_type`: the angles of a text longer than some length are others, from its first token on."""


def _as_in_a_short_text(module: Any, kind: str | None) -> None:
    """Has a module whose frequencies change what it began with: transformers 5.2 may never go back to that itself."""
    named = getattr(module, "rope_type", None)
    if (named.get(kind) if isinstance(named, dict) else named) in CHANGING:
        name = _named(kind, _INV_FREQ)
        original = getattr(module, _named(kind, f"original_{_INV_FREQ}"))
        setattr(module, name, original.to(getattr(module, name).device))


def _frequencies(module: nn.Module, kind: str | None) -> Tensor:
    found: Tensor = getattr(module, _named(kind, _INV_FREQ))
    return found.to(float64_device(found.device)).double()


def _given_at_one(module: Any, kind: str | None) -> tuple[Tensor, ...]:
    """What the model's own embedding gives for position 1, in float32: cos and sin, or both in complex numbers."""
    which = {} if kind is None else {"layer_type": kind}
    x = torch.zeros(1, device=getattr(module, _named(kind, _INV_FREQ)).device, dtype=torch.float32)
    found = module(x, position_ids=torch.ones(1, 1, dtype=torch.long, device=x.device), **which)
    return found if isinstance(found, tuple) else (found,)


def _halves(angles: Tensor) -> Tensor:
    return torch.cat((angles, angles), -1)


def _neighbours(angles: Tensor) -> Tensor:
    return angles.repeat_interleave(2, -1)


def _once(angles: Tensor) -> Tensor:
    return angles


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the part that reads and writes text, where a model has others."""
    return model.config.get_text_config(decoder=True)


def text_part(model: PreTrainedModel) -> Any:
    """The part with the layers that read and write text."""
    decoder = model.get_decoder()
    return decoder if any(hasattr(module, "layer_idx") for module in decoder.modules()) else model


def _other_positions(model: PreTrainedModel, modules: list[nn.Module]) -> str:
    """A description of what the model has in place of one rotary embedding."""
    config = text_config(model)
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


def _arrangement(module: Any, kind: str | None) -> Callable[[Tensor], Tensor]:
    """How the model's own embedding lays out the angles of position 1."""
    frequencies = _frequencies(module, kind)
    given = _given_at_one(module, kind)
    angles = given[0].angle() if len(given) == 1 else torch.atan2(given[1], given[0])
    found = angles.flatten().to(frequencies.device).double()
    for arrange in (_halves, _neighbours, _once):
        expected = arrange(frequencies)
        if found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5):
            return arrange
    raise UnsupportedModelError(f"{type(module).__name__} gives angles that are not position times inv_freq")
