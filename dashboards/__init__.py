"""Pareto tables and figures of finished and running sweeps; from Python, `load_study` gives them as pandas' frames."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tables.frames import load_study

__all__ = ["load_study"]


def __getattr__(name: str) -> object:
    if name != "load_study":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .tables.frames import load_study

    return load_study
