"""The commands by their names, and how the one that runs was called: by its name, or by that of its module."""

from __future__ import annotations

import sys
from pathlib import Path

COMMANDS = {
    "sweep": ("orchestrator.sweep", "search the knobs for the best trade-offs of speed and perplexity"),
    "sync": ("orchestrator.sync", "bring MLflow up to date with a study"),
    "pareto": ("dashboards.pareto", "a study's Pareto table, what is recommended, and why"),
    "report": ("dashboards.report", "a study as one HTML file"),
    "figures": ("dashboards.figures", "figures of studies, PNG and PDF"),
    "summarize": ("dashboards.summarize", "tables of evaluations' JSON files"),
    "published": ("dashboards.published", "the source documents' tables beside a study of the space `paper`"),
    "serve": ("dashboards.serve", "MLflow's UI, optuna-dashboard and the reports, on this machine only"),
}
"""Those of the packages around this one: name -> module with a `main(argv)`, and a line of help."""


def program(module: str) -> str:
    """What to call it in its help."""
    if Path(sys.argv[0]).stem != "streamllm":
        return f"python -m {module}"
    return " ".join(["streamllm", *(name for name, (other, _) in COMMANDS.items() if other == module)])
