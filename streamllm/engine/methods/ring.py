"""`ring`: a preallocated ring buffer in which nothing moves.

Rotary positions are relative, so window keys stay rotated at their position in the stream for life, and queries at
theirs: their distances are right. Only the few sinks would be too far away: by the number of evicted tokens, by which
they are turned on for every token. Eviction is counting; a token costs O(S), whatever the policy, and nothing at all
where survivors keep their positions: the sinks stay as far away as they are.

A layer with a sliding window of its own has a ring of so many slots where no sink is ever seen from there: all that it
needs of a policy is that what is in its window is not evicted. Elsewhere it has a ring as the others, and a mask.

All that changes from token to token are two numbers in tensors, the position and the evicted tokens; everything else
follows from them on the device, in static shapes: the step can be compiled, or captured as a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...options import EXECUTIONS
from ...policy import EvictionPolicy, steady_state
from ..attention import attention
from ..backends import Backend
from ..decoding import CachedDecoder, KVCache
from ..device import has_float8
from ..layered import cache_by_layer
from ..model import LoadedModel
from ..probing import replayed
from ..slots import RingSlots
from . import Method


def holds_window(policy: EvictionPolicy, window: int) -> bool:
    """Whether a layer's window is a ring of its own: a prune leaves W tokens behind the sinks, and the next query is
    there as well."""
    return policy.compress_every == 0 or window <= policy.window_size + 1


class RingCache(KVCache):
    def __init__(self, loaded: LoadedModel, policy: EvictionPolicy, backend: Backend) -> None:
        super().__init__(loaded, backend, policy.kv_dtype)
        steady = steady_state(policy)
        self.grows = steady is None
        """A policy that never evicts."""
        self.slots = RingSlots(policy.n_sink, policy.kept if steady is None else steady.peak_kv)
        self.own_rings = {window: RingSlots(0, window) for window in self.windows if holds_window(policy, window)}
        """By the window of a layer."""
        self.farthest = None if steady is None or policy.keeps_positions else steady.peak_kv
        """Where distances are those in the cache, no key is farther away: such a window leaves out none."""
        self.keeps_positions = policy.keeps_positions
        self.turns_sinks = policy.n_sink > 0 and not policy.keeps_positions
        self.always_full = steady is not None and steady.cycle == 1
        """Once full: every token evicts one, and none is ever masked."""
        self.evicted_so_far = 0
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        """Position of the first new token in the stream."""
        self.evicted = torch.zeros(1, dtype=torch.long, device=self.device)
        self.sink_keys: list[Tensor] = []
        """Per layer (1, KV heads, S, head size), as the model rotated them: each turn starts from these."""
        self.new_sinks = 0
        """How many of the new tokens are sinks."""
        self.masked = True
        self.seen: dict[int | None, Tensor | None] = {}
        """By the window of a layer: what each new token sees (new, slots); None where that is all."""
        self.can_fuse = all(
            self._shows_all(layer.window) and layer.is_plain and layer.rotary.size for layer in self.layers
        )
        self.fused = False
        """Whether a layer's part of the step is one launch of our own (`triton_ring`), from taking the token in on."""
        self.finished = torch.zeros(0, dtype=torch.int32)

    def begin(self, held: int, count: int) -> None:
        super().begin(held, count)
        if self.grows and held + count > self.slots.count:
            self._grow(2 * (held + count))
        self.position.fill_(held + self.evicted_so_far)
        self.evicted.fill_(self.evicted_so_far)
        self.new_sinks = max(min(self.slots.n_sink - held, count), 0)
        self.masked = count > 1 or not (self.always_full and held + 1 == self.slots.count)
        fits = self.stored.itemsize > 1 or has_float8(self.device)
        fuses = self.backend.name == "ring_triton" and self.can_fuse
        self.fused = fuses and count == 1 and not self.new_sinks and fits

    def position_ids(self, count: int) -> Tensor:
        turns = self.turns_sinks and not self.new_sinks
        if turns:
            self.sink_angles = self.angles(lambda rotary: rotary.turn(self.evicted))
        if self.fused:
            return self.position
        positions = self.position + torch.arange(count, device=self.device)
        self.value_slots = self.slots.of_each(positions)
        self.key_slots = self.value_slots
        if turns:
            sinks = torch.arange(self.slots.n_sink, device=self.device)
            self.key_slots = torch.cat((sinks, self.value_slots))
        visible = self._visible(positions) if self.masked else None
        self.seen = {None: visible} | {window: self._within(window, positions, visible) for window in self.windows}
        self.own_slots = {window: own.of_each(positions) for window, own in self.own_rings.items()}
        return positions

    @property
    def is_static(self) -> bool:
        return not self.grows and not self.new_sinks and self.masked != self.always_full

    @property
    def shape(self) -> tuple[Any, ...]:
        """Everything that a step's code depends on, of a model."""
        how = self.turns_sinks, self.always_full, self.backend.name, self.stored, *self.own_rings
        return self.slots.count, self.slots.n_sink, *how

    def _visible(self, positions: Tensor) -> Tensor:
        """(new, slots): what each query sees."""
        last, n_sink = positions[-1], self.slots.n_sink
        held = self.slots.newest(last)
        sinks = torch.arange(n_sink, device=self.device)
        # A window slot whose token is evicted, or that has none yet, counts as not come yet.
        at = torch.cat((sinks, torch.where(held >= n_sink + self.evicted, held, last + 1)))
        return at <= positions[:, None]

    def _shows_all(self, window: int | None) -> bool:
        return window is None or (self.farthest is not None and window >= self.farthest)

    def _within(self, window: int, positions: Tensor, visible: Tensor | None) -> Tensor | None:
        """(new, slots): what of that is in a layer's own window, by distances in the cache or, kept, in the stream."""
        if window in self.own_rings:  # which holds nothing else
            return None if visible is None else self.own_rings[window].newest(positions[-1])[None] >= 0
        if self._shows_all(window):
            return visible
        sinks = torch.arange(self.slots.n_sink, device=self.device)
        if not self.keeps_positions:
            sinks = sinks + self.evicted
        within = torch.cat((sinks, self.slots.newest(positions[-1]))) > positions[:, None] - window
        return within if visible is None else within & visible

    def _grow(self, slots: int) -> None:
        more = slots - self.slots.count
        self.slots = RingSlots(self.slots.n_sink, slots)
        for layer in range(len(self.keys)):
            if self.layers[layer].window not in self.own_rings:
                self.keys[layer] = F.pad(self.keys[layer], (0, 0, 0, more))
                self.values[layer] = F.pad(self.values[layer], (0, 0, 0, more))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if layer == len(self.keys):
            self._allocate(layer, key, value)
        how = self.layers[layer]
        if self.fused:
            return self._in_one_launch(layer, query, key, value, scaling)
        if how.window in self.own_rings:
            return self._in_own_ring(layer, query, key, value, scaling)
        if self.turns_sinks and self.new_sinks:
            first = self.length
            self.sink_keys[layer][:, :, first : first + self.new_sinks] = key[:, :, : self.new_sinks]
        elif self.turns_sinks:
            sinks = how.rotary.rotate(self.sink_keys[layer], self.sink_angles[layer])
            key = torch.cat((sinks, key), dim=2)
        keys = self._write(self.keys[layer], self.key_slots, key)
        values = self._write(self.values[layer], self.value_slots, value)
        return attention(self.backend, query, keys, values, scaling, mask=self.seen[how.window], softmax=how.softmax)

    def _in_own_ring(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        window, softmax, new = self.layers[layer].window, self.layers[layer].softmax, query.shape[2]
        assert window is not None
        if new == 1:
            keys = self._write(self.keys[layer], self.own_slots[window], key)
            values = self._write(self.values[layer], self.own_slots[window], value)
            return attention(self.backend, query, keys, values, scaling, mask=self.seen[window], softmax=softmax)
        # Before what comes overwrites what its first tokens see.
        start = self.length + self.evicted_so_far
        order = self.own_rings[window].of_each(torch.arange(max(start - window, 0), start, device=self.device))
        keys = torch.cat((self._read(self.keys[layer], order), self.kept(key)), dim=2)
        values = torch.cat((self._read(self.values[layer], order), self.kept(value)), dim=2)
        last = self.own_slots[window][-window:]
        self._write(self.keys[layer], last, key[:, :, -window:])
        self._write(self.values[layer], last, value[:, :, -window:])
        return attention(self.backend, query, keys, values, scaling, causal=True, window=window, softmax=softmax)

    def _read(self, held: Tensor, slots: Tensor) -> Tensor:
        if self.stored.itemsize == 1:
            return held.view(torch.uint8).index_select(2, slots).view(self.stored)
        return held.index_select(2, slots)

    def _write(self, held: Tensor, slots: Tensor, new: Tensor) -> Tensor:
        """Writes there, and returns all that is held, as it is kept."""
        new = self.kept(new)
        if self.stored.itemsize == 1:  # torch copies bytes, but no float8 on a CPU
            held.view(torch.uint8).index_copy_(2, slots, new.view(torch.uint8))
        else:
            held.index_copy_(2, slots, new)
        return held

    def _in_one_launch(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        from ..triton_ring import ring_attention

        turning = (self.sink_keys[layer], *self.sink_angles[layer]) if self.turns_sinks else (None, None, None)
        held = self.keys[layer], self.values[layer]
        how = scaling, self.slots.n_sink, self.layers[layer].rotary.interleaved
        return ring_attention(query, key, value, *held, *turning, self.position, self.evicted, self.finished, *how)

    def _allocate(self, layer: int, key: Tensor, value: Tensor) -> None:
        if not self.keys:
            self.finished = torch.zeros(
                max(layer.kv_heads for layer in self.layers), dtype=torch.int32, device=self.device
            )
        window = self.layers[layer].window
        slots = self.slots if window is None else self.own_rings.get(window, self.slots)
        for held, new in ((self.keys, key), (self.values, value)):
            held.append(new.new_zeros(1, new.shape[1], slots.count, new.shape[3], dtype=self.stored))
        if self.turns_sinks:
            self.sink_keys.append(key.new_zeros(1, key.shape[1], slots.n_sink, key.shape[3]))

    def evict(self, n_sink: int, drop: int) -> None:
        self.evicted_so_far += drop


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> CachedDecoder:
    if execution != "eager":
        backend = replayed(backend, loaded, policy.kept)
    cache = cache_by_layer(loaded, policy, lambda part, own: RingCache(part, own, backend))
    return CachedDecoder(loaded, policy, cache, execution)


METHOD = Method(decoder, executions=tuple(EXECUTIONS), keys="stream", by_layer=True, holds_window=holds_window)
