"""MLflow runs of single evaluations, which belong to no study: what `--track` of streamllm's commands logs."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamllm.results.mlflow_address import shown_at, store_uri
from streamllm.results.schema import ENDS, FIELDS, AnyRow
from streamllm.terminal.tracking import Result

from ..configuration import commit
from .child_runs import PARENT
from .client import find_experiment, mlflow_client, told
from .locks import opening
from .mlflow_runs import NOTE, shortened
from .remedies import ExperimentDeletedError, with_remedy
from .row_in_mlflow import dataset_of, is_number, params_of, tags_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["log", "told"]


def log(results: Sequence[Result], tracking_uri: str | None, waiting: Callable[[str], None]) -> list[str]:
    """A run per result, in the experiment of the sweeps -> where MLflow shows them. `waiting` is told if others who
    open the database are waited for.

    Raises whatever MLflow raises; a run that was begun is FAILED then."""
    uri, experiment_id = store_uri(tracking_uri), ""
    try:
        with opening(uri, waiting):
            client = mlflow_client(uri)
            experiment = find_experiment(client)
        experiment_id = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            raise ExperimentDeletedError(experiment.name)
        runs = [_Logger(client, experiment_id).log(result) for result in results]
    except Exception as error:
        with_remedy(error, uri, experiment_id)
        raise
    return [shown_at(uri, f"/#/experiments/{experiment_id}/runs/{run}") or f"run {run}" for run in runs]


class _Logger:
    def __init__(self, client: MlflowClient, experiment: str) -> None:
        self._client = client
        self._experiment = experiment

    def log(self, result: Result, parent: str | None = None) -> str:
        """The id of its run."""
        program = f"python -m streamllm {result.command}"
        source = {"mlflow.source.name": program, "mlflow.source.type": "LOCAL", "command": result.command}
        tags = tags_of({"commit": commit(), **result.record}) | source
        tags |= {PARENT: parent} if parent else {}
        tags |= {NOTE: shortened(result.description)} if result.description else {}
        run = self._client.create_run(self._experiment, int(1000 * result.began_at), tags, result.name).info.run_id
        try:
            self._fill(run, result, program)
        except Exception as error:
            with suppress(Exception):  # the server may be away by now
                self._client.set_tag(run, "reason", told(error))
                self._client.set_terminated(run, "FAILED")
            raise
        return str(run)

    def _fill(self, run: str, result: Result, program: str) -> None:
        from mlflow.entities import Metric, Param

        now = int(1000 * time.time())
        self._client.log_batch(
            run,
            metrics=[Metric(name, value, now, 0) for name, value in _metrics(result.record).items()],
            params=[Param(name, value) for name, value in params_of(result.record).items()],
        )
        if (dataset := dataset_of(result.record, program)) is not None:
            self._client.log_inputs(run, [dataset])
        self._log_artifacts(run, result)
        for repeat in result.repeats:
            self.log(repeat, run)
        self._client.set_terminated(run, "FINISHED" if result.record["state"] == "complete" else "FAILED")

    def _log_artifacts(self, run: str, result: Result) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, content in result.documents.items():
                (folder / file).write_text(json.dumps(content, indent=2) + "\n")
            if result.losses is not None:
                np.save(folder / "losses.npy", result.losses)
            if any(folder.iterdir()):
                self._client.log_artifacts(run, name)
        for path in result.files:
            self._client.log_artifact(run, str(path))


def _metrics(record: AnyRow) -> dict[str, float]:
    """The schema's, and numbers that the schema does not know."""
    found = {}
    for name, value in record.items():
        end = next((end for end in ENDS if name.endswith(end)), "")
        field = FIELDS.get(name) or FIELDS.get(name.removesuffix(end))
        if is_number(value) and (field is None or field.mlflow == "metric"):
            found[name] = float(value)
    return found
