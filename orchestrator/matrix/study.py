"""A matrix as a study: what it was asked for and a row per cell, which MLflow, the report and the servers read."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamllm.errors import UsageError
from streamllm.results.schema import Row
from streamllm.results.study_folder import StudyFolder
from streamllm.terminal.printing import say

from ..configuration import commit, versions
from ..trials_file import TrialsFile
from ..unwritable import writing
from . import cells
from .plan import Document, MatrixPlan, Planned

if TYPE_CHECKING:
    from ..ending import Ending
    from ..tracking.follower import Tracker

_OBJECTIVES = {"tpot_ms": "minimize", "ppl_increase_percent": "minimize"}


class MatrixStudy:
    """Kept up to date while cells are measured, in MLflow too."""

    def __init__(self, plan: MatrixPlan, documents: dict[Path, Document], tracking_uri: str | None) -> None:
        from ..tracking.follower import Tracker
        from ..tracking.mlflow_runs import Projection

        self._plan = plan
        self._numbers = {planned.file: number for number, planned in enumerate(plan.cells)}
        self._tracking_uri = tracking_uri
        self.folder = StudyFolder(plan.folder)
        known, _ = self.folder.known_configuration()
        _check_same(plan, known)
        settings = _settings(plan, str((known or {}).get("study_id") or uuid.uuid4().hex))
        self.folder.write_configuration(settings)
        rows = [self.row(planned, documents[planned.file]) for planned in plan.cells if planned.file in documents]
        self._trials = TrialsFile(self.folder, rows)
        self._tracker: Tracker = Tracker(Projection(self.folder, settings, tracking_uri), self._trials)

    def finished(self, planned: Planned, document: Document) -> None:
        row = self.row(planned, document)
        with writing():
            self._trials.trial_finished(row)
        self._tracker.trial_finished(row)

    def row(self, planned: Planned, document: Document) -> Row:
        """A cell's: of what was compared with the baseline or, in its own cell, of that."""
        about = {
            "trial": self._numbers[planned.file],
            "cell": planned.file.stem,
            "finished_at": document["finished_at"],
            "commit": document["commit"],
        }
        if document["state"] == "complete":
            result = document["streaming"] if "streaming" in document else document["baseline"]
            about |= {"state": "complete", "feasible": True, "quantization": planned.cell.quantization}
            return Row.from_json(dict(result), planned.file.stem) | about
        cell = planned.cell
        reason = ("not to be had: " if document["state"] == "unavailable" else "") + document["reason"]
        about |= {"state": "failed", "reason": reason, "feasible": False, "method": cell.method}
        about |= {"backend_requested": cell.attn_backend, "execution": cell.execution}
        about |= {"quantization": cell.quantization, "protocol": cell.protocol, "dataset": planned.source.label}
        return Row.of(about | asdict(cells.policy_measured(planned, self._plan.trained_length)))

    def end(self, status: str, files: Sequence[Path], ending: Ending, note: Callable[[str], None]) -> None:
        """Writes how it ended and the report, and waits until MLflow has everything."""
        from dashboards.report import write_report
        from streamllm.results.study import load_study

        from ..conclusion import finish_tracking
        from ..tracking.mlflow_runs import Report

        with writing():
            self.folder.write_outcome(status)
        try:
            files = [*files, write_report(load_study(str(self.folder.path)))]
            say(f"report    {files[-1]}")
        except (OSError, ValueError) as error:  # the results are complete without it
            note(f"warning: the report could not be written: {error}")
        whole = Report([*files, self.folder.configuration], [self._plan.matrix.description])
        finish_tracking(self._tracker, whole, self.folder.path, ending, note, lambda _: None, self._tracking_uri)
        if self._tracker.address:
            say(f"MLflow    {self._tracker.address}")


def _check_same(plan: MatrixPlan, known: Mapping[str, Any] | None) -> None:
    """Raises UsageError where the folder has a search, or another matrix."""
    space = {} if known is None else known.get("space", {})
    if known is None or ("columns" in space and (space["name"], known["model"]) == (plan.matrix.name, plan.model)):
        return
    raise UsageError(
        f"study {plan.name!r} exists, with {known['model']} and space {space.get('name', '?')!r}; give another --study"
    )


def _settings(plan: MatrixPlan, study_id: str) -> dict[str, Any]:
    """What `sweep.json` says."""
    from streamllm.engine.loading import weights_digest

    matrix = plan.matrix
    protocols = dict.fromkeys(planned.cell.protocol for planned in plan.cells)
    columns = {protocol: list(matrix.shown(protocol)) for protocol in protocols}
    dtypes = dict.fromkeys(planned.cell.dtype for planned in plan.cells)
    quantizations = dict.fromkeys(planned.cell.quantization for planned in plan.cells)
    texts = ", ".join(dict.fromkeys(planned.source.label for planned in plan.cells))
    return {
        "study": plan.name,
        "study_id": study_id,
        "summary": f"{plan.model} on {texts}, matrix {matrix.name}, total KV {plan.cap}",
        "model": plan.model,
        "model_digest": weights_digest(plan.model),
        "dtype": ", ".join(dtypes),
        "quantization": ", ".join(quantizations),
        "source": {},
        "cap": plan.cap,
        "objectives": _OBJECTIVES,
        "seed": 0,
        "space": {"name": matrix.name, "description": matrix.description, "columns": columns},
        "versions": versions(),
        "commit": commit(),
    }
