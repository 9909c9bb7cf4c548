"""MLflow as a projection of the sweep: a parent run per study, a child run per trial.

Logging happens in a thread of its own, so that no worker waits for it, and only ever from rows the study has kept:
whatever a killed sweep did not log is logged when it goes on, under the same run.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .results import BASELINE
from .trial import TrialSpec

EXPERIMENT = "streamllm-sweep"

_PARAMS = (
    "n_sink",
    "window_size",
    "compress_every",
    "cache_slack",
    "max_drop",
    "method",
    "backend_requested",
    "execution",
    "dtype",
)
_TAGS = {
    "method": "method",
    "protocol": "protocol",
    "dataset": "dataset",
    "device": "device",
    "dtype": "dtype",
    "model": "model",
    "feasible": "feasible",
    "state": "state",
    "reason": "reason",
    "backend": "backend.used",
    "backend_requested": "backend.requested",
}
_METRICS = (
    "tpot_ms",
    "speedup",
    "perplexity",
    "ppl_increase_percent",
    "peak_kv",
    "decode_toks_per_sec",
    "quality_sec",
    "evaluated_tokens",
)


class Tracker:
    """An observer of the sweep that logs to MLflow behind its back."""

    def __init__(self, study: str, study_id: str, commit: str) -> None:
        self._study = study
        self._common = {"study": study, "study_id": study_id, "commit": commit}
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._runs: dict[str, str] = {}
        """Trial (or "" for the parent) -> run id."""
        self._logged: set[str] = set()
        self.problem: str | None = None
        self._jobs.put(self._open)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def worker_ready(self, worker: int, description: dict[str, Any]) -> None:
        pass

    def trial_started(self, worker: int, spec: TrialSpec) -> None:
        pass

    def trial_finished(self, row: dict[str, Any]) -> None:
        self._jobs.put(lambda: self._log_trial(row))

    def finish(self, rows: list[dict[str, Any]], front: list[int], artifacts: list[Path], status: str) -> None:
        """Logs what is missing, marks the front, attaches the artifacts to the parent, and waits until all is done."""
        for row in rows:
            self.trial_finished(row)
        self._jobs.put(lambda: self._close(rows, front, artifacts, status))
        self._jobs.put(None)
        self._thread.join()

    @property
    def backlog(self) -> int:
        return self._jobs.qsize()

    def _work(self) -> None:
        if sys.platform == "linux":  # where niceness is a thread's own: on a CPU, logging must not show in the timings
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        while (job := self._jobs.get()) is not None:
            if self.problem is not None:
                continue
            try:
                job()
            except Exception as error:  # a tracking server that is away must not stop the sweep
                self.problem = f"MLflow: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        self._experiment = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        known = self._client.search_runs(
            [self._experiment], f"tags.study_id = '{self._common['study_id']}'", max_results=50_000
        )
        for run in known:
            trial = run.data.tags.get("trial", "")
            self._runs[trial] = run.info.run_id
            if run.info.status != "RUNNING":
                self._logged.add(trial)
        if "" not in self._runs:
            tags = self._common | {"mlflow.source.name": "python -m orchestrator.sweep", "mlflow.source.type": "LOCAL"}
            run = self._client.create_run(self._experiment, tags=tags, run_name=self._study)
            self._runs[""] = run.info.run_id
        self._client.update_run(self._runs[""], status="RUNNING")

    def _log_trial(self, row: dict[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        trial = str(row["trial"])
        if trial in self._logged:
            return
        if trial not in self._runs:
            tags = self._common | {"trial": trial, "mlflow.parentRunId": self._runs[""]}
            self._runs[trial] = self._client.create_run(
                self._experiment, tags=tags, run_name=_run_name(row)
            ).info.run_id
        now = int(1000 * time.time())
        metrics = {f"{name}{end}" for name in _METRICS for end in ("", "_low", "_high")} & row.keys()
        self._client.log_batch(
            self._runs[trial],
            metrics=[Metric(name, float(row[name]), now, 0) for name in sorted(metrics)],
            params=[Param(name, str(row[name])) for name in _PARAMS if name in row],
            tags=[RunTag(tag, str(row[name])) for name, tag in _TAGS.items() if name in row],
        )
        self._client.log_dict(self._runs[trial], row, "result.json")
        self._client.set_terminated(self._runs[trial], "FINISHED" if row["state"] == "complete" else "FAILED")
        self._logged.add(trial)

    def _close(self, rows: list[dict[str, Any]], front: list[int], artifacts: list[Path], status: str) -> None:
        parent = self._runs[""]
        for row in rows:
            if row["state"] == "complete" and row["trial"] != BASELINE:
                self._client.set_tag(self._runs[str(row["trial"])], "pareto", str(row["trial"] in front))
        for path in artifacts:
            self._client.log_artifact(parent, str(path))
            if path.suffix == ".md":
                self._client.set_tag(parent, "mlflow.note.content", path.read_text(encoding="utf-8"))
        self._client.log_metric(parent, "trials", len(rows) - 1)
        self._client.log_metric(parent, "pareto_trials", len(front))
        self._client.set_terminated(parent, status)


def _run_name(row: dict[str, Any]) -> str:
    if row["trial"] == BASELINE:
        return "baseline"
    return (
        f"{row['trial']:03d} {row['method']} S={row['n_sink']} W={row['window_size']} R={row['compress_every']} "
        f"slack={row['cache_slack']} drop={row['max_drop']} {row['backend_requested']}"
    )
