"""The methods: one file each, its name the method's, which defines the method as `METHOD`.

Whatever lies in this folder is a method: adding one is adding a file. Those in `negative` are known by name as well,
but not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...errors import UnavailableError, UsageError
from ...options import EXECUTIONS, PROTOCOLS
from ...policy import EvictionPolicy

Keys = Literal["raw", "stream", "cache"]

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..backends import Backend
    from ..decoding import Decoder, Progress
    from ..model import LoadedModel

    See = Callable[[int, Tensor], None]
    """Is shown the logits (k, vocabulary) after tokens p, p + 1, ..., p + k - 1 of a text: p, and they."""
    SampledLosses = Callable[[LoadedModel, np.ndarray, int, Sequence[int], Backend, Progress | None, See], np.ndarray]
    """(model, tokens (n), window, ascending positions, backend, progress, see) -> losses (float64 nats) of the tokens
    after the windows that end at those positions."""

_FOLDER = Path(__file__).parent
_FILES = {path.stem: path.relative_to(_FOLDER) for path in _FOLDER.rglob("[a-z]*.py")}
METHODS = tuple(sorted(_FILES))
"""All names."""
OFFERED = tuple(name for name in METHODS if _FILES[name].parent == Path())
"""Those that a help lists."""


def _all_of_it(policy: EvictionPolicy) -> EvictionPolicy:
    return policy


def _no_window(policy: EvictionPolicy, window: int) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Method:
    """A way to keep the cache, or to do without one."""

    decoder: Callable[[LoadedModel, EvictionPolicy, Backend, str], Decoder]
    """(model, policy as `effective` gives it, attention backend, one of `executions`) -> a decoder with an empty
    cache."""
    effective: Callable[[EvictionPolicy], EvictionPolicy] = _all_of_it
    """The part of a policy that it means. Raises UsageError for a policy that it can do nothing with."""
    executions: tuple[str, ...] = ("eager",)
    """How its steps can be run: all ways, if they have static shapes."""
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    """How it can be measured."""
    keys: Keys | None = None
    """How it keeps keys, if its cache can be of another number format than the model: raw, as they are before they are
    rotated; stream, rotated at their positions in the stream, the sinks turned after the evicted tokens; cache, rotated
    at their places in the cache when they came, and again at each prune. Each rounds something else."""
    by_layer: bool = False
    """Whether layers can hold different numbers of tokens (`layer_budgets`): it has the model turn what is new in all
    layers alike, not at its place in a layer's cache."""
    holds_window: Callable[[EvictionPolicy, int], bool] = _no_window
    """Whether a layer with so long a sliding window of its own holds that many tokens and no more, by its policy; else
    it holds what the policy leaves, and a mask hides some of it."""
    losses_at: SampledLosses | None = None
    """If no eviction schedule says what it sees: its quality is then sampled instead of computed block-parallel."""
    library: str | None = None
    """Of an implementation that is not ours: the package whose version its results depend on."""
    approximate: Mapping[str, str] | None = None
    """Of such a one: dtype -> why it computes no more than nearly the policy's function there.
    Then the block-parallel evaluator does not speak for it."""


def method_named(name: str) -> Method:
    method: Method = import_module(f"...{module_of(name)}", __package__).METHOD
    return method


def module_of(name: str) -> str:
    """The module of the method's file, from `streamllm` on: `engine.methods.ring`."""
    return ".".join(("engine", "methods", *_FILES[name].with_suffix("").parts))


def sampled_losses(method: str) -> SampledLosses | None:
    """The method's `losses_at`; None if the block-parallel evaluator gives its quality."""
    return method_named(method).losses_at


def exactness(method: str, dtype: str) -> str | None:
    """What a row says of an implementation that is not ours: `exact`, the policy's function to rounding, or
    `approximate` and why."""
    approximate = method_named(method).approximate
    if approximate is None:
        return None
    return f"approximate: {approximate[dtype]}" if dtype in approximate else "exact"


def is_evaluated(method: str, dtype: str = "auto") -> bool:
    """Whether the block-parallel evaluator gives the method's logits; else they come from decoding. dtype: the model's,
    where it is known."""
    one = method_named(method)
    return one.losses_at is None and "fast" in one.protocols and dtype not in (one.approximate or ())


def check_execution(method: str, execution: str) -> None:
    """Raises UsageError for a way that there is not, or that the method's step cannot be run."""
    if execution not in EXECUTIONS:
        raise UsageError(f"execution {execution!r}: must be one of {', '.join(EXECUTIONS)}")
    allowed = method_named(method).executions
    if execution not in allowed:
        able = [name for name in METHODS if execution in method_named(name).executions]
        raise UsageError(
            f"execution {execution!r}: the steps of method {method!r} change shape, {' or '.join(allowed)} runs them; "
            f"use --method {' or '.join(able)}"
        )


def check_cache(method: str, policy: EvictionPolicy) -> None:
    """Raises UsageError for a method whose cache is of the model's number format only, or as long in every layer."""
    if not policy.is_uniform and not method_named(method).by_layer:
        able = [name for name in OFFERED if method_named(name).by_layer]
        raise UsageError(
            f"layer_budgets {policy.layer_budgets!r}: method {method!r} holds as many tokens in every layer; "
            f"use uniform, or --method {' or '.join(able)}"
        )
    if policy.kv_dtype != "auto" and method_named(method).keys is None:
        able = [name for name in OFFERED if method_named(name).keys is not None]
        raise UsageError(
            f"kv_dtype {policy.kv_dtype!r}: method {method!r} keeps nothing in another number format than the model's; "
            f"use auto, or --method {' or '.join(able)}"
        )


def check_protocol(method: str, protocol: str, dtype: str = "auto") -> None:
    """Raises UnavailableError for a method that cannot be measured so. dtype: of the model, where it is known."""
    approximate = method_named(method).approximate or {}
    if protocol == "fast" and dtype in approximate:
        raise UnavailableError(
            f"protocol 'fast': method {method!r} in {dtype} is only nearly the function that is evaluated "
            f"({approximate[dtype]}); use --protocol decode-loop, or --dtype float32"
        )
    allowed = method_named(method).protocols
    if protocol not in allowed:
        raise UnavailableError(f"protocol {protocol!r}: method {method!r} is measured by {' or '.join(allowed)} only")
