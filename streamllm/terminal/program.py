"""The commands by their names, how the one that runs was called, by its name or its module's, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path

from ..errors import UsageError
from ..files import explained
from .printing import tolerate

Main = Callable[[Sequence[str] | None], int]

COMMANDS = {
    "sweep": ("orchestrator.sweep", "search the knobs for the best trade-offs of speed and perplexity"),
    "sync": ("orchestrator.sync", "bring MLflow up to date with a study"),
    "pareto": ("dashboards.pareto", "a study's Pareto table, what is recommended, and why"),
    "report": ("dashboards.report", "a study as one HTML file"),
    "deploy": ("dashboards.deploy", "the recommended trial as a script, a custom_generate folder, flags of llama.cpp"),
    "figures": ("dashboards.figures", "figures of studies, PNG and PDF"),
    "summarize": ("dashboards.summarize", "tables of evaluations' JSON files"),
    "published": ("dashboards.published", "the source documents' tables beside a study or matrix of them"),
    "serve": ("dashboards.serve", "MLflow's UI, optuna-dashboard and the reports, on this machine only"),
}
"""Those of the packages around this one: name -> module with a `main(argv)`, and a line of help."""


def program(module: str) -> str:
    """What to call it in its help."""
    if Path(sys.argv[0]).stem != "streamllm":
        return f"python -m {module}"
    return " ".join(["streamllm", *(name for name, (other, _) in COMMANDS.items() if other == module)])


def command(main: Main) -> Callable[..., int]:
    """The `main` of a command, which returns its exit code: of what a user can do something about, a line."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        tolerate()
        try:
            _check_directory()
            return main(argv)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:  # of a disk that is full, a folder that is gone
            print(f"error: {error.filename or 'a file'}: {explained(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130

    return run


def _check_directory() -> None:
    """Raises UsageError; libraries end the process where there is none."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError("the working directory has been removed; change to one that is there") from None
