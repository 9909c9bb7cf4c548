"""How the figures of studies look: the engine's style, and labels."""

from __future__ import annotations

from streamllm.figure_style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    save,
    style,
)
from streamllm.results.schema import FIELDS

__all__ = [
    "BLACK",
    "BLUE",
    "CYCLE",
    "GREEN",
    "GREY",
    "LABELS",
    "MARKERS",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILLION",
    "NoDataError",
    "new_figure",
    "save",
    "style",
]

LABELS = {field.name: field.label for field in FIELDS.values() if field.label}
"""Labels of axes."""


class NoDataError(Exception):
    """A figure has nothing to show; the message says what it would take."""
