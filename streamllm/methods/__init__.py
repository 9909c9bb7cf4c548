"""The methods: one file each, its name the method's.

A method's module has `decoder(loaded, policy, backend) -> Decoder` and, where it means only a part of the policy,
`effective(policy) -> EvictionPolicy`. Whatever lies in this folder is a method: adding one is adding a file.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..policy import EvictionPolicy

if TYPE_CHECKING:
    from ..backends import Backend
    from ..decoding import Decoder
    from ..models import LoadedModel

METHODS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))


def effective_policy(method: str, policy: EvictionPolicy) -> EvictionPolicy:
    """The policy as the method understands it: `window` has no sinks, `dense` never evicts."""
    adapt = getattr(import_module(f".{method}", __package__), "effective", None)
    return adapt(policy) if adapt is not None else policy


def make_decoder(method: str, loaded: LoadedModel, policy: EvictionPolicy, backend: Backend) -> Decoder:
    """A decoder with an empty cache."""
    module = import_module(f".{method}", __package__)
    decoder: Decoder = module.decoder(loaded, effective_policy(method, policy), backend)
    return decoder
