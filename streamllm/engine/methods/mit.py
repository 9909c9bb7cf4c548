"""`mit`: keys stored un-rotated, all rotated at their cache position on every read, or at that in the stream.

The reference implementation's way (mit-han-lab/streaming-llm, `pos_shift`): eviction slices, a token costs O(S + W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...policy import EvictionPolicy
from ..attention import attention
from ..backends import Backend
from ..decoding import CachedDecoder, KVCache
from ..layered import cache_by_layer
from ..model import LoadedModel
from . import Method


class RawKeyCache(KVCache):
    def __init__(self, loaded: LoadedModel, policy: EvictionPolicy, backend: Backend) -> None:
        super().__init__(loaded, backend, policy.kv_dtype)
        self.policy = policy
        self.evicted = 0

    def begin(self, held: int, count: int) -> None:
        super().begin(held, count)
        if self.policy.keeps_positions:
            places = self.in_stream(held + count)
            self.key_angles = self.angles(lambda rotary: rotary.turn(places))
            self.visible = self.in_windows(lambda: places, count, held + count + self.evicted)
        else:
            self.key_angles = self.angles(lambda rotary: rotary.span(0, held + count))
            whole = held + count
            self.visible = self.in_windows(lambda: torch.arange(whole, device=self.device), count, whole)

    def in_stream(self, count: int) -> Tensor:
        """(count): where in the stream the tokens in the cache are, in its order."""
        places = torch.arange(count, device=self.device)
        places[self.policy.n_sink :] += self.evicted
        return places

    def position_ids(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=self.device)  # no rotation: queries and keys arrive raw

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.append(layer, key, value)
        how, (cos, sin) = self.layers[layer], self.key_angles[layer]
        new = query.shape[2]
        keys = how.rotary.rotate(keys, (cos, sin))
        query = how.rotary.rotate(query, (cos[-new:], sin[-new:]))
        mask = self.visible.get(how.window)
        return attention(self.backend, query, keys, values, scaling, mask, causal=True, softmax=how.softmax)

    def evict(self, n_sink: int, drop: int) -> None:
        super().evict(n_sink, drop)
        self.evicted += drop


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> CachedDecoder:
    cache = cache_by_layer(loaded, policy, lambda part, own: RawKeyCache(part, own, backend))
    return CachedDecoder(loaded, policy, cache, execution)


METHOD = Method(decoder, keys="raw", by_layer=True)
