"""`ours`: keys stored rotated, sliced and re-rotated to their new cache positions at each prune.

The source documents' own implementation (StreamingKVCache): cheap between prunes, O(S + W) at each one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import attention
from ..backends import Backend
from ..decoding import CachedDecoder, KVCache, without
from ..loaded import LoadedModel
from ..policy import EvictionPolicy


class RerotatedCache(KVCache):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.append(layer, key, value)
        return attention(self.backend, query, keys, values, scaling, causal=True)

    def evict(self, n_sink: int, drop: int) -> None:
        angles = self.rotary.by(-drop)
        for layer, keys in enumerate(self.keys):
            moved = self.rotary.rotate(keys[:, :, n_sink + drop :], angles)
            self.keys[layer] = torch.cat((keys[:, :, :n_sink], moved), dim=2)
            self.values[layer] = without(self.values[layer], n_sink, drop)


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend) -> CachedDecoder:
    return CachedDecoder(loaded, policy, RerotatedCache(loaded, backend))
