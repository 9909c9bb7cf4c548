"""streamllm: StreamingLLM policies on any rotary language model: exact quality, honest speed.

Import it before torch: that makes OpenMP's threads sleep while they wait (`environment.wait_passively`).
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# `python -m` looks for modules first where it is given, among other people's files; one may be called as one of
# ours or of a library's. Where this package lies elsewhere, nothing is to be found there.
_is_command = sys.argv[:1] == ["-m"] and f" -m {__name__}" in " ".join(sys.orig_argv) and not sys.flags.safe_path
if _is_command and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes that are started

from .environment import wait_passively  # noqa: E402
from .version import __version__ as __version__  # noqa: E402

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
