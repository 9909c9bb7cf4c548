"""The end of a sweep: its front, recommendation, tables, figures and report, MLflow, what to type next."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dashboards.figures import write_figures
from dashboards.findings import findings
from dashboards.pareto import export, print_table
from dashboards.published import write_published
from dashboards.recommendation import recommended, record
from dashboards.report import FIGURES, write_report
from streamllm.errors import one_line
from streamllm.files import explained
from streamllm.results.checks import checked_front
from streamllm.results.damaged import read_lines
from streamllm.results.front import dominators
from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults, load_study
from streamllm.results.study_folder import append_line
from streamllm.terminal.printing import discard, say

if TYPE_CHECKING:
    from .configuration import SweepConfiguration
    from .ending import Ending
    from .screen.display import Display
    from .tracking.follower import Tracker
    from .tracking.mlflow_runs import Report


def conclude(
    configuration: SweepConfiguration,
    tracker: Tracker,
    display: Display,
    ending: Ending,
    tracking_uri: str | None = None,
) -> None:
    """Tables, figures, the recommendation, MLflow, and what to type next.

    tracking_uri: of MLflow, as far as the command line gave one."""
    results = load_study(str(configuration.output))
    files = [configuration.folder.configuration]
    if results.trials:
        keep_recommendation(results)
        for reason in keep_front(results):
            display.note(reason)
        try:
            print_table(results)
        except OSError as error:  # what follows it, MLflow above all, is not lost with it
            discard(sys.stdout)
            display.note(f"warning: the table could not be printed ({explained(error)}); {configuration.output} has it")
        try:
            files += write_outputs(results)
        except Exception as error:  # the results are complete without it
            display.note(
                f"warning: the report could not be written ({one_line(error)}); "
                f"{_python()} -m dashboards.report {configuration.output} tries again"
            )
    whole = report_of(results, files)
    finish_tracking(tracker, whole, configuration.output, ending, display.note, display.draining, tracking_uri)
    if results.trials:
        say(_next_steps(configuration, _in_store(tracking_uri), tracker.address))


def finish_tracking(
    tracker: Tracker,
    report: Report,
    folder: Path,
    ending: Ending,
    note: Callable[[str], None],
    draining: Callable[[int], None],
    tracking_uri: str | None,
) -> None:
    """Waits until MLflow has everything, and says if it has not. draining: told how much it lacks."""
    try:
        problem = tracker.finish(report, draining)
    except KeyboardInterrupt:
        ending.was_heard()
        problem = "interrupted"
    if problem is not None:
        note(
            f"warning: MLflow does not have everything yet ({problem}); the results are complete in {folder}, and this "
            f"brings it up to date: {_python()} -m orchestrator.sync {folder}{_in_store(tracking_uri)}"
        )


def _in_store(tracking_uri: str | None) -> str:
    """The option that names MLflow's store."""
    return f" --tracking-uri {shlex.quote(tracking_uri)}" if tracking_uri else ""


def _next_steps(configuration: SweepConfiguration, in_store: str, in_mlflow: str) -> str:
    """in_store: the option that names MLflow's store; in_mlflow: where that shows the study. "" if there is none."""
    python = _python()
    more = f" with --trials {2 * configuration.trials}" if configuration.search.time_budget is None else ""
    return "\n".join(
        (
            f"report    {configuration.output}/report.html; tables and figures beside it",
            f"browse    {python} -m dashboards.serve{in_store}",
            *([f"MLflow    {in_mlflow}"] if in_mlflow else []),
            f"export    {python} -m dashboards.pareto {configuration.output} --format latex,parquet --all",
            f"go on     the same command{more}",
            f"bigger    {python} -m orchestrator.sweep --model EleutherAI/pythia-2.8b --dataset-name pg19 "
            f"--max-eval-tokens 20000",
        )
    )


def _python() -> str:
    """How to type the interpreter that runs this."""
    executable = Path(sys.executable)
    if shutil.which("python") == str(executable):
        return "python"
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)


def keep_recommendation(results: StudyResults) -> None:
    """Adds what is recommended, why and its command to `sweep.json`."""
    found = record(results, recommended(results, results.front))
    results.files.write_configuration(results.files.read_configuration() | {"recommendation": found})


def report_of(results: StudyResults, files: Sequence[Path]) -> Report:
    """What MLflow shows of the whole study."""
    from .tracking.mlflow_runs import Report

    if results.is_matrix:
        return Report(files, [results.configuration["space"].get("description", "")])
    advised = record(results, recommended(results, results.front))
    return Report(files, findings(results, results.front).paragraphs, advised["trial"], advised["command"])


def keep_front(results: StudyResults) -> list[str]:
    """Adds the study's front to `fronts.jsonl`. Returns why trials are no longer on it, a line each."""
    path, front = results.files.fronts, results.front
    fronts, _ = read_lines(path, checked_front)
    before = fronts[max(fronts)] if fronts else []
    now = [row["trial"] for row in front]
    left = [row for row in results.trials if row["trial"] in set(before) - set(now)]
    reasons = [
        f"trial {row['trial']} is no longer on the front: {_why_left(row, better, now)}"
        for row, better in zip(left, dominators(left, results.trials, results.objectives), strict=True)
    ]
    if now != before:
        entry = {"at": time.time(), "trials": len(results.trials), "front": now, "left": reasons}
        append_line(path, json.dumps(entry))
    return reasons


def _why_left(row: AnyRow, better: AnyRow | None, front: Sequence[int]) -> str:
    if not row.get("feasible", True):
        return f"measured again, it breaks {row['violated']}"
    if better is not None:
        return f"measured again, trial {better['trial']} is better in every objective"
    if not row.get("rounds"):
        return "it was not confirmed this time"
    alike = [trial for trial in row.get("not_told_from", ()) if trial in front]
    return f"it cannot be told from {' and '.join(f'trial {trial}' for trial in alike) or 'others'}, which is on it"


def write_outputs(results: StudyResults) -> list[Path]:
    """Tables, figures and the report made of them, as files of the folder; of the space `paper` the source documents'
    main table too. Of a matrix the report: it writes its tables itself."""
    if results.is_matrix:
        return [*sorted(results.folder.glob("*.md")), write_report(results)]
    figures = write_figures([results], results.folder, ("png",), only=FIGURES).paths
    theirs = write_published(results) if results.configuration.get("space", {}).get("name") == "paper" else []
    html = write_report(results, figures=figures)
    return [*export(results, ("md", "csv")), *theirs, *figures, html]
