"""Pareto tables and figures of finished and running sweeps; from Python, `load_study` gives them as pandas' frames."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# `python -m` looks for modules first where it is given, among other people's files; one may be called as one of
# ours or of a library's. Where this package lies elsewhere, nothing is to be found there.
_is_command = sys.argv[:1] == ["-m"] and f" -m {__name__}" in " ".join(sys.orig_argv) and not sys.flags.safe_path
if _is_command and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes that are started

if TYPE_CHECKING:
    from .tables.frames import load_study

__all__ = ["load_study"]


def __getattr__(name: str) -> object:
    if name != "load_study":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .tables.frames import load_study

    return load_study
