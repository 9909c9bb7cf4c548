"""A search space's points as configurations, whether all of them can be made, and which one a row is of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from search_spaces import SearchSpace, Value
from streamllm.configuration import Configuration
from streamllm.engine.methods import check_cache, check_execution, check_protocol
from streamllm.errors import UsageError
from streamllm.policy import EvictionPolicy, PolicyError, with_derived_window
from streamllm.results.schema import KNOBS, POLICY_KNOBS, POLICY_WORDS, Row, words_of

_TRIED = 20_000
"""Points that a row may be of."""
_NAMES = {knob.parameter: knob.name for knob in KNOBS}
_SAID = ("method", "backend_requested", *(knob.name for knob in POLICY_KNOBS))
"""Knobs that a row must say, to be placed."""


def configuration_of(params: Mapping[str, Value], space: SearchSpace, cap: int) -> Configuration:
    """The configuration that a point of the space stands for; its window is what its total KV leaves. Raises
    UsageError where it leaves none, or the method cannot be executed like that."""
    knobs = {name: int(params[name]) for name in ("n_sink", "compress_every", "cache_slack", "max_drop")}
    policy = EvictionPolicy.of({**knobs, "window_size": 1, **words_of(params)})
    policy = with_derived_window(policy, min(int(params["total_kv"]), cap), space.cap_accounting)
    method, backend, execution = (str(params[name]) for name in ("method", "attn_backend", "execution"))
    check_execution(method, execution)
    check_cache(method, policy)
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
        **{field.name: partial(min, key=field.usual.__ne__) for field in POLICY_WORDS},
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
        with_derived_window(
            EvictionPolicy(n_sink=widest["n_sink"], cache_slack=widest["cache_slack"]), min(cap, largest)
        )
    except PolicyError as error:
        raise PolicyError(f"space {space.name!r}: {error}") from error


def point_of(row: Row, space: SearchSpace, cap: int) -> dict[str, Value] | None:
    """The point of the space that the row measured; None if there is none."""
    if any(name not in row for name in _SAID):
        return None
    names = sorted(space.parameters, key="total_kv".__eq__)  # which rows do not say: tried before anything else changes
    choices = [_possible(name, row, space) for name in names]
    near = None
    for values in itertools.islice(itertools.product(*choices), _TRIED):
        point = space.complete(dict(zip(names, values, strict=True)))
        with suppress(UsageError):
            if is_of(row, point, space, cap):
                if row.window_size in _windows(point, space, cap):
                    return point
                near = near or point
    return near


def is_of(row: Row, point: Mapping[str, Value], space: SearchSpace, cap: int) -> bool:
    """Whether the row, as far as it says, is a measurement of that point, whatever its window is. Raises UsageError
    where the point stands for no configuration."""
    what = configuration_of(point, space, cap)
    policies = (what.policy, what.effective)
    asked = {"method": what.method, "backend_requested": what.backend, "execution": what.execution}
    if what.quantization is not None:
        asked["quantization"] = what.quantization
    knobs = [field.name for field in POLICY_KNOBS if field.name != "window_size" and field.name in row]
    return all(row.get(name, value) == value for name, value in asked.items()) and any(
        all(getattr(policy, name) == row[name] for name in knobs) and words_of(asdict(policy)) == words_of(row)
        for policy in policies
    )


def _windows(point: Mapping[str, Value], space: SearchSpace, cap: int) -> tuple[int, int]:
    what = configuration_of(point, space, cap)
    return what.policy.window_size, what.effective.window_size


def _possible(name: str, row: Row, space: SearchSpace) -> Sequence[Value]:
    """The values that the row may have been given: its own or, of a number that its method makes another of, any."""
    choices = space.parameters[name]
    value = row.get(_NAMES[name])
    if value in choices:
        return (value,)
    if isinstance(value, str) and value != space.defaults.get(name):
        return ()
    return choices
