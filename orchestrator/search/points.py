"""A search space's points as configurations, and whether all of them can be made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from search_spaces import SearchSpace, Value
from streamllm.configuration import Configuration
from streamllm.engine.methods import check_execution, check_protocol
from streamllm.errors import UsageError
from streamllm.policy import EvictionPolicy, PolicyError, with_derived_window


def configuration_of(params: Mapping[str, Value], space: SearchSpace, cap: int) -> Configuration:
    """The configuration that a point of the space stands for; its window is what its total KV leaves. Raises
    UsageError where it leaves none, or the method cannot be executed like that."""
    knobs = {name: int(params[name]) for name in ("n_sink", "compress_every", "cache_slack", "max_drop")}
    policy = with_derived_window(EvictionPolicy(**knobs), min(int(params["total_kv"]), cap), space.cap_accounting)
    method, backend, execution = (str(params[name]) for name in ("method", "attn_backend", "execution"))
    check_execution(method, execution)
    quantization = params.get("quantization")
    return Configuration(method, policy, backend, execution, None if quantization is None else str(quantization))


def check_methods(space: SearchSpace) -> None:
    """Raises UsageError if one of the space's methods cannot be measured by a search's protocol."""
    for method in space.parameters.get("method", ()):
        check_protocol(str(method), "fast")


def check_possible(space: SearchSpace, cap: int) -> None:
    """Raises UsageError with the reason of the first point if there is none in the space that can be measured."""
    first: UsageError | None = None
    for params in _likeliest(space).points():
        try:
            configuration_of(params, space, cap)
        except UsageError as error:
            first = first or error
        else:
            return
    raise UsageError(f"space {space.name!r}: none of its {space.size} points can be measured; for one, {first}")


def _likeliest(space: SearchSpace) -> SearchSpace:
    """The space with those choices alone that leave a window where others do; and, of the parameters that conditions
    depend on, and of those that decide how a method is executed, with all."""
    best: dict[str, Callable[[Any], Value]] = {
        "n_sink": min,
        "cache_slack": min,
        "total_kv": max,
        "compress_every": lambda choices: min(choices, key=lambda interval: interval or math.inf),
        "max_drop": lambda choices: max(choices, key=lambda drop: drop or math.inf),
        "attn_backend": min,
        "quantization": min,
    }
    deciding = {other for conditions in space.when.values() for other in conditions}
    few = {
        name: (best[name](choices),) if name in best and name not in deciding else choices
        for name, choices in space.parameters.items()
    }
    return replace(space, parameters=few)


def check_cap(space: SearchSpace, cap: int) -> None:
    """Raises PolicyError if the cap, or the largest total KV searched, leaves some point of the space no window."""
    widest = {name: max(int(x) for x in space.parameters[name]) for name in ("n_sink", "cache_slack")}
    largest = max(int(x) for x in space.parameters["total_kv"])
    try:
        with_derived_window(EvictionPolicy(**widest), min(cap, largest))
    except PolicyError as error:
        raise PolicyError(f"space {space.name!r}: {error}") from error
