"""The methods: one file each, its name the method's.

A method's module has `decoder(loaded, policy, backend) -> Decoder`, and where it needs them

- `effective(policy) -> EvictionPolicy`, the part of a policy it means;
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


def make_decoder(method: str, loaded: LoadedModel, policy: EvictionPolicy, backend: Backend) -> Decoder:
    """A decoder with an empty cache."""
    decoder: Decoder = _module(method).decoder(loaded, effective_policy(method, policy), backend)
    return decoder


def sampled_losses(method: str) -> Callable[..., np.ndarray] | None:
    """The method's `losses_at`; None if the block-parallel evaluator gives its quality."""
    return getattr(_module(method), "losses_at", None)


def protocols(method: str) -> tuple[str, ...]:
    """The protocols a method can be measured by."""
    return getattr(_module(method), "PROTOCOLS", PROTOCOLS)


def _module(method: str) -> ModuleType:
    return import_module(f".{method}", __package__)
