"""Runs a matrix: its cells over all workers, each into a JSON file; then its tables and figures.

A cell that is finished is never measured again; one that fails leaves its reason in its file and the others in peace.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from streamllm.errors import UsageError
from streamllm.files import write_atomically
from streamllm.results.study_folder import StudyFolder
from streamllm.terminal.printing import say

from ..copies import bring_back, kept
from ..ending import WORDS, Ending
from ..unwritable import UnwritableError, writing
from ..workers.kinds import Kind, kind_of, unquantized
from ..workers.lease import study_lease
from ..workers.messages import SweepError
from . import cells
from .plan import Document, MatrixPlan, MatrixRequest, Outcome, Planned, cost, describe, make_plan
from .study import MatrixStudy

if TYPE_CHECKING:
    from streamllm.measuring.text import TextSource, TokenStream

    from ..configuration import WorkerSettings
    from ..scheduler import Scheduler
    from ..waiting import JobError
    from ..workers.messages import Subject, WorkerDescription, WorkerSetup

_TITLES = {"wikitext": "WikiText-103", "pg19": "PG19"}
_FORMATS = ("md", "csv", "latex")
_TOLD = {"dataset", "protocol", "method", "attn_backend", "execution"}
"""Axes that the source documents' figures tell apart."""


def run_matrix(request: MatrixRequest, dry_run: bool, ending: Ending, tracking_uri: str | None = None) -> int:
    """The exit code: 1 if a cell failed. Raises UsageError."""
    plan = make_plan(request)
    if dry_run:
        say(describe(plan))
        return 0
    plan.folder.mkdir(parents=True, exist_ok=True)
    if request.copy is not None:
        bring_back(request.copy, StudyFolder(plan.folder), plan.name)
    with study_lease(StudyFolder(plan.folder)):
        documents = plan.documents()
        study = MatrixStudy(plan, documents, tracking_uri)
        with kept(request.copy, study.folder, _info):
            try:
                return _run(plan, documents, study, ending)
            except UnwritableError as error:
                _info(f"error: {error}")
                return 1


def _run(plan: MatrixPlan, documents: dict[Path, Document], study: MatrixStudy, ending: Ending) -> int:
    try:
        status, code = _measure_all(plan, documents, study, ending)
    except UsageError:
        study.end("FAILED", [], ending, _info)
        raise
    finished = [documents[planned.file] for planned in plan.cells if planned.file in documents]
    try:
        paths = _conclude(plan, finished)
    except (OSError, ValueError) as error:  # the results are complete without it
        _info(f"warning: tables and figures could not be written: {error}")
        paths = []
    study.end(status, paths, ending, _info)
    return code


def _measure_all(
    plan: MatrixPlan, documents: dict[Path, Document], study: MatrixStudy, ending: Ending
) -> tuple[str, int]:
    """How it ended, and the exit code."""
    from streamllm.measuring.store import MeasurementStore
    from streamllm.terminal.output import messages_on_stderr

    from ..scheduler import Scheduler
    from ..screen.workers import WorkersView
    from ..timing import Timing
    from ..workers.cluster import quiet_stdout
    from ..workers.pool import WorkerPool

    done = [planned for planned in plan.cells if plan.is_finished(planned, documents)]
    left = [planned for planned in plan.cells if planned not in done]
    _info(f"{plan.name}: {len(plan.cells)} cells, {len(done)} of them finished; total KV {plan.cap}")
    if not left:
        return "FINISHED", 0
    pool, setup = None, _setup(plan, left)
    try:
        with messages_on_stderr(), quiet_stdout(), WorkersView(_info) as view:
            pool = WorkerPool(setup, _settings(plan.workers), note=_info)
            same = SameMachine(documents, _info)
            turns = Timing(plan.workers.timing, study.folder, _info)
            scheduler = Scheduler(pool, MeasurementStore(plan.store), setup.variant, _info, [view], same.check, turns)
            matrix = _Matrix(plan, documents, scheduler, same, study)
            matrix.run([planned for planned in left if not plan.is_finished(planned, documents, 0)])
            for rounds in range(1, plan.rounds + 1):
                _info(f"confirming: round {rounds} of {plan.rounds}")
                due = [planned for planned in left if not plan.is_finished(planned, documents, rounds)]
                matrix.run([planned for planned in due if plan.is_finished(planned, documents, rounds - 1)], rounds)
    except UnwritableError:
        raise
    except (SweepError, KeyboardInterrupt) as error:
        if ending.is_why(error):
            _info(WORDS)
            return "KILLED", ending.exit_code
        _info(f"error: {error}; the same command goes on from here")
        return "FAILED", 1
    finally:
        if pool is not None:
            pool.shutdown()
    return "FINISHED", int(any(document["state"] == "failed" for document in documents.values()))


