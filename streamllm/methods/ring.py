"""`ring`: a preallocated ring buffer in which nothing moves.

Rotary positions are relative, so window keys stay rotated at their position in the stream for life, and queries at
theirs: their distances are right. Only the few sinks would be too far away: by the number of evicted tokens, by which
they are turned on whenever that number changes. Eviction is forgetting a slot; it costs O(S).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attention
from ..backends import Backend
from ..decoding import CachedDecoder, KVCache
from ..loaded import LoadedModel
from ..policy import EvictionPolicy, steady_state


class RingCache(KVCache):
    """Slots 0 .. S-1 hold the sinks, the others the window: stream position t is in slot S + (t - S) % (slots - S)."""

    def __init__(self, loaded: LoadedModel, policy: EvictionPolicy, backend: Backend) -> None:
        super().__init__(loaded, backend)
        steady = steady_state(policy)
        self.n_sink = policy.n_sink
        self.slots = steady.peak_kv if steady is not None else policy.kept  # without eviction it grows
        self.evicted = 0
        self.stream_positions = torch.full((self.slots,), -1, device=self.device)
        """Of the token in each slot; -1 while it is empty."""
        self.new_slots = torch.empty(0, dtype=torch.long, device=self.device)
        self.visible: Tensor | None = None
        """(new, slots), None if all are."""
        self.sink_keys: list[Tensor] = []
        """Per layer (1, KV heads, S, head size), as the model rotated them: each turn starts from these."""

    def begin(self, held: int, count: int) -> Tensor:
        if held + count > self.slots:  # a policy that never evicts
            self._grow(2 * (held + count))
        start, window = held + self.evicted, self.slots - self.n_sink
        positions = torch.arange(start, start + count, device=self.device)
        self.new_slots = torch.where(
            positions < self.n_sink, positions, self.n_sink + (positions - self.n_sink) % window
        )
        self.stream_positions[self.new_slots] = positions
        self.visible = None
        if count > 1 or held + 1 < self.slots:
            at = self.stream_positions
            kept = (at >= 0) & ((at < self.n_sink) | (at >= self.n_sink + self.evicted))
            self.visible = kept & (at <= positions[:, None])
        return positions

    def _grow(self, slots: int) -> None:
        assert self.evicted == 0, "the tokens are in slots that depend on the size"
        more = slots - self.slots
        self.slots = slots
        self.stream_positions = F.pad(self.stream_positions, (0, more), value=-1)
        self.keys = [F.pad(keys, (0, 0, 0, more)) for keys in self.keys]
        self.values = [F.pad(values, (0, 0, 0, more)) for values in self.values]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if layer == len(self.keys):
            self.keys.append(key.new_zeros(1, key.shape[1], self.slots, key.shape[3]))
            self.values.append(value.new_zeros(1, value.shape[1], self.slots, value.shape[3]))
        keys = self.keys[layer].index_copy_(2, self.new_slots, key)
        values = self.values[layer].index_copy_(2, self.new_slots, value)
        return attention(self.backend, query, keys, values, scaling, mask=self.visible)

    def evict(self, n_sink: int, drop: int) -> None:
        self.evicted += drop
        if n_sink == 0:
            return
        if not self.sink_keys:
            self.sink_keys = [keys[:, :, :n_sink].clone() for keys in self.keys]
        angles = self.rotary.by(self.evicted)
        for keys, sinks in zip(self.keys, self.sink_keys, strict=True):
            keys[:, :, :n_sink] = self.rotary.rotate(sinks, angles)


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend) -> CachedDecoder:
    return CachedDecoder(loaded, policy, RingCache(loaded, policy, backend))
