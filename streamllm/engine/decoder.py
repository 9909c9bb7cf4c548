"""The decoder of a configuration."""

from __future__ import annotations

from ..configuration import Configuration
from .decoding import Decoder
from .methods import check_execution, method_named
from .model import LoadedModel


def make_decoder(loaded: LoadedModel, what: Configuration) -> Decoder:
    """With an empty cache. Raises UsageError as `check_execution`, and for what the device lacks."""
    check_execution(what.method, what.execution)
    return method_named(what.method).decoder(loaded, what.effective, what.kernel, what.execution)
