"""`python -m orchestrator.sync STUDY`: brings MLflow up to date with a study; an empty server gets all of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from streamllm.files import is_file
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.printing import say
from streamllm.terminal.program import command, program

from .ending import WORDS

_PATIENCE_SEC = 60.0
"""For another that brings the same study up to date."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog=program("orchestrator.sync"),
        description="Bring MLflow up to date with a study. What is there already stays as it is.",
    )
    parser.add_argument("study", metavar="STUDY", help="a name under sweeps/, or the path of an output folder")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="address of MLflow ($MLFLOW_TRACKING_URI, or its own default store)"
    )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    from dashboards.loading import load

    from .workers.lease import study_lease

    try:
        folder = load(arguments.study).files
        with study_lease(folder, _PATIENCE_SEC):
            return _sync(str(folder.path), arguments.tracking_uri)
    except KeyboardInterrupt:
        print(WORDS, file=sys.stderr)
        return 130


def _sync(folder: str, tracking_uri: str | None) -> int:
    from rich.console import Console
    from rich.progress import track

    from streamllm.measuring.reference_time import ReferencePool
    from streamllm.results.checks import measured_row
    from streamllm.results.study import load_study
    from streamllm.results.study_folder import rows_and_damage

    from .conclusion import report_of, write_outputs
    from .tracking.client import told
    from .tracking.mlflow_runs import Projection

    results = load_study(folder)
    rows, _ = rows_and_damage(
        results.files.trials, measured_row
    )  # as the sweep logs them: what was confirmed comes with the close
    projection = Projection(results.files, results.configuration, tracking_uri)
    try:
        projection.open(lambda reason: print(reason, file=sys.stderr))
        logged = projection.log_all(rows, ReferencePool(rows))
        for _ in track(logged, "MLflow", len(rows), console=Console(stderr=True), transient=True):
            pass
        files = [*write_outputs(results), results.files.configuration]
        projection.close(results, report_of(results, [path for path in files if is_file(path)]))  # it may be lost
    except Exception as error:  # MLflow raises anything
        print(f"error: MLflow cannot be brought up to date: {told(error)}", file=sys.stderr)
        return 1
    for reason in projection.refused:
        print(f"error: MLflow refuses {reason}", file=sys.stderr)
    say(f"{results.name}: {len(rows)} runs in MLflow, {projection.logged} of them logged or completed just now")
    if projection.address:
        say(projection.address)
    return 1 if projection.refused else 0


if __name__ == "__main__":
    sys.exit(main())
