"""MLflow as a projection of a study: a parent run per study, a child run per trial, made of the study's folder and the
measurement store alone, so that any part of it can be made again at any time.

While a sweep runs, `follower` keeps it up to date. All it holds in memory of a run is its id and what was logged of it,
as a digest. What is in a run: `child_runs`; who write them: `writers`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from streamllm.measuring.reference_time import ReferencePool
from streamllm.results.mlflow_address import (
    artifact_page,
    fronts_page,
    runs_page,
    shown_at,
    store_uri,
    without_password,
)
from streamllm.results.schema import FIELDS, AnyRow, Row
from streamllm.results.study import STRICT, StudyResults
from streamllm.results.study_folder import StudyFolder, read_rows

from .child_runs import DIGEST, PARENT, Destination, RunWriter, Writer, started_at
from .client import find_experiment, is_refusal, mlflow_client, told
from .locks import opening, writing
from .remedies import ExperimentDeletedError, with_remedy
from .row_in_mlflow import PARAMS, digest_of, is_number
from .system_metrics import system_metrics
from .views import COLOR, RECOMMENDED, next_color, views
from .writers import Writers, pace_for

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run

_AT_THE_END = tuple(field.name for field in FIELDS.values() if field.final)
_IN_MS = ("tpot_ms", "tpot_ms_low", "tpot_ms_high", "decode_toks_per_sec")
"""What follows from a ratio and the median of all reference times."""
_MOVED = 1e-3
"""By so much, relatively, that median moves any run's milliseconds without their being logged again: in a long sweep,
each trial moves those of all others by some millionths."""
_PAGE = 200
"""Runs that are asked for at a time."""
_OF_ALL = ("device", "host", "model_digest", "text_digest", "version", "software")
"""Tags of the study's run: what its trials say there, each value once."""
_BETWEEN = "; "
PARENT_PARAMS = ("model", "dtype", "quantization", "cap", "seed")
NOTE = "mlflow.note.content"
REPORT, _REPORT_THERE = "report.html", "Report.html"
"""MLflow lists capitals first."""
_ABOUT = (
    "Sweeps of streamllm-sweep: a parent run per study, with the front in its description and artifacts, and a run per "
    "configuration. `tags.pareto = 'True'` finds the front."
)
_LONGEST_NOTE = 8000
"""Characters of a tag's value that MLflow keeps."""
_LOGGED = "3"
"""Version of what is logged of a row; of an older one all is logged again. 1: no data set; 2: no tags for digests,
versions and who measured."""
_REPLACED = "replaced"
"""Tag of a run whose trial came to be another configuration, and in front of those by which it would be found."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a study has come to, for its parent run; `conclusion.report_of` makes it when a sweep ends."""

    files: Sequence[Path] = ()
    findings: Sequence[str] = ()
    """Paragraphs."""
    recommended: int | str | None = None
    """The trial."""
    command: str | None = None
    """Measures it again."""


