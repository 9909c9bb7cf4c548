"""Measurements as jobs: what can be asked for, once for all who ask, and plans that ask for them.

A plan is a generator: it yields the jobs that it needs next, all at once, and is sent their results in that order. Who
runs it decides where they are measured: in this process (`Measurements`), or by any number of workers.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from ..configuration import Configuration

T = TypeVar("T")

More = Literal["first_token", "energy"]
"""Kinds of jobs that take what is measured where it is asked for."""
MORE: tuple[More, ...] = get_args(More)
_NAMES = {"times": "speed", "first_token": "time to first token"}


@dataclass(frozen=True, slots=True)
class TaskAsked:
    """A task of lm-evaluation-harness as it is put to all configurations alike."""

    name: str
    options: str
    """As JSON: how it is put."""
    key: str
    """As JSON: all that determines its result besides the model and its policy."""


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement of a model on a text."""

    kind: Literal["quality", "hits", "speed", "whole", "times", "task", "first_token", "energy"]
    """quality: of the policy, by protocol `fast`. hits: the same, with whether each token was the likeliest. speed: in
    the steady state. whole: both from one run, by another protocol. times: those of a round of confirming, which are
    kept with the round and not in the store. task: the scores of one. first_token: the time to it. energy: per
    token, in the steady state."""
    what: Configuration
    protocol: str = "fast"
    run: int = 0
    """The same again, for its own sake; below 0: to see what others beside it do to it."""
    batch: int | None = None
    """Of a quality that is sampled: which part of the sample."""
    tokens: int | None = None
    """Of one whose parts have been put together: how many losses they are. Nobody measures it."""
    keeps: bool = False
    """Of a quality: with the distributions that others are compared with."""
    against: tuple[str, ...] = ()
    """Of a quality: the entries with the distributions that it is compared with, the reference's and then, if any,
    those of parts of re-computation's sample."""
    task: TaskAsked | None = None
    peek: bool = False
    """Only if the store has it: the result is None otherwise."""

    @property
    def is_of_use_with_arrays_only(self) -> bool:
        """The reference's, which is asked for for their sake; a part of a sample is also without."""
        return self.keeps and self.batch is None

    @property
    def is_timed(self) -> bool:
        return self.kind not in ("quality", "hits", "task")

    def __str__(self) -> str:
        kind = "" if self.kind == "whole" else f"{_NAMES.get(self.kind, self.kind)} of "
        if self.task is not None:
            kind = f"{self.task.name} under "
        again = f", round {self.run}" if self.kind == "times" else f", run {self.run + 1}" if self.run else ""
        if self.run < 0:
            again = ", to see whether workers disturb one another"
        return f"{kind}{self.what}{again}"


Plan = Generator[Sequence[Job], Sequence[Any], T]
"""Its results are of type Done or, of a job that peeks, None."""
