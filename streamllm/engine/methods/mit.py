"""`mit`: keys stored un-rotated, all rotated at their cache position on every read.

The reference implementation's way (mit-han-lab/streaming-llm, `pos_shift`): eviction slices, a token costs O(S + W).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...policy import EvictionPolicy
from ..attention import attention
from ..backends import Backend
from ..decoding import CachedDecoder, KVCache
from ..model import LoadedModel
from . import Method


class RawKeyCache(KVCache):
    def position_ids(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=self.device)  # no rotation: queries and keys arrive raw

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.append(layer, key, value)
        held, new = keys.shape[2], query.shape[2]
        keys = self.rotary.rotate(keys, self.rotary.span(0, held))
        query = self.rotary.rotate(query, self.rotary.span(held - new, held))
        return attention(self.backend, query, keys, values, scaling, causal=True)


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> CachedDecoder:
    return CachedDecoder(loaded, policy, RawKeyCache(loaded, backend), execution)


METHOD = Method(decoder)