class Projection:
    """A study's runs in MLflow. Every method may be called again: what is there already is left as it is.

    Raises whatever MLflow raises, which may be anything; after that, `open` finds out anew what is there."""

    def __init__(self, folder: StudyFolder, configuration: Mapping[str, Any], tracking_uri: str | None = None) -> None:
        """configuration: what `sweep.json` says."""
        self._folder = folder
        self._configuration = configuration
        self._uri = store_uri(tracking_uri)
        self._pace = pace_for(self._uri)
        self._writers: Writers | None = None
        self._lock: IO[str] | None = None
        self._experiment = ""
        self._references = ReferencePool()
        self._logged: list[str] = []
        self.refused: list[str] = []

    @property
    def logged(self) -> int:
        """Runs that were created or completed."""
        return len(self._logged)

    @property
    def address(self) -> str:
        """Where MLflow shows the study, as a user is told; "" before it is opened."""
        return shown_at(self._uri, self._page) if self._experiment else ""

    @property
    def _page(self) -> str:
        return runs_page(self._experiment, self._configuration["study"])

    @property
    def _link(self) -> str:
        """To the page, in Markdown."""
        return f"[All runs of study {self._configuration['study']}]({self._page.removeprefix('/')})"

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Errors say what to do about them, where there is something."""
        try:
            yield
        except Exception as error:
            with_remedy(error, self._uri, self._experiment)
            raise

    def open(self, waiting: Callable[[str], None] = lambda _: None) -> None:
        """Finds the study's runs, and creates the parent if there is none. `waiting` is told if others are waited for,
        who open the database or write the study's runs."""
        if self._lock is None:
            self._lock = writing(self._folder.mlflow_lock, waiting)
        with self._advising():
            with opening(self._uri, waiting):
                self._client = mlflow_client(self._uri)
                experiment = self._find_experiment()
            self._folder.write_tracking(without_password(self._uri), self._experiment)
            self._color = next_color(experiment.tags, self._configuration["study"])
            self._describe_experiment(experiment.tags)
            self._find_runs()
            self._begin_to_write()
        self._references = ReferencePool()

    def _begin_to_write(self) -> None:
        if self._writers is not None:
            self._writers.close()
        tags = self._common() | {COLOR: self._color, "quantization": self._configuration["quantization"]}
        to = Destination(self._uri, self._experiment, self._runs[""], str(self._folder.store), tags)
        assert self._lock is not None
        self._writers = Writers(RunWriter(self._client, to), to, self._pace, self._lock.fileno())

    def _find_experiment(self) -> Experiment:
        """Created if there is none. Raises ExperimentDeletedError."""
        experiment = find_experiment(self._client)
        self._experiment = experiment.experiment_id
        if experiment.lifecycle_stage == "deleted":
            raise ExperimentDeletedError(experiment.name)
        return experiment

    def _find_runs(self) -> None:
        """A trial that has two runs, because a slow server created one after nobody waited for its answer any more,
        keeps the first."""
        self._runs: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._on_front: set[str] = set()
        self._of_all: dict[str, list[str]] = {name: [] for name in _OF_ALL}
        below: dict[str, str | None] = {}
        twice: list[str] = []
        for run in self._known_runs():
            tags = run.data.tags
            trial = tags.get("trial", "")
            self._color = tags.get(COLOR, self._color)
            if trial in self._runs:
                twice.append(run.info.run_id)
                continue
            self._runs[trial] = run.info.run_id
            if trial:
                below[run.info.run_id] = tags.get(PARENT)
            else:
                self._of_all = {name: tags[name].split(_BETWEEN) if name in tags else [] for name in _OF_ALL}
            if run.info.status != "RUNNING":
                self._digests[trial] = tags.get(DIGEST, "")
            if tags.get("pareto") == "True":
                self._on_front.add(trial)
        for one in twice:  # not before all pages are read: what is deleted moves the next
            self._client.delete_run(one)
        if "" not in self._runs:
            self._runs[""] = self._create_parent()
        for one, parent in below.items():  # a parent that was deleted has left its children behind
            if parent != self._runs[""]:
                self._client.set_tag(one, PARENT, self._runs[""])

    def reopen_parent(self) -> None:
        """Marks the study as running."""
        self._client.update_run(self._runs[""], status="RUNNING")

    def system_metrics(self) -> AbstractContextManager[None]:
        """Logs what this machine does meanwhile."""
        return system_metrics(self._runs[""], self._uri)

    def log(self, row: Row) -> None:
        """Makes the child run of a finished trial. What MLflow will never take, `refused` says why."""
        for _ in self.log_all([row]):
            pass

    def log_all(self, rows: Iterable[Row], references: ReferencePool | None = None) -> Iterator[Row]:
        """As `log`, for several at a time where the store takes that; gives each row when it has its run.

        references: of all rows, where they are known; else those that have come so far give the milliseconds."""

        def timed() -> Iterator[tuple[Row, Row]]:
            for row in rows:
                if references is None:
                    self._references.add(row)
                yield row, row if row.trial == STRICT else (references or self._references).with_time(row)

        def write(writer: Writer, both: tuple[Row, Row]) -> None:
            self._log_or_say(writer, *both)

        assert self._writers is not None
        for row, _ in self._writers.all_written(timed(), write, lambda both: both[0].trial):
            self._describe_parent(row)
            yield row

    def _describe_parent(self, row: AnyRow) -> None:
        """What is said of trials that the study's run does not say yet."""
        for name in _OF_ALL:
            value, known = row.get(name), self._of_all[name]
            if value is not None and str(value) not in known:
                known.append(str(value))
                with self._advising():
                    self._client.set_tag(self._runs[""], name, _BETWEEN.join(known)[:5000])

    def _log_or_say(self, writer: Writer, row: Row, timed: Row) -> None:
        try:
            with self._advising():
                self._log(writer, row, timed)
        except Exception as error:
            if not is_refusal(error):
                raise
            self.refused.append(f"trial {row['trial']}: {told(error)}")

    def _log(self, writer: Writer, row: Row, timed: Row) -> None:
        """timed: the row with its milliseconds, which are no part of its digest: they move with every trial."""
        trial, digest = str(row["trial"]), digest_of(_LOGGED, json.dumps(dict(row), sort_keys=True))
        if self._digests.get(trial) == digest:
            return
        if trial in self._runs:
            self._set_aside_unless_it_is(row, trial)
        self._runs[trial] = writer.write(self._runs.get(trial), row, timed, digest)
        self._digests[trial] = digest
        self._logged.append(trial)

    def _set_aside_unless_it_is(self, row: AnyRow, trial: str) -> None:
        """A run of another configuration than the trial's, as where half a journal was lost and its trials were chosen
        anew: MLflow lets no param change. It is kept, where no search for the study finds it."""
        run = self._client.get_run(self._runs[trial])
        tags, params = run.data.tags, run.data.params
        if all(str(row[name]) == params[name] for name in PARAMS if name in params and name in row):
            return
        found_by = [name for name in ("study", "pareto", "study_id", "trial") if name in tags]
        for name, value in [(_REPLACED, "True"), *((f"{_REPLACED}.{name}", tags[name]) for name in found_by)]:
            self._client.set_tag(run.info.run_id, name, value)
        if run.info.status == "RUNNING":
            self._client.set_terminated(run.info.run_id, "KILLED")
        for name in found_by:  # of what is left after a kill, `trial` is the last: without it, it would be a parent
            self._client.delete_tag(run.info.run_id, name)
        del self._runs[trial]
        self._digests.pop(trial, None)
        self._on_front.discard(trial)

    def close(self, results: StudyResults, report: Report) -> None:
        """Marks the front, logs what was confirmed, attaches the report to the parent, and ends all runs."""
        with self._advising():
            self._close(results, report)
        assert self._writers is not None and self._lock is not None
        self._writers.close()
        self._lock.close()
        self._lock = None

    def _close(self, results: StudyResults, report: Report) -> None:
        status, ended_at = results.files.read_outcome()
        rows = [*results.trials, results.baseline, results.strict]
        last = max((row["finished_at"] for row in rows if row), default=time.time())
        ended = int(1000 * (ended_at or last))
        front = {str(row["trial"]) for row in results.front}
        for trial in sorted((front ^ self._on_front) & self._runs.keys()):
            self._client.set_tag(self._runs[trial], "pareto", str(trial in front))
        self._on_front = front
        by_trial = {str(row["trial"]): row for row in rows if row is not None}
        best = by_trial.get(str(report.recommended), Row())
        whole = {f"recommended/{name}": float(best[name]) for name in RECOMMENDED if is_number(best.get(name))}
        whole |= {"trials": float(len(results.trials)), "pareto_trials": float(len(results.front))}
        if results.references:
            whole["reference_tpot_ms"] = results.references[0].ms

        def update(writer: Writer, run: Run) -> None:
            row, before = by_trial.get(run.data.tags.get("trial", "")), run.data.metrics
            values = whole if row is None else _final_metrics(row, before)
            changed = {name: value for name, value in values.items() if not _same(name, before.get(name), value)}
            now = int(1000 * time.time())  # of two values at one time MLflow shows the higher
            if changed:
                writer.update(run.info.run_id, changed, {name: now if name in before else ended for name in changed})

        wanted = {self._runs[trial] for trial in ("", *by_trial) if trial in self._runs}
        known = (run for run in self._known_runs() if run.info.run_id in wanted)
        assert self._writers is not None
        for _ in self._writers.all_written(known, update, lambda run: run.info.run_id):
            pass
        self._attach(report)
        self._recommend(report)
        for trial in self._runs.keys() - self._digests.keys() - {""}:  # of no trial that the study knows, or refused
            self._client.set_terminated(self._runs[trial], "KILLED", ended)
        parent = self._client.get_run(self._runs[""]).info
        if (parent.status, parent.end_time) != (status or "KILLED", ended):
            self._client.set_terminated(self._runs[""], status or "KILLED", ended)

    def _known_runs(self) -> Iterator[Run]:
        """The study's runs, the oldest first."""
        token, condition = None, f"tags.study_id = '{self._configuration['study_id']}'"
        while True:
            page = self._client.search_runs(
                [self._experiment], condition, max_results=_PAGE, order_by=["attributes.start_time"], page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _began_at(self) -> int:
        """Milliseconds since 1970: now, or where the study has been at it without MLflow, not after what it has."""
        _, ended_at = self._folder.read_outcome()
        known = [started_at(row) for row in read_rows(self._folder.trials) if row.finished_at is not None]
        return min(int(1000 * time.time()), *known, *([int(1000 * ended_at)] if ended_at else []))

    def _create_parent(self) -> str:
        from mlflow.entities import Param

        settings = self._configuration
        source = {"mlflow.source.name": "python -m orchestrator.sweep", "mlflow.source.type": "LOCAL"}
        tags = self._common() | source | {"commit": settings["commit"], "model": settings["model"], NOTE: self._link}
        tags |= {COLOR: self._color}
        if versions := settings.get("versions"):
            tags["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        run = self._client.create_run(self._experiment, self._began_at(), tags, settings["study"]).info.run_id
        params = [Param(name, str(settings[name])) for name in PARENT_PARAMS]
        self._client.log_batch(run, params=[*params, Param("space", str(settings["space"]["name"]))])
        return str(run)

    def _describe_experiment(self, before: Mapping[str, str]) -> None:
        """Says what the experiment is, unless its owner has said it, and keeps the views of it."""
        tags = views(self._configuration["study"], self._configuration["objectives"])
        if _ABOUT in before.get(NOTE, _ABOUT):
            fronts = fronts_page(self._experiment).removeprefix("/")
            tags[NOTE] = f"{self._link}\n\n[The fronts of all studies]({fronts})\n\n{_ABOUT}"
        if "inferred" in before.get("mlflow.experimentKind", "inferred"):
            tags["mlflow.experimentKind"] = "custom_model_development"
        for name, value in tags.items():
            if before.get(name) != value:
                self._client.set_experiment_tag(self._experiment, name, value)

    def _common(self) -> dict[str, str]:
        return {"study": self._configuration["study"], "study_id": self._configuration["study_id"]}

    def _recommend(self, report: Report) -> None:
        tags = self._client.get_run(self._runs[""]).data.tags
        for tag, value in (("recommended", report.recommended), ("recommended.command", report.command)):
            if value is not None and tags.get(tag) != str(value):
                self._client.set_tag(self._runs[""], tag, str(value)[:5000])

    def _attach(self, report: Report) -> None:
        """Files for the parent, unless it has just these; the description says what was found and shows the front."""
        digest = digest_of(_LOGGED, self._link, *report.findings, *(path.read_bytes() for path in report.files))
        parent = self._runs[""]
        if self._client.get_run(parent).data.tags.get(DIGEST) == digest:
            return
        links = [self._link]
        if any(path.name == REPORT for path in report.files):
            there = artifact_page(self._experiment, parent, _REPORT_THERE).removeprefix("/")
            links.append(f"[The report]({there})")
        for path in sorted(report.files, key=lambda path: path.name != REPORT):  # the report is there first
            if path.name == REPORT:
                self._client.log_text(parent, path.read_text(encoding="utf-8"), _REPORT_THERE)
            else:
                self._client.log_artifact(parent, str(path))
            if path.suffix == ".md":
                note = "\n\n".join([*links, *report.findings, path.read_text(encoding="utf-8")])
                self._client.set_tag(parent, NOTE, shortened(note))
        self._client.set_tag(parent, DIGEST, digest)


def shortened(note: str) -> str:
    """As many of the note's lines as MLflow keeps, and the number of those left out."""
    if len(note) <= _LONGEST_NOTE:
        return note
    lines = note.splitlines()
    kept = note[: _LONGEST_NOTE - 60].count("\n")
    return "\n".join([*lines[:kept], "", f"({len(lines) - kept} more lines are in the artifact pareto.md)"])


def _final_metrics(row: AnyRow, before: Mapping[str, float]) -> dict[str, float]:
    """For a trial that was confirmed before and is no longer, this is taken back: no rounds, a probability of NaN."""
    names = [f"{name}{end}" for name in _AT_THE_END for end in ("", "_low", "_high")]
    values = {name: float(row[name]) for name in names if is_number(row.get(name))}
    if before.get("rounds") and "rounds" not in row:
        values |= {"rounds": 0.0} | ({"front_probability": math.nan} if "front_probability" in before else {})
    return values


def _same(name: str, one: float | None, other: float) -> bool:
    if one is None:
        return False
    moved = _MOVED if name in _IN_MS else 0.0
    return math.isclose(one, other, rel_tol=moved) or (math.isnan(one) and math.isnan(other))
