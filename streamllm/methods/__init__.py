"""The methods: one file each, its name the method's.

A method's module has `decoder(loaded, policy, backend) -> Decoder`, and where it needs them

- `effective(policy) -> EvictionPolicy`, the part of a policy it means;
- `EXECUTIONS`, if its step has static shapes; its `decoder` then takes `execution` too;
- `PROTOCOLS`, if it does not go with all of them;
- `losses_at(loaded, tokens, window, positions, backend, progress) -> ndarray`, if no eviction schedule says what it
  sees: its quality is then sampled instead of computed block-parallel.

Whatever lies in this folder is a method: adding one is adding a file.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import UnavailableError, UsageError
from ..options import PROTOCOLS
from ..policy import EvictionPolicy

if TYPE_CHECKING:
    import numpy as np

    from ..backends import Backend
    from ..decoding import Decoder
    from ..loaded import LoadedModel

METHODS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))


def effective_policy(method: str, policy: EvictionPolicy) -> EvictionPolicy:
    """The policy as the method understands it: `window` has no sinks, `dense` never evicts."""
    adapt = getattr(_module(method), "effective", None)
    return adapt(policy) if adapt is not None else policy


def make_decoder(
    method: str, loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str = "eager"
) -> Decoder:
    """A decoder with an empty cache."""
    options = {} if execution == "eager" else {"execution": execution}
    decoder: Decoder = _module(method).decoder(loaded, effective_policy(method, policy), backend, **options)
    return decoder


def sampled_losses(method: str) -> Callable[..., np.ndarray] | None:
    """The method's `losses_at`; None if the block-parallel evaluator gives its quality."""
    return getattr(_module(method), "losses_at", None)


def check_execution(method: str, execution: str) -> None:
    """Raises UsageError for a way the method's step cannot be run."""
    allowed = getattr(_module(method), "EXECUTIONS", ("eager",))
    if execution not in allowed:
        able = [name for name in METHODS if execution in getattr(_module(name), "EXECUTIONS", ())]
        raise UsageError(
            f"execution {execution!r}: the steps of method {method!r} change shape, {' or '.join(allowed)} runs them; "
            f"use --method {' or '.join(able)}"
        )


def check_protocol(method: str, protocol: str) -> None:
    """Raises UnavailableError for a method that cannot be measured so."""
    allowed = getattr(_module(method), "PROTOCOLS", PROTOCOLS)
    if protocol not in allowed:
        raise UnavailableError(f"protocol {protocol!r}: method {method!r} is measured by {' or '.join(allowed)} only")


def _module(method: str) -> ModuleType:
    return import_module(f".{method}", __package__)
