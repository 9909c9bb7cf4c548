"""`--track`: what a command has measured goes to MLflow too. What logs it is named by a string, as the commands of the
packages around this one are: this package imports none of them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..results.schema import knobs_in_short

if TYPE_CHECKING:
    import numpy as np

LOGGER = "orchestrator.tracking.single"
"""Module with `log(results, uri, waiting) -> addresses`, and `told(error) -> a line`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run of MLflow's, as it is to be."""

    record: Mapping[str, Any]
    """A row, or its facts with numbers of other names, which are metrics too."""
    name: str = ""
    """Of the run; made of the record unless given."""
    command: str = ""
    """Its name; `Tracking` sets it."""
    began_at: float = 0.0
    """Seconds since 1970; likewise."""
    description: str = ""
    documents: Mapping[str, Any] = field(default_factory=dict)
    """Name of an artifact -> what it says, as JSON."""
    files: Sequence[Path] = ()
    """Artifacts too."""
    losses: np.ndarray | None = None
    """(n, 2): position, nats; the artifact losses.npy."""
    repeats: Sequence[Result] = ()
    """What it is the mean of: runs below it."""


def add_tracking_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--track", action="store_true", help="log the result to MLflow, beside the runs of sweeps")
    group.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="address of MLflow ($MLFLOW_TRACKING_URI, or its own default store); means --track",
    )


class Tracking:
    """What a command that runs does of it; nothing, unless it was asked for. It never raises what MLflow does."""

    def __init__(self, arguments: argparse.Namespace, command: str) -> None:
        self._wanted = arguments.track or arguments.tracking_uri is not None
        self._uri = arguments.tracking_uri
        self._quantization = arguments.quantization
        self._command = command
        self._began_at = time.time()

    @contextmanager
    def measuring(self, subject: Mapping[str, Any]) -> Iterator[None]:
        """What fails herein, and is not the user's doing, is logged as a failed run of what was to be measured."""
        try:
            yield
        except UsageError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.log(Result(record={**subject, "state": "failed", "reason": reason}))
            raise

    def log(self, *results: Result) -> None:
        """Says on stderr where MLflow shows the first, or why it has none."""
        if not self._wanted:
            return
        try:
            logger = import_module(LOGGER)
            with redirect_stdout(sys.stderr):  # stdout is the result's
                addresses = logger.log([self._completed(one) for one in results], self._uri, _say)
        except Exception as error:  # MLflow raises anything, and may not be there
            _say(f"warning: not logged to MLflow: {_told(error)}")
            return
        _say(f"MLflow    {addresses[0]}")

    def _completed(self, result: Result) -> Result:
        record = {"state": "complete", "quantization": self._quantization} | dict(result.record)
        words = (self._command, record["method"], knobs_in_short(record), record.get("backend_requested", ""))
        return replace(
            result,
            record=record,
            name=result.name or " ".join(word for word in words if word),
            command=self._command,
            began_at=self._began_at,
            repeats=[self._completed(one) for one in result.repeats],
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _told(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; pip install mlflow"
    return str(import_module(LOGGER).told(error))
