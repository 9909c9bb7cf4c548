"""The journal of a study, and how it is made anew when it is damaged: of the rows in what can still be read of it and
in `trials.jsonl`, which follows it.

Its lines depend on those before them, as a trial's number is how many were there; rows say of which trial they are, and
the configuration that a row is of is a point of the space.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from search_spaces import SearchSpace, Value
from streamllm.errors import UsageError
from streamllm.files import write_atomically
from streamllm.results.checks import measured_row
from streamllm.results.damaged import DamagedError, all_told, keep_aside, read_lines
from streamllm.results.schema import OBJECTIVES, NewerFormatError, Row, number, told_name
from streamllm.results.study_folder import StudyFolder, rows_and_damage

from .points import is_of, point_of

ROW, SKIPPED, DEATHS = "row", "skipped", "deaths"
"""Attributes of a trial: its row; why there is none; how many workers ended on it."""
_FARTHEST = 10_000
"""Numbers between a trial and the next one that finished: more were never given."""


class JournalFile(JournalFileBackend):  # type: ignore[misc]
    """Optuna's journal file, flushed to the disk with every write; writes that belong together go in one."""

    _held: list[dict[str, object]] | None = None

    def append_logs(self, logs: list[dict[str, object]]) -> None:
        if self._held is not None:
            self._held += logs
        else:
            self._append(logs)

    def _append(self, logs: list[dict[str, object]]) -> None:
        try:
            super().append_logs(logs)
        except RuntimeError as error:  # its lock is gone, as with all of the folder
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    @contextmanager
    def together(self) -> Iterator[None]:
        self._held = []
        try:
            yield
            held, self._held = self._held, None
            self._append(held)
        finally:
            self._held = None


class _Lines(BaseJournalBackend):  # type: ignore[misc]
    """A journal in memory."""

    def __init__(self) -> None:
        self.logs: list[dict[str, object]] = []

    def append_logs(self, logs: list[dict[str, object]]) -> None:
        self.logs += json.loads(json.dumps(logs))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, object]]:
        yield from self.logs[log_number_from:]


@dataclass(frozen=True, slots=True)
class Opened:
    """A journal as it was when it was opened."""

    file: JournalFile
    storage: JournalStorage
    study: optuna.Study
    trials: list[FrozenTrial]
    rows: dict[int, Row]
    """Those of the finished trials, by their numbers."""


@dataclass(frozen=True, slots=True)
class Journal:
    name: str
    path: Path
    space: SearchSpace
    cap: int

    def opened(self) -> Opened:
        """Opens the journal, or begins it. One that is damaged is made anew first, and that is said. Raises
        UsageError, NewerFormatError where a row is of a later version."""
        try:
            written, _ = rows_and_damage(StudyFolder(self.path.parent).trials, measured_row)
        except NewerFormatError:  # so are the journal's, or that file is damaged
            written = []
        told = {row.trial: row for row in written if isinstance(row.trial, int)}
        try:
            _cut_torn_line(self.path)
            return self._loaded(told)
        except NewerFormatError:
            raise
        except Exception as error:  # Optuna raises anything of a journal that is damaged
            if isinstance(error, OSError) and not self.path.is_dir() and not self.path.is_symlink():
                raise UsageError(
                    f"{error.filename or self.path}: cannot be used ({error.strerror}); make it writable"
                ) from None
            self._rebuild(told, error)
        return self._loaded({})

    def _loaded(self, told: Mapping[int, Row]) -> Opened:
        """A new journal, or one whose lines all mean something and that has the trials of these rows. Raises anything
        for another."""
        rows, wrong = _rows_in(self.path)
        if wrong:
            raise DamagedError(all_told(wrong))
        file = JournalFile(str(self.path))
        storage = JournalStorage(file)
        study = self._study(storage, is_new=not self.path.stat().st_size)
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            self._check(trial, rows)
        more = {trial: row for trial, row in told.items() if trial not in rows}
        lost = rows.keys() - {trial.number for trial in trials if ROW in trial.user_attrs} | _others(more, rows).keys()
        if lost:
            raise DamagedError(f"{self.path}: trial {min(lost)}, which had finished, is not in it")
        return Opened(file, storage, study, trials, rows)

    def _study(self, storage: JournalStorage, is_new: bool) -> optuna.Study:
        """Raises KeyError if it should be there, and is not."""
        sampler = optuna.samplers.RandomSampler()  # never asked: `samplers` suggests
        if is_new:
            directions = [OBJECTIVES[objective] for objective in self.space.objectives]
            optuna.create_study(study_name=self.name, storage=storage, sampler=sampler, directions=directions)
        study = optuna.load_study(study_name=self.name, storage=storage, sampler=sampler)
        if study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is experimental in Optuna
                study.set_metric_names([told_name(objective) for objective in self.space.objectives])
        return study

    def _check(self, trial: FrozenTrial, rows: Mapping[int, Row]) -> None:
        """Raises anything for a trial that cannot be."""
        has_row = ROW in trial.user_attrs
        if not has_row and SKIPPED not in trial.user_attrs and trial.state != TrialState.RUNNING:
            return
        point = self.space.complete(trial.params)
        is_right = isinstance(trial.user_attrs.get(DEATHS, 0), int) and isinstance(trial.system_attrs, dict)
        if has_row:
            row, is_told = rows[trial.number], trial.user_attrs[ROW]["trial"] == trial.number
            is_right &= is_told and self._is_result(row)
            with suppress(UsageError):  # an older version measured what this one would not
                is_right &= is_of(row, point, self.space, self.cap)
        if not is_right:
            raise DamagedError(f"{self.path}: trial {trial.number} is not what was written")

    def _is_result(self, row: Row) -> bool:
        """Whether it is a row as `Study.tell` keeps it."""
        values = [number(row, told_name(objective)) for objective in self.space.objectives]
        return row.state == "failed" or (row.state == "complete" and None not in values)

    def _rebuild(self, told: Mapping[int, Row], error: Exception) -> None:
        """Makes the journal anew of what is readable in it and in `trials.jsonl`, keeps the damaged one aside, and says
        so. Raises UsageError."""
        rows, _ = _rows_in(self.path)
        rows = rows | _others(told, rows)
        lines, count = self._with_trials({trial: row for trial, row in rows.items() if self._is_result(row)})
        why = str(error) if isinstance(error, DamagedError) else f"{self.path}: Optuna cannot read it ({error!r:.200})"
        mended = self.path.with_name(f".{self.path.name}.mended")
        write_atomically(mended, lines)
        keep_aside(self.path, [why], f"made anew with the {count} finished trials whose rows can be read")
        mended.replace(self.path)

    def _with_trials(self, rows: Mapping[int, Row]) -> tuple[str, int]:
        """A journal with the trials of these rows, each under its number, and how many it has: those of another text,
        or of no point of the space, are left out. They are running, and have their rows; trials between them that have
        none have failed."""
        lines = _Lines()
        storage = JournalStorage(lines)
        study = self._study(storage, is_new=True)._study_id
        measured = Counter(_digests(row) for row in rows.values() if row.text_digest is not None)
        ours = [digests for digests, _ in measured.most_common(1)]
        there = kept = 0
        for trial, row in sorted(rows.items()):
            is_ours = trial < there + _FARTHEST and (row.text_digest is None or _digests(row) in ours)
            point = point_of(row, self.space, self.cap) if is_ours else None
            if point is None:
                continue
            for _ in range(there, trial):
                storage.create_new_trial(study, create_trial(state=TrialState.FAIL))
            storage.create_new_trial(study, trial_of(point, self.space, attributes={ROW: row.to_json()}))
            there, kept = trial + 1, kept + 1
        return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in lines.logs), kept


