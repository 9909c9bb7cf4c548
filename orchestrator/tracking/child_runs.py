"""The run of a trial: all that is written to MLflow for one, in as few calls as there are for it.

`RunWriter` does that here; `WriterProcess` has a process of its own do it, as most of what a run costs is MLflow's own
Python, of which an interpreter runs one line at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, Protocol

from streamllm.measuring.store import MeasurementStore
from streamllm.results.mlflow_address import is_databricks
from streamllm.results.schema import FORMAT, AnyRow, Row

from .client import WriterError, is_refusal, mlflow_client, told
from .remedies import with_remedy
from .row_in_mlflow import dataset_of, metrics_of, params_of, run_name, tags_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT = "mlflow.parentRunId"
DIGEST = "digest"
"""Tag of a run that says what was logged of it."""
_UNFOLDED = {"mlflow.runType": "evaluation"}
"""Tag of a child that has MLflow's table of runs show it below its parent at a browser's first visit, where it would
else show the parent alone. Children stand below parents only where runs are sorted by their creation, as they are at
first; sorted by any other column, as in our view, the table is flat."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the runs of a study's trials go."""

    uri: str
    """Of MLflow's store."""
    experiment: str
    parent: str
    """The id of the study's run."""
    measurements: str
    """The measurement store's folder."""
    tags: Mapping[str, str]
    """That all have, unless a row says otherwise."""


class Writer(Protocol):
    """Raises whatever MLflow raises, or WriterError."""

    def write(self, run: str | None, row: AnyRow, timed: AnyRow, digest: str) -> str:
        """The id of the run, which is created unless it is there, and is complete then: it has what `row` says, and the
        metrics of `timed`."""
        ...

    def update(self, run: str, metrics: Mapping[str, float], times: Mapping[str, int]) -> None:
        """times: of each metric, in milliseconds since 1970."""
        ...

    def close(self) -> None: ...


def started_at(row: AnyRow) -> int:
    """When its measuring began, in milliseconds since 1970; where nothing was measured, when it was found."""
    return int(1000 * row["finished_at"]) - (0 if row.get("reused") else int(1000 * row.get("measuring_sec", 0)))


class RunWriter:
    """Writes in this process."""

    def __init__(self, client: MlflowClient, to: Destination) -> None:
        self._client = client
        self._to = to
        self._store = MeasurementStore(Path(to.measurements))

    def write(self, run: str | None, row: AnyRow, timed: AnyRow, digest: str) -> str:
        from mlflow.entities import Metric, Param, RunTag

        ended = int(1000 * row["finished_at"])
        tags, files = {**self._to.tags, **tags_of(row), **_UNFOLDED, DIGEST: digest}, ""
        if run is None:
            tags |= {PARENT: self._to.parent, "pareto": "False"}
            created = self._client.create_run(self._to.experiment, started_at(row), tags, run_name(row)).info
            run, files = str(created.run_id), created.artifact_uri
            tags = {}
        self._client.log_batch(
            run,
            metrics=[Metric(name, value, ended, 0) for name, value in metrics_of(timed).items()],
            params=[Param(name, value) for name, value in params_of(row).items()],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )
        self._log_dataset(run, row)
        self._log_artifacts(run, files, row)
        self._client.set_terminated(run, "FINISHED" if row["state"] == "complete" else "FAILED", ended)
        return run

    def update(self, run: str, metrics: Mapping[str, float], times: Mapping[str, int]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(run, metrics=[Metric(name, value, times[name], 0) for name, value in metrics.items()])

    def close(self) -> None:
        pass

    def _log_dataset(self, run: str, row: AnyRow) -> None:
        if (dataset := dataset_of(row, "python -m orchestrator.sweep")) is None:
            return
        try:
            self._client.log_inputs(run, [dataset])
        except Exception as error:  # of several who name a data set that is new to the experiment, one may
            if not is_refusal(error):
                raise
            self._client.log_inputs(run, [dataset])

    def _log_artifacts(self, run: str, files: str, row: AnyRow) -> None:
        """files: the address of the run's artifacts; "" has MLflow ask its store for all of the run to find it."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "result.json").write_text(json.dumps({"format": FORMAT, **row}, indent=1) + "\n")
            losses = self._store.losses_file(row["quality_entry"]) if "quality_entry" in row else None
            if losses is not None and losses.is_file():
                shutil.copyfile(losses, Path(folder) / "losses.npy")
            if files and not is_databricks(self._to.uri):
                get_artifact_repository(files, tracking_uri=self._to.uri).log_artifacts(folder)
            else:
                self._client.log_artifacts(run, folder)


class WriterProcess:
    """Writes in another process, which ends with this one, however this one ends: its standard input does."""

    def __init__(self, to: Destination, lock: int) -> None:
        """lock: an open file, which is kept open as long as it may write."""
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lock,)
        )
        self._to = to
        self._is_told = False

    def write(self, run: str | None, row: AnyRow, timed: AnyRow, digest: str) -> str:
        return str(self._ask({"write": [run, dict(row), dict(timed), digest]}))

    def update(self, run: str, metrics: Mapping[str, float], times: Mapping[str, int]) -> None:
        self._ask({"update": [run, dict(metrics), dict(times)]})

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, what: Mapping[str, Any]) -> str | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        lines = [what] if self._is_told else [asdict(self._to), what]
        self._is_told = True
        try:
            self._process.stdin.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise WriterError("a process that writes to MLflow has died", is_refusal=False) from error
        if "error" in answer:
            raise WriterError(answer["error"], answer["is_refusal"])
        return str(answer["run"]) if answer["run"] is not None else None


def serve() -> None:
    """What such a process runs: after a line that says where to, each that it reads is something to write, and is
    answered by a line. It ends as soon as there is nobody to answer, whatever it is writing: another may wait to go on
    from there."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever MLflow prints is no answer
    to = Destination(**json.loads(sys.stdin.readline()))
    asked: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_write_all, args=(asked, answers, to), daemon=True).start()
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def _write_all(lines: SimpleQueue[str], answers: IO[str], to: Destination) -> None:
    writer: RunWriter | None = None
    while True:
        line = lines.get()
        try:
            asked = json.loads(line)
            writer = writer or RunWriter(mlflow_client(to.uri), to)
            if "write" in asked:
                run, row, timed, digest = asked["write"]
                _answer(answers, run=writer.write(run, Row.of(row), Row.of(timed), digest))
            else:
                writer.update(*asked["update"])
                _answer(answers, run=None)
        except Exception as error:  # MLflow raises anything
            with_remedy(error, to.uri, to.experiment)
            _answer(answers, error=told(error), is_refusal=is_refusal(error))


def _answer(answers: IO[str], **what: object) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()