def _setup(plan: MatrixPlan, left: Sequence[Planned]) -> WorkerSetup:
    from streamllm.engine.loading import weights_digest

    from ..workers.messages import WorkerSetup
    from ..workers.pool import settings_for_workers

    return WorkerSetup(plan.model, left[0].variant, Path.cwd(), weights_digest(plan.model), settings_for_workers())


def _settings(asked: WorkerSettings) -> WorkerSettings:
    """Where nobody says how many, one worker with all the cores of this machine: on cores one is timed at a time."""
    from ..workers.cluster import resources_here

    here = resources_here(asked.address)
    return replace(asked, count=1) if not asked.count and here is not None and not here["GPU"] else asked


class _Matrix:
    """Cells under way: as many as there are workers."""

    def __init__(
        self,
        plan: MatrixPlan,
        documents: dict[Path, Document],
        scheduler: Scheduler,
        same: SameMachine,
        study: MatrixStudy,
    ) -> None:
        self._plan = plan
        self._documents = documents
        self._scheduler = scheduler
        self._same = same
        self._study = study
        self._rounds = 0
        self._left: deque[Planned] = deque()
        self._running: dict[Path, float] = {}
        """Files of cells, and since when they are measured, by the monotonic clock."""
        self._texts: dict[TextSource, TokenStream | UsageError] = {}

    def run(self, left: Sequence[Planned], rounds: int = 0) -> None:
        """rounds: how often what was measured has then been measured again. Raises SweepError, UsageError."""
        self._rounds = rounds
        self._left.extend(sorted(left, key=_by_model(left)))
        while self._left or self._running:
            self._scheduler.step()
            if not self._scheduler.ready and not self._scheduler.is_restarting and self._same.has_refused:
                raise SweepError("no worker is left of the kind that the first cells were measured on")
            while self._left and self._scheduler.has_idle and len(self._running) < self._scheduler.ready:
                self._begin(self._left.popleft())
                self._scheduler.assign()

    def _begin(self, planned: Planned) -> None:
        number = len(self._plan.cells) - len(self._left)
        _info(f"[{number}/{len(self._plan.cells)}] running experiment: {title(self._plan, planned)}")
        self._running[planned.file] = time.monotonic()
        try:
            cells.check(planned)
            text = self._text(planned)
        except UsageError as error:
            self._ended(planned, error)
            return
        self._same.check_text(planned, text)
        subject = self._subject(planned, text)
        plan = cells.measure(
            planned, text, self._plan.trained_length, self._rounds, self._say(planned), self._scheduler.keep
        )
        self._scheduler.start(plan, subject, partial(self._ended, planned))

    def _subject(self, planned: Planned, text: TokenStream) -> Subject:
        from ..workers.messages import Subject

        self._scheduler.share(text)
        return Subject(text.digest, planned.variant, cells.total_of(planned, self._plan.trained_length))

    def _say(self, planned: Planned) -> cells.Said:
        """Where several cells are measured at a time, with what it is said of."""

        def told(message: str) -> None:
            about = f" ({planned.file.stem})" if len(self._running) > 1 else ""
            _info(f"{message}{about}")

        return told

    def _text(self, planned: Planned) -> TokenStream:
        """Read once; one that cannot be had is not tried again."""
        from streamllm.engine.loading import load_tokenizer
        from streamllm.measuring.text import load_tokens

        source = planned.source
        if source not in self._texts:
            try:
                tokenizer = None if source.token_ids is not None else load_tokenizer(planned.model)
                self._texts[source] = load_tokens(source, tokenizer, self._plan.vocabulary or sys.maxsize)
            except UsageError as error:
                self._texts[source] = error
        found = self._texts[source]
        if isinstance(found, UsageError):
            raise found
        return found

    def _ended(self, planned: Planned, result: Outcome | JobError | UsageError) -> None:
        from ..configuration import commit

        if isinstance(result, Exception) and self._rounds:  # what was measured before is not lost with it
            del self._running[planned.file]
            _info(f"warning: {title(self._plan, planned)} cannot be confirmed: {result}")
            return
        outcome = cells.unavailable(result) if isinstance(result, Exception) else result
        document: Document = {
            "cell": planned.file.stem,
            **outcome,
            "settings": planned.settings,
            "rounds": self._rounds,
            "measured_sec": time.monotonic() - self._running.pop(planned.file),
            "finished_at": time.time(),
            "commit": commit(),
        }
        self._documents[planned.file] = document
        with writing():
            _write(planned.file, document)
        self._study.finished(planned, document)
        _say_outcome(self._plan, planned, document)
        if self._left:
            _info(f"left: {cost(self._left, self._documents)}")


def _by_model(left: Sequence[Planned]) -> Callable[[Planned], int]:
    """Sorts by model as loaded, in the order of first appearance: each is loaded once."""
    order = list(dict.fromkeys(planned.variant for planned in left))
    return lambda planned: order.index(planned.variant)