def trial_of(
    params: Mapping[str, Value],
    space: SearchSpace,
    state: TrialState = TrialState.RUNNING,
    attributes: Mapping[str, object] | None = None,
) -> FrozenTrial:
    """A trial of that point that no study has yet."""
    chosen: dict[str, Value] = {}
    distributions: dict[str, BaseDistribution] = {}

    def take(name: str, choices: tuple[Value, ...]) -> Value:
        chosen[name] = params[name]
        distributions[name] = CategoricalDistribution(choices)
        return params[name]

    space.draw(take)
    return create_trial(state=state, params=chosen, distributions=distributions, user_attrs=dict(attributes or {}))


def _cut_torn_line(journal: Path) -> None:
    """Cuts a line torn by a kill in mid-write, and removes the lock such a process left: we hold the study's own.
    Raises OSError."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.is_file():
        content = journal.read_bytes()
        whole = content.rfind(b"\n") + 1
        if 0 < whole < len(content):  # without any, it is no journal
            os.truncate(journal, whole)


def _rows_in(journal: Path) -> tuple[dict[int, Row], list[str]]:
    """The rows of trials in those of its lines that can be read, of several of a trial the first, as Optuna has it; and
    what is wrong with the other lines. Raises NewerFormatError."""
    found, wrong = read_lines(journal, _row_in)
    rows: dict[int, Row] = {}
    for row in found.values():
        if row is not None and isinstance(row.trial, int):
            rows.setdefault(row.trial, row)
    return rows, wrong


def _row_in(line: object) -> Row | None:
    """The row that a line of a journal gives a trial. Raises ValueError."""
    if not isinstance(line, dict) or not isinstance(line.get("op_code"), int):
        raise ValueError("no operation of Optuna's")
    attributes = [line.get(name) for name in ("user_attr", "user_attrs")]
    row = next((one[ROW] for one in attributes if isinstance(one, dict) and ROW in one), None)
    return None if row is None else Row.checked(row)


def _others(told: Mapping[int, Row], rows: Mapping[int, Row]) -> dict[int, Row]:
    """Those told, of the same text or of none, as what failed is, that are none of the rows, under whatever number."""
    texts = {_digests(row) for row in rows.values() if row.text_digest is not None}
    known = {_unnumbered(row) for row in rows.values()} if told else set()
    return {
        trial: row
        for trial, row in told.items()
        if (not texts or row.text_digest is None or _digests(row) in texts) and _unnumbered(row) not in known
    }


def _unnumbered(row: Row) -> str:
    return json.dumps({**row, "trial": None}, sort_keys=True)


def _digests(row: Row) -> tuple[str | None, ...]:
    """Those of the text and of the weights, whatever became of them."""
    return row.text_digest, (row.model_digest or "").partition(" ")[0]
