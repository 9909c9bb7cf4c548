"""Layers that hold different numbers of tokens (`EvictionPolicy.layer_budgets`): those with the same budget share a
cache, which is any method's own, of these layers alone.

Nothing is different in a layer: what it keeps, turns and shows is as if all layers had its budget. Only what the model
does once for all of them must not depend on it: where new tokens are turned. A method by which that is their position
in the stream, or none (`Method.by_layer`), can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Generic, TypeVar

from torch import Tensor

from ..policy import EvictionPolicy
from .decoding import KVCache
from .model import LoadedModel

Cache = TypeVar("Cache", bound=KVCache)


def cache_by_layer(
    loaded: LoadedModel, policy: EvictionPolicy, make: Callable[[LoadedModel, EvictionPolicy], Cache]
) -> Cache | LayeredCache[Cache]:
    """A cache of all layers, or of those that `make` makes of some of them and their policy. Raises PolicyError for
    budgets that are not this model's."""
    policies = policy.of_layers(len(loaded.layers))
    if len(set(policies)) == 1:
        return make(loaded, policies[0])
    return LayeredCache(loaded, policies, make)


class LayeredCache(KVCache, Generic[Cache]):
    def __init__(
        self,
        loaded: LoadedModel,
        policies: list[EvictionPolicy],
        make: Callable[[LoadedModel, EvictionPolicy], Cache],
    ) -> None:
        """policies: of each layer."""
        self.each: list[Cache] = []
        """Caches of layers with the same budget."""
        self.policies = list(dict.fromkeys(policies))
        places: dict[int, tuple[Cache, int]] = {}
        for own in self.policies:
            numbers = [number for number, other in enumerate(policies) if other == own]
            part = make(replace(loaded, layers=tuple(loaded.layers[number] for number in numbers)), own)
            self.each.append(part)
            places |= {number: (part, place) for place, number in enumerate(numbers)}
        self.places = [places[number] for number in range(len(policies))]
        """Of each layer: its cache, and its number there."""
        super().__init__(loaded, self.each[0].backend, policies[0].kv_dtype)

    def parts(self, policy: EvictionPolicy) -> list[tuple[KVCache, EvictionPolicy]]:
        return list(zip(self.each, self.policies, strict=True))

    def position_ids(self, count: int) -> Tensor:
        first, *_ = [part.position_ids(count) for part in self.each]  # each prepares itself; they are the same
        return first

    @property
    def is_static(self) -> bool:
        return all(part.is_static for part in self.each)

    @property
    def shape(self) -> Hashable:
        return tuple(part.shape for part in self.each), tuple(self.each.index(part) for part, _ in self.places)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        part, place = self.places[layer]
        return part.attend(place, query, key, value, scaling)

    def evict(self, n_sink: int, drop: int) -> None:
        """Of every layer alike."""
        for part, own in zip(self.each, self.policies, strict=True):
            part.evict(own.n_sink, drop)
