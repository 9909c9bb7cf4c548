"""The block-parallel evaluator's cache where keys and values are kept in another number format than they are computed
in (`EvictionPolicy.kv_dtype`): it rounds what a method's decode loop rounds, when the method does.

Values are rounded as they come, whoever keeps them. Keys are by what a method keeps of them (`Method.keys`):

    raw     round(k)                                     rotated when they are read (`mit`): as `BlockState` is
    stream  round(Rot(j) k), of sinks round(Rot(i + e) k)   at their positions in the stream (`ring`)
    cache   round(Rot(-m) round(Rot(p) k))                  at their places p when they came, moved by m since (`ours`)

What a sink or, in a cache, every key is rounded to depends on the tokens evicted before the query, e: it is computed
once for each e of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..policy import EvictionPolicy
from .attention import attention, for_each_head
from .block_state import BlockState
from .layered import LayeredCache
from .methods import Keys
from .model import LoadedModel


def block_state(loaded: LoadedModel, policy: EvictionPolicy, n_tokens: int, keys: Keys = "raw") -> Blocks:
    """keys: how the method keeps them; of no consequence to a cache of the model's own number format. Raises
    PolicyError for layer budgets that are not this model's, UsageError as `LoadedModel.check_length`."""
    loaded.check_length(policy, n_tokens)

    def of(part: LoadedModel, own: EvictionPolicy) -> BlockState:
        return _block_state(part, own, n_tokens, keys)

    policies = policy.of_layers(len(loaded.layers))
    return of(loaded, policies[0]) if len(set(policies)) == 1 else LayeredBlocks(loaded, policies, of)


def _block_state(loaded: LoadedModel, policy: EvictionPolicy, n_tokens: int, keys: Keys) -> BlockState:
    if policy.kv_dtype == "auto" or keys == "raw":
        return BlockState(loaded, policy, n_tokens)
    if keys == "stream" or policy.keeps_positions:  # then no key is ever moved
        return StreamRounded(loaded, policy, n_tokens)
    return CacheRounded(loaded, policy, n_tokens)


class LayeredBlocks(LayeredCache[BlockState]):
    """Of layers with several budgets."""

    def begin_block(self, start: int, stop: int) -> None:
        for part in self.each:
            part.begin_block(start, stop)

    def repeat(self, counts: Tensor) -> None:
        for part in self.each:
            part.repeat(counts)

    @property
    def held(self) -> Tensor:
        """By the layers that hold most."""
        return max((part.held for part in self.each), key=len)


Blocks = BlockState | LayeredBlocks


class StreamRounded(BlockState):
    """Keys are kept rotated at their positions in the stream; sinks too, as the model rotated them."""

    def __init__(self, loaded: LoadedModel, policy: EvictionPolicy, n_tokens: int) -> None:
        super().__init__(loaded, policy, n_tokens)
        self.sink_keys: list[Tensor] = []

    def begin_block(self, start: int, stop: int) -> None:
        super().begin_block(start, stop)
        self.new_sinks = max(min(self.n_sink, stop) - start, 0)
        queries = torch.arange(start, stop, device=self.device)
        self.query_angles = self.angles(lambda rotary: rotary.turn(queries))
        evicted = self.evicted[start:stop]
        turns, self.turn_of_query = torch.unique(evicted * (not self.keeps_positions), return_inverse=True)
        self.sink_angles = [(cos[:, None], sin[:, None]) for cos, sin in self.angles(lambda rotary: rotary.turn(turns))]

    def repeat(self, counts: Tensor) -> None:
        super().repeat(counts)
        self.sink_keys = [keys.repeat_interleave(counts, dim=0) for keys in self.sink_keys]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rotary, angles = self.layers[layer].rotary, self.query_angles[layer]
        query, key = rotary.rotate(query, angles), rotary.rotate(key, angles)
        if layer == len(self.sink_keys):
            self.sink_keys.append(key[:, :, :0])
        self.sink_keys[layer] = torch.cat((self.sink_keys[layer], key[:, :, : self.new_sinks]), dim=2)
        keys, values = (for_each_head(x, query.shape[1]) for x in self.append(layer, key, value))
        logits = self.sink_logits(layer, query, self.sink_keys[layer])
        return self.attention(layer, query, keys[:, :, self.sinks :], values, logits, scaling)

    def sink_logits(self, layer: int, query: Tensor, keys: Tensor) -> Tensor:
        """Of queries at their positions in the stream, and sinks at theirs: turned to where each query has them, and
        rounded there."""
        precision = torch.promote_types(query.dtype, torch.float32)
        rotary, angles = self.layers[layer].rotary, self.sink_angles[layer]
        each = keys[:, :, None].expand(-1, -1, len(angles[0]), -1, -1)
        each = for_each_head(self.kept(rotary.rotate(each, angles)), query.shape[1])
        own = each[:, :, self.turn_of_query].to(self.dtype).to(precision)
        return torch.einsum("bhqd,bhqsd->bhqs", query.to(precision), own)


class CacheRounded(BlockState):
    """Keys are kept rotated at their places in the cache, and moved by each prune: from what they came as, so that each
    is rounded twice, once when it came and once where it is."""

    def begin_block(self, start: int, stop: int) -> None:
        super().begin_block(start, stop)
        evicted = self.evicted[start:stop]
        places = torch.arange(start, stop, device=self.device) - evicted
        longest = int(places.max()) + 1
        self.query_angles = self.angles(lambda rotary: rotary.reserve(longest).at(places))
        self.came = self.evicted[self.held]
        """Tokens evicted before each of them came."""
        groups, counts = torch.unique_consecutive(evicted, return_counts=True)
        oldest = torch.searchsorted(self.held, self.n_sink + groups)
        self.groups = list(zip(*(part.tolist() for part in (groups, counts, oldest)), strict=True))
        """Tokens evicted, how many queries have them so, and the place of the oldest key that these see, behind the
        sinks."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rotary, angles = self.layers[layer].rotary, self.query_angles[layer]
        query, key = rotary.rotate(query, angles), rotary.rotate(key, angles)
        keys, values = self.append(layer, key, value)
        visible, softmax = self.visible_to(layer), self.layers[layer].softmax
        outputs, first, last = [], 0, keys.shape[2] - query.shape[2]
        for evicted, count, oldest in self.groups:
            last += count
            moved = (evicted - self.came[oldest:last]).clamp(min=0)
            window = keys[:, :, oldest:last]
            cos, sin = rotary.at(moved)
            turned = self.kept(rotary.rotate(window, (cos, -sin))).to(self.dtype)
            window = torch.where(moved[:, None] > 0, turned, window)
            rows, sinks = slice(first, first + count), min(self.sinks, oldest)
            seen_keys = torch.cat((keys[:, :, :sinks], window), dim=2)
            seen_values = torch.cat((values[:, :, :sinks], values[:, :, oldest:last]), dim=2)
            seen = torch.cat((visible[rows, :sinks], visible[rows, oldest:last]), dim=1)
            outputs.append(
                attention(self.backend, query[:, :, rows], seen_keys, seen_values, scaling, seen, softmax=softmax)
            )
            first += count
        return torch.cat(outputs, dim=2)
