"""Confirms a search: rounds of its candidates, until the place of each is settled or has been measured often enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamllm.measuring.store import MeasurementStore
from streamllm.results.study import load_study
from streamllm.results.study_folder import write_rows

from .search.confirm import candidates, comparable, confirmed_rows, next_rounds, unconfirmed_better
from .search.rounds import Round, read_rounds, rounds_so_far, take_rounds

if TYPE_CHECKING:
    from streamllm.measuring.quality import QualityComparison
    from streamllm.results.schema import AnyRow, Row
    from streamllm.results.study import StudyResults

    from .configuration import SweepConfiguration
    from .driver import Driver
    from .screen.display import Display
    from .workers.kinds import Kinds


def confirm(configuration: SweepConfiguration, driver: Driver, kinds: Kinds, display: Display, until: float) -> None:
    """Times the front's candidates again and writes `confirmed.jsonl`. What then still looks better than the front
    without having been confirmed is confirmed too."""
    results = load_study(str(configuration.folder.path))
    if results.baseline is None or driver.comparison is None:
        return
    confirming = _Confirming(configuration, driver, display, results, results.baseline, driver.comparison)
    if not confirming.candidates:
        return
    while not driver.scheduler.ready:  # the last trial may have taken the only one along
        driver.scheduler.step()
    confirming.go(kinds, until)


class _Confirming:
    def __init__(
        self,
        configuration: SweepConfiguration,
        driver: Driver,
        display: Display,
        results: StudyResults,
        baseline: Row,
        comparison: QualityComparison,
    ) -> None:
        self._folder, self._most = configuration.folder, configuration.confirm.rounds
        self._store = MeasurementStore(configuration.store)
        self._driver, self._display = driver, display
        self._baseline, self._comparison = baseline, comparison
        self._objectives = results.objectives
        self._rounds: list[Round] = []
        """Those that count."""
        earlier = {trial for one in read_rounds(self._folder) for trial in one.members}
        self.candidates = self._comparable(candidates(results.trials, self._objectives, earlier))

    def go(self, kinds: Kinds, until: float) -> None:
        """Rounds, and what is found in them, as long as there is time and something to settle."""
        scheduler = self._driver.scheduler
        kind = kinds.to_confirm(scheduler.members())
        self._rounds = rounds_so_far(self._folder, kind)
        while self._drop_failed():
            values = self._values()
            due, count = next_rounds(self.candidates, {str(row["trial"]): row for row in values}, self._most)
            more: Sequence[Round] = ()
            if count:
                self._display.confirming(len(due) + 1, count)
                rows = [self._baseline, *due]
                more = take_rounds(self._folder, scheduler, self._driver.subject, rows, count, until, kind)
                self._rounds += more
            if not more:
                write_rows(self._folder.confirmed, values)
                self._driver.study.confirmed(values)
                if count or not self._add_better():
                    return

    def _comparable(self, rows: Sequence[AnyRow]) -> list[AnyRow]:
        return comparable(rows, lambda row: self._store.losses(row["quality_entry"]), self._display.note)

    def _failed(self) -> dict[str, str]:
        return {trial: reason for one in self._rounds for trial, reason in one.failed.items()}

    def _drop_failed(self) -> bool:
        """Whether it can go on: not without the baseline."""
        failed = self._failed()
        for row in (self._baseline, *self.candidates):
            if (name := str(row["trial"])) in failed:
                self._display.note(f"warning: trial {name} cannot be confirmed: {failed[name]}")
        self.candidates = [row for row in self.candidates if str(row["trial"]) not in failed]
        return str(self._baseline["trial"]) not in failed

    def _values(self) -> list[Row]:
        """What the rounds so far say of the baseline and the candidates that are in any."""
        timed = {trial for one in self._rounds for trial in one.ratios}
        if str(self._baseline["trial"]) not in timed:
            return []
        return confirmed_rows(
            self._rounds,
            sorted((row for row in self.candidates if str(row["trial"]) in timed), key=lambda row: int(row["trial"])),
            self._baseline,
            self._comparison,
            lambda row: self._store.losses(row["quality_entry"]),
            self._objectives,
            lambda row: self._store.arrays(row["quality_entry"]),
        )

    def _add_better(self) -> bool:
        """Adds the trials that look better than all that was confirmed. Returns whether there were any."""
        refused = {*self._failed(), *(str(row["trial"]) for row in self.candidates)}
        better = unconfirmed_better(load_study(str(self._folder.path)).trials, self._objectives)
        if not (added := self._comparable([row for row in better if str(row["trial"]) not in refused])):
            return False
        numbers = ", ".join(str(row["trial"]) for row in added)
        self._display.note(f"confirmed too, as nothing confirmed is better: trial {numbers}")
        self.candidates = [*self.candidates, *added]
        return True
