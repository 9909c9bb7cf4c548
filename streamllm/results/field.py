"""A field of the schema: everything known of a knob, a measure or a fact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Everything known of a knob, a measure or a fact, whoever shows it."""

    name: str = ""
    """Key of a row; of most exports too."""
    parameter: str = ""
    """A knob's name in spaces and on command lines."""
    header: str = ""
    """Header of a column."""
    unit: str = ""
    """Empty where the header says it, or there is none."""
    label: str = ""
    """Label of an axis."""
    short: str = ""
    """Where there is no room for the header."""
    symbol: str = ""
    """As the papers write it."""
    decimals: int | None = None
    """Where no interval says how many; None for words and whole numbers."""
    interval: bool = False
    """Whether rows may have `NAME_low` and `NAME_high`, a 95% interval."""
    words: bool = False
    knob: bool = False
    of_policy: bool = False
    """Whether a word is the policy's."""
    least: int | None = None
    """Least value of a knob that is a whole number."""
    usual: str | int | None = None
    """A knob's value where nobody says."""
    objective: Direction | None = None
    """Which way a sweep may optimise it; constraints are on the same measures."""
    told: str = ""
    """The value a search is told in its place: one that is known at once, and does not move when the reference's own
    time or the baseline's quality becomes better known. It is in the same order."""
    mlflow: Literal["param", "metric", "tag"] | None = None
    tag: str = ""
    """Its name in MLflow, where that is another."""
    final: bool = False
    """Whether it hangs on all trials, or on what was confirmed: MLflow's is brought up to date when a sweep ends."""
    of_study: bool = False
    """Whether trials of studies alone have it."""
    viewed: bool = False
    """Whether MLflow's table of runs shows it."""
    about: str = ""
    """A line of help."""


def fact(header: str = "", **more: Any) -> Any:
    """A fact that a row states about itself, in words or a number."""
    return dataclasses.field(default=None, metadata={"field": Field(header=header, **more)})


def word(header: str, usual: str, **more: Any) -> Any:
    return fact(header, words=True, knob=True, usual=usual, label=header, mlflow="tag", **more)


def tokens(header: str, symbol: str, least: int, usual: int | None, label: str, about: str, **more: Any) -> Any:
    """A knob that is a number of tokens."""
    return fact(
        header, symbol=symbol, unit="tokens", label=label, knob=True, least=least, usual=usual, about=about,
        **{"short": symbol, "mlflow": "param", "viewed": True} | more,
    )  # fmt: skip


def measure(header: str, unit: str = "", decimals: int | None = 2, **more: Any) -> Any:
    return fact(header, unit=unit, decimals=decimals, mlflow="metric", **more)
