"""The ring as a `transformers` cache: `model.generate(..., past_key_values=StreamingCache(model))` streams without end
in constant memory.

As in `methods.ring`, keys stay as the model rotated them, at their position in the stream, and only the sinks are
turned on; here the model keeps its own attention, of whatever implementation.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .errors import UnsupportedModelError
from .loaded import attention_span
from .policy import EvictionPolicy
from .rotary import Rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StreamingCache(Cache):  # type: ignore[misc]
    """Attention sinks and a window (Xiao et al. 2023): every new token sees the first `n_sink` tokens, the last
    `window_size`, and itself.

    A prompt given in one piece attends to all of itself, as it would with any cache; then all of it but sinks and
    window is forgotten. The sequences of a batch must be equally long: there is no place for padding. From now on the
    model rotates by angles computed in float64: float32 ones are off by hundredths at position 1,000,000.

    Raises UnsupportedModelError without rotary positions, or with a sliding window of the model's own; PolicyError for
    sizes out of range.
    """

    def __init__(self, model: PreTrainedModel, n_sink: int = 4, window_size: int = 1020) -> None:
        policy = EvictionPolicy(n_sink=n_sink, window_size=window_size)
        if attention_span(model.config) is not None:
            raise UnsupportedModelError(f"{type(model).__name__} has a sliding window of its own, and no use for sinks")
        trained = getattr(model.config, "max_position_embeddings", None)
        if trained is not None and policy.kept + 1 > trained:
            warnings.warn(
                f"n_sink + window_size + 1 = {policy.kept + 1} is more than the {trained} positions the model was "
                f"trained on: perplexity will suffer",
                stacklevel=2,
            )
        rotary = Rotary(model)
        rotary.take_over(in_its_dtype=True)
        turn = _SinkTurn(rotary)
        super().__init__(layers=[_RingLayer(policy, turn) for _ in range(model.config.num_hidden_layers)])


class _SinkTurn:
    """Turns sinks on; the angles are the same in every layer."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.distance = 0
        self.angles = rotary.by(0)

    def __call__(self, keys: Tensor, distance: int) -> Tensor:
        if distance != self.distance:
            self.distance, self.angles = distance, self.rotary.by(distance)
        return self.rotary.rotate(keys, self.angles)


class _RingLayer(CacheLayerMixin):  # type: ignore[misc]
    """Slots 0 .. S-1 hold the sinks; the token at position t of the stream is in slot S + (t - S) % (W + 1)."""

    is_sliding = False

    def __init__(self, policy: EvictionPolicy, turn: _SinkTurn) -> None:
        super().__init__()
        self.n_sink, self.slots = policy.n_sink, policy.kept + 1
        self.turn = turn
        self.seen = 0
        """Tokens of the stream so far."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, size = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch, heads, self.slots, size)
        self.values = value_states.new_zeros(batch, heads, self.slots, value_states.shape[3])
        self.sink_keys = self.keys[:, :, : self.n_sink].clone()
        """As the model rotated them: each turn starts from these."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes in keys and values (batch, KV heads, new, head size); returns those the new tokens are to attend to.
        The order of keys is that of the stream, but for a single token, which may see them in any."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        sinks = min(self.n_sink - self.seen, key_states.shape[2])
        if sinks > 0:
            self.sink_keys[:, :, self.seen : self.seen + sinks] = key_states[:, :, :sinks]
        if key_states.shape[2] == 1:
            return self._take_one(key_states, value_states)
        return self._take_block(key_states, value_states)

    def _take_one(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        slot = self._slot(self.seen)
        self.keys[:, :, slot : slot + 1] = key
        self.values[:, :, slot : slot + 1] = value
        self.seen += 1
        self._turn_sinks()
        held = min(self.seen, self.slots)
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _turn_sinks(self) -> None:
        if self.seen > self.slots:
            self.keys[:, :, : self.n_sink] = self.turn(self.sink_keys, self.seen - self.slots)

    def _take_block(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._turn_sinks()
        held = min(self.seen, self.slots)
        order = [self._slot(t) if t >= self.n_sink else t for t in self._positions()]
        keys = torch.cat((self.keys[:, :, order], keys), dim=2)
        values = torch.cat((self.values[:, :, order], values), dim=2)
        self.seen += keys.shape[2] - held
        kept = self._positions()
        slots = [self._slot(t) for t in kept]
        # Positions of the stream -> places in `keys`, where evicted ones are missing between sinks and window.
        gap = self.seen - keys.shape[2]
        places = [t if t < self.n_sink else t - gap for t in kept]
        self.keys[:, :, slots] = keys[:, :, places]
        self.values[:, :, slots] = values[:, :, places]
        return keys, values

    def _positions(self) -> list[int]:
        """Of the tokens in the cache, in the stream."""
        recent = range(max(self.n_sink, self.seen - (self.slots - self.n_sink)), self.seen)
        return [*range(min(self.n_sink, self.seen)), *recent]

    def _slot(self, position: int) -> int:
        window = self.slots - self.n_sink
        return position if position < self.n_sink else self.n_sink + (position - self.n_sink) % window

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Keys that `query` new tokens (up to transformers 5.3: their positions) see; how many came before those."""
        new = query if isinstance(query, int) else query.shape[0]
        held = min(self.seen, self.slots)
        length = min(held + 1, self.slots) if new == 1 else held + new
        return length, self.seen + new - length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.3

    def reset(self) -> None:
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.is_initialized:
            self.sink_keys = self.sink_keys.index_select(0, beam_idx.to(self.device))