class SameMachine:
    """One table is of one model, text, device, number of threads and set of versions."""

    def __init__(self, documents: dict[Path, Document], note: Callable[[str], None]) -> None:
        self._finished = {file: one for file, one in documents.items() if one["state"] == "complete"}
        self._note = note
        self._kind: Kind | None = None
        self.has_refused = False

    def check(self, worker: int, description: WorkerDescription) -> bool:
        """Whether it may take part. Raises UsageError if finished cells were measured on another kind of worker, or
        with another model."""
        conditions = description["conditions"]
        now = {**conditions.kind, "model_digest": unquantized(conditions.model_digest)}
        for file, document in self._finished.items():
            row = document["baseline"]
            before = {name: row[name] for name in now if name in row}  # an older one does not say with what
            if "model_digest" in before:
                before["model_digest"] = unquantized(before["model_digest"])
            for name, was in before.items():
                self._refuse(file, name, was, now[name])
        kind = kind_of(conditions.kind)
        self._kind = self._kind or kind
        if kind != self._kind:
            self.has_refused = True
            self._note(f"warning: worker {worker} is of another kind than the first, and measures nothing")
        return kind == self._kind

    def check_text(self, planned: Planned, text: TokenStream) -> None:
        """Raises UsageError if finished cells were measured on another text of that name."""
        for file, document in self._finished.items():
            if document["settings"].get("source") == planned.settings["source"]:
                self._refuse(file, "text_digest", document["baseline"].get("text_digest", text.digest), text.digest)

    def _refuse(self, file: Path, name: str, was: object, now: object) -> None:
        if was != now:
            raise UsageError(
                f"{file} has {name} {was!r}, now it is {now!r}: one table is of one model, text, device, number of "
                f"threads and set of versions; give another --study, or remove the file"
            )


def _write(file: Path, document: Document) -> None:
    """Atomically. Raises UsageError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); the same command goes on from here") from error


def _conclude(plan: MatrixPlan, documents: Sequence[Document]) -> list[Path]:
    """Tables, on stdout too, and figures. Returns their files."""
    from dashboards.figures import write_figures
    from dashboards.pareto import show, write
    from dashboards.published_cells import published_cells
    from dashboards.tables.matrix_tables import FIGURES, matrix_figures, matrix_rows, matrix_tables

    if not documents:
        return []
    columns = {protocol: plan.matrix.shown(protocol) for protocol in ("fast", "decode-loop", "chunked")}
    paths: list[Path] = []
    for suffix, table in matrix_tables(plan.matrix.name, plan.matrix.description, documents, columns).items():
        show(table, "\n".join((table.title, *table.summary)), (*table.notes, ""))
        paths += write(table, _FORMATS, plan.folder, f"{plan.matrix.name}{suffix}")
    for suffix, table in published_cells(plan.matrix.name, documents).items():
        paths += write(table, ("md", "latex"), plan.folder, f"published{suffix}")
    if set(plan.matrix.varying()) <= _TOLD:
        rows = [row for row in matrix_rows(documents) if row["state"] == "complete"]
        paths += write_figures([], plan.folder, ("png",), rows, only=FIGURES).paths
    paths += matrix_figures(plan.matrix.name, documents, columns, plan.folder)
    missing = Counter(document["state"] for document in documents if document["state"] != "complete")
    if missing:
        states = ", ".join(f"{count} {state}" for state, count in missing.items())
        say(f"not measured: {states}, of {len(plan.cells)} cells; the same command tries them again")
    say(f"results   {plan.folder / 'results'}")
    say(" ".join(("written  ", *(str(path.relative_to(plan.folder)) for path in paths))))
    return paths


def _say_outcome(plan: MatrixPlan, planned: Planned, document: Document) -> None:
    what = title(plan, planned)
    if document["state"] != "complete":
        _info(f"✗ {document['state']}: {what}: {document['reason']}")
        return
    result = document["streaming"] if "streaming" in document else document["baseline"]
    if "warning" in result:
        _info(f"  warning: {result['warning']}")
    speedup = f" (speedup: {document['speedup']:.2f}x)" if "speedup" in document else ""
    _info(f"✓ experiment done: {what}{speedup}")


def title(plan: MatrixPlan, planned: Planned) -> str:
    """A title that tells the cell from the others."""
    spoken = {"attn_backend": "Backend"}
    axes = (["configuration"] if plan.matrix.configurations else []) + list(plan.matrix.axes)
    axes = [axis for axis in axes if axis in plan.matrix.varying() and axis != "dataset"]
    values = [f"{spoken.get(axis, axis)}: {getattr(planned.cell, axis)}" for axis in axes]
    label = planned.source.label
    return f"{_TITLES.get(label, label)}" + (f" ({', '.join(values)})" if values else "")


def _info(message: str) -> None:
    say(f"[INFO] {message}", sys.stderr)
