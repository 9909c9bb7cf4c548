"""`ours`: keys stored rotated, sliced and re-rotated to their new cache positions at each prune.

The source documents' own implementation (StreamingKVCache): cheap between prunes, O(S + W) at each one. Theirs turns
what the prune before has turned; in half precision every turn rounds anew, and a small one rounds away. Here each prune
turns keys as they came, by all that they have moved, and rounds once. Where they keep their positions, none is turned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...policy import EvictionPolicy
from ..attention import attention
from ..backends import Backend
from ..decoding import CachedDecoder, KVCache, without
from ..model import LoadedModel
from . import Method


class RerotatedCache(KVCache):
    def __init__(self, loaded: LoadedModel, backend: Backend, kv_dtype: str = "auto") -> None:
        super().__init__(loaded, backend, kv_dtype)
        self.unmoved: list[Tensor] = []
        """Per layer, the window's keys that the last prune has left, as they came."""
        self.moved = torch.empty(0, dtype=torch.long, device=self.device)
        """The number of positions that each of them was moved by since."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.append(layer, key, value)
        how = self.layers[layer]
        return attention(
            self.backend, query, keys, values, scaling, causal=True, window=how.window, softmax=how.softmax
        )

    def evict(self, n_sink: int, drop: int) -> None:
        came, held = n_sink + len(self.moved), self.keys[0].shape[2]
        self.moved = torch.cat((self.moved, self.moved.new_zeros(held - came)))[drop:] + drop
        angles = self.angles(lambda rotary: rotary.reserve(held).at(self.moved))
        since = [keys[:, :, came:] for keys in self.keys]
        both = zip(self.unmoved, since, strict=True) if self.unmoved else zip(since, strict=True)
        self.unmoved = [torch.cat(parts, dim=2)[:, :, drop:] for parts in both]
        for layer, unmoved in enumerate(self.unmoved):
            cos, sin = angles[layer]
            moved = self.kept(self.layers[layer].rotary.rotate(unmoved.to(self.dtype), (cos, -sin)))
            self.keys[layer] = torch.cat((self.keys[layer][:, :, :n_sink], moved), dim=2)
            self.values[layer] = without(self.values[layer], n_sink, drop)


class UnturnedCache(KVCache):
    """Keys stay as the model rotated them, at their positions in the stream: a prune slices."""

    evicted = n_sink = 0

    def begin(self, held: int, count: int) -> None:
        super().begin(held, count)
        seen = held + count
        self.visible = self.in_windows(lambda: self._in_stream(seen), count, seen + self.evicted)

    def _in_stream(self, count: int) -> Tensor:
        places = torch.arange(count, device=self.device)
        places[self.n_sink :] += self.evicted
        return places

    def position_ids(self, count: int) -> Tensor:
        return super().position_ids(count) + self.evicted

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.append(layer, key, value)
        how = self.layers[layer]
        mask = self.visible.get(how.window)
        return attention(self.backend, query, keys, values, scaling, mask, causal=True, softmax=how.softmax)

    def evict(self, n_sink: int, drop: int) -> None:
        super().evict(n_sink, drop)
        self.n_sink = n_sink
        self.evicted += drop


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> CachedDecoder:
    cache = UnturnedCache if policy.keeps_positions else RerotatedCache
    return CachedDecoder(loaded, policy, cache(loaded, backend, policy.kv_dtype), execution)


METHOD = Method(decoder, keys="cache")
