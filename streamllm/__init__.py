"""streamllm: StreamingLLM policies on any rotary language model: exact quality, honest speed.

Import it before torch: that makes OpenMP's threads sleep while they wait (`environment.wait_passively`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .environment import wait_passively

if TYPE_CHECKING:
    from .configuration import Configuration
    from .engine.generation import StreamingCache
    from .engine.loading import load_model
    from .evaluating import Evaluation, Measuring, evaluate
    from .measuring.text import TextSource
    from .policy import EvictionPolicy

__all__ = [
    "Configuration",
    "Evaluation",
    "EvictionPolicy",
    "Measuring",
    "StreamingCache",
    "TextSource",
    "evaluate",
    "load_model",
]
__version__ = "0.1.0"

_HOME = {
    "Configuration": "configuration",
    "Evaluation": "evaluating",
    "EvictionPolicy": "policy",
    "Measuring": "evaluating",
    "StreamingCache": "engine.generation",
    "TextSource": "measuring.text",
    "evaluate": "evaluating",
    "load_model": "engine.loading",
}
"""Where each lives; it is imported when it is asked for, as torch takes seconds."""

wait_passively()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
