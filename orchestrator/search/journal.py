"""The journal of a study, and how it is made anew when it is damaged: of the rows in what can still be read of it and
in `trials.jsonl`, which follows it.

Its lines depend on those before them, as a trial's number is how many were there; rows say of which trial they are, and
the configuration that a row is of is a point of the space.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from search_spaces import SearchSpace, Value
from streamllm.errors import UsageError
from streamllm.results.checks import measured_row
from streamllm.results.damaged import read_lines
from streamllm.results.schema import KNOBS, POLICY_KNOBS, Row

from .points import configuration_of

ROW = "row"
"""The attribute of a trial that its row is in."""
_FARTHEST = 10_000
"""Numbers between a trial and the next one that finished: more were never given."""
_TRIED = 20_000
"""Points that a row may be of."""
_NAMES = {knob.parameter: knob.name for knob in KNOBS}


class JournalFile(JournalFileBackend):  # type: ignore[misc]
    """Optuna's journal file, flushed to the disk with every write; writes that belong together go in one."""

    _held: list[dict[str, object]] | None = None

    def append_logs(self, logs: list[dict[str, object]]) -> None:
        if self._held is not None:
            self._held += logs
        else:
            super().append_logs(logs)

    @contextmanager
    def together(self) -> Iterator[None]:
        self._held = []
        try:
            yield
            held, self._held = self._held, None
            super().append_logs(held)
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


def cut_torn_line(journal: Path) -> None:
    """Cuts a line torn by a kill in mid-write, and removes the lock such a process left: we hold the study's own.
    Raises OSError."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.is_file():
        content = journal.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)


def checked_line(values: object) -> None:
    """Raises ValueError for what is no line of a journal."""
    if not isinstance(values, dict) or not isinstance(values.get("op_code"), int):
        raise ValueError("no operation of Optuna's")


def rows_in(journal: Path) -> dict[int, Row]:
    """The rows of trials in those of its lines that can be read; of several of a trial the first, as Optuna has it.
    Raises NewerFormatError."""
    found, _ = read_lines(journal, _row_in)
    rows: dict[int, Row] = {}
    for row in found.values():
        if row is not None and isinstance(row.trial, int):
            rows.setdefault(row.trial, row)
    return rows


def rebuilt(
    rows: Mapping[int, Row],
    space: SearchSpace,
    cap: int,
    create: Callable[[JournalStorage], optuna.Study],
    template: Callable[[dict[str, Value]], FrozenTrial],
) -> tuple[str, int]:
    """A journal with these trials, each under its number, and how many of them it has: those of another text, or of no
    point of the space, it leaves out. They are running, and have their rows; what was never finished has failed.

    create: makes the study; template: a trial with those values."""
    lines = _Lines()
    storage = JournalStorage(lines)
    study = create(storage)._study_id
    measured = Counter(digests(row) for row in rows.values() if row.text_digest is not None)
    ours = [digests for digests, _ in measured.most_common(1)]
    there = kept = 0
    for number, row in sorted(rows.items()):
        is_ours = row.text_digest is None or digests(row) in ours
        point = point_of(row, space, cap) if is_ours and number < there + _FARTHEST else None
        if point is None:
            continue
        for _ in range(there, number):
            storage.create_new_trial(study, create_trial(state=TrialState.FAIL))
        trial = template(point)
        trial.user_attrs[ROW] = row.to_json()
        storage.create_new_trial(study, trial)
        there, kept = number + 1, kept + 1
    return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in lines.logs), kept


def point_of(row: Row, space: SearchSpace, cap: int) -> dict[str, Value] | None:
    """The point of the space that the row measured; None if there is none."""
    names = sorted(space.parameters, key="total_kv".__eq__)  # which rows do not say: tried before anything else changes
    choices = [_possible(name, row, space) for name in names]
    near = None
    for values in itertools.islice(itertools.product(*choices), _TRIED):
        point = space.complete(dict(zip(names, values, strict=True)))
        if is_of(row, point, space, cap):
            if row.window_size in _windows(point, space, cap):
                return point
            near = near or point
    return near


def is_of(row: Row, point: Mapping[str, Value], space: SearchSpace, cap: int) -> bool:
    """Whether the row, as far as it says, is a measurement of that point, whatever its window is."""
    try:
        what = configuration_of(point, space, cap)
        policies = (what.policy, what.effective)
    except UsageError:
        return False
    asked = {"method": what.method, "backend_requested": what.backend, "execution": what.execution}
    if what.quantization is not None:
        asked["quantization"] = what.quantization
    knobs = [field.name for field in POLICY_KNOBS if field.name != "window_size" and field.name in row]
    return all(row.get(name, value) == value for name, value in asked.items()) and any(
        all(getattr(policy, name) == row[name] for name in knobs) for policy in policies
    )


def digests(row: Row) -> tuple[str | None, ...]:
    """Those of the text and of the weights, whatever became of them."""
    return row.text_digest, (row.model_digest or "").partition(" ")[0]


def _windows(point: Mapping[str, Value], space: SearchSpace, cap: int) -> tuple[int, int]:
    what = configuration_of(point, space, cap)
    return what.policy.window_size, what.effective.window_size


def _possible(name: str, row: Row, space: SearchSpace) -> Sequence[Value]:
    """The values that the row may have been given: its own or, of a number that its method makes another of, any."""
    choices = space.parameters[name]
    value = row.get(_NAMES[name])
    if value in choices:
        return (value,)
    if isinstance(value, str) and value != space.defaults.get(name):
        return ()
    return choices


def _row_in(line: object) -> Row | None:
    """The row that a line of a journal gives a trial. Raises ValueError."""
    if not isinstance(line, dict):
        return None
    attributes = [line.get(name) for name in ("user_attr", "user_attrs")]
    row = next((one[ROW] for one in attributes if isinstance(one, dict) and ROW in one), None)
    return None if row is None else measured_row(row)
