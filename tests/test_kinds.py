"""Times that different kinds of worker took stand in one table, but never as if one had taken them."""

import csv
import json
from dataclasses import replace

import pytest

from dashboards.pareto import main, rich_table
from dashboards.report import report
from dashboards.tables import kinds
from dashboards.tables.formats import FORMATS
from dashboards.tables.table import pareto_table
from orchestrator.driver import Driver
from orchestrator.search.rounds import take_rounds
from orchestrator.search.study import Study
from orchestrator.workers.pool import Finished
from search_spaces import load_space
from streamllm.results.study import load_study
from streamllm.results.study_folder import StudyFolder

from .made_studies import BASELINE, row, write_study
from .test_confirm import ROWS, measured
from .test_driver import Log, PretendPool
from .test_driver import measured as trial_measured
from .test_study import SPACE

ONE = {"device": "EPYC", "threads": 1, "software": "torch 2.9"}
OTHERS = [{"device": "Xeon"}, {"threads": 2}, {"software": "torch 2.10"}]


@pytest.mark.parametrize("other", OTHERS)
def test_a_front_of_several_kinds_of_worker_says_which_timed_what(other, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [row(0, 2.0, 9.0, **ONE), row(1, 3.0, 2.0, **ONE | other), row(2, 8.0, -1.0, **ONE)]
    study = load_study(str(write_study(tmp_path, rows, baseline=BASELINE | ONE, space={"name": "own"})))
    table = pareto_table([study])
    assert [one["timed_on"] for one in table.rows] == ["A", "B", "A"]
    assert [one["timed_on"] for one in table.baselines] == ["A"]
    named = kinds.described(ONE | other)
    assert any(note == f"Timed on B: {named}." for note in table.notes)
    for name in ("md", "latex", "html"):
        text = FORMATS[name].write(table)
        assert "timed on" in text and named in text, name
    ((name, value),) = other.items()
    assert [one[name] for one in csv.DictReader(FORMATS["csv"].write(table).splitlines())][1] == str(value)
    assert json.loads(FORMATS["json"].write(table))[1]["timed_on"] == "B"
    assert '<th scope="col" class="">timed on</th>' in report(study, ()) and named in report(study, ())
    assert rich_table(rows, "").table.columns[-1] == kinds.TIMED_ON
    main([str(study.folder)])
    printed = capsys.readouterr().out
    assert f"Timed on B: {named}." in printed and "do not compare" in printed


def test_of_one_kind_nothing_is_said(tmp_path):
    rows = [row(0, 2.0, 9.0, **ONE), row(1, 3.0, 2.0, **ONE), row(2, 1.0, 1.0, **ONE | {"threads": 2}, feasible=False)]
    here = load_study(str(write_study(tmp_path, rows, baseline=BASELINE | ONE)))
    xeon = ONE | {"device": "Xeon"}
    there = load_study(str(write_study(tmp_path, [row(0, 2.0, 9.0, **xeon)], "there", baseline=BASELINE | xeon)))
    for studies in ([here], [here, there]):
        table = pareto_table(studies)
        assert kinds.TIMED_ON not in table.columns and not any("Timed on" in note for note in table.notes)
    assert kinds.TIMED_ON in pareto_table([here], everything=True).columns


def test_letters_do_not_end():
    rows = [row(n, 1.0, 1.0, device=f"device {n}") for n in range(28)]
    assert list(kinds.letters([rows]).values())[24:] == ["Y", "Z", "A1", "B1"]


def pool_of(*kinds_of_workers):
    pool = PretendPool(len(kinds_of_workers), lambda worker, spec: of_kind(worker, spec, kinds_of_workers[worker]))
    pool._ready = [Finished(worker, description=dict(kind)) for worker, kind in enumerate(kinds_of_workers)]
    return pool


def of_kind(worker, spec, kind):
    return told(trial_measured(worker, spec), kind)


def told(finished, kind):
    """The measurement, by a worker of that kind."""
    return replace(finished, measurement=replace(finished.measurement, record=finished.measurement.record | kind))


@pytest.fixture
def drive(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    space = load_space(str(tmp_path / "space.yaml"))

    def drive(pool, trials):
        study, notes = Study("s", tmp_path / "journal.log", space, 32, seed=1), []
        driver = Driver(study, pool, 32, trials, [Log()], notes.append)
        driver.run()
        return driver, notes

    return drive


def test_a_worker_of_another_kind_is_warned_of_and_does_not_confirm(drive):
    two = ONE | {"threads": 2}
    driver, notes = drive(pool_of(two, ONE, ONE), 2)  # the last one given is the first to be ready
    assert notes == ["warning: worker 0 is of another kind than when the study began: threads 2, then 1"]
    workers, kind = driver.confirming
    assert (sorted(workers), kind) == ([1, 2], ONE)
    driver, notes = drive(pool_of(two, two), 4)
    assert len(notes) == 2, "the study goes on elsewhere: said, and all that is confirmed is confirmed there"
    assert driver.confirming[1] == two and len(driver.confirming[0]) == 2


def test_rounds_of_another_kind_of_worker_do_not_count(tmp_path):
    def round_of(pool_kind, workers=(0,), kind=None):
        pool = PretendRounds(pool_kind)
        taken = take_rounds(StudyFolder(tmp_path), pool, workers, ROWS, 1, lambda *_: None, kind=kind or pool_kind)
        return taken[0].line, len(pool.submitted)

    assert round_of(ONE) == (1, 3)
    assert round_of(ONE) == (1, 0)
    assert round_of(ONE | {"software": "torch 2.10"}) == (2, 3)
    assert round_of(ONE) == (1, 0)


def test_a_worker_that_comes_back_elsewhere_takes_no_part_in_a_round(tmp_path):
    pool = PretendRounds(ONE, back=ONE | {"device": "Xeon"}, deadly=1)
    taken = take_rounds(StudyFolder(tmp_path), pool, (0, 1), ROWS, 2, lambda *_: None, kind=ONE)
    assert [worker for worker, _ in pool.submitted] == [1, 0, 0, 0, 0, 0, 0], "no turn in the second round either"
    assert {time["device"] for one in taken for time in one.times.values()} == {"EPYC"}


class PretendRounds:
    """Answers at once; a `deadly` worker dies of its first measurement and is `back` as another."""

    def __init__(self, kind, back=None, deadly=None):
        self.kind, self.back, self.deadly = kind, back, deadly
        self.submitted, self._events = [], []

    def submit(self, worker, spec):
        self.submitted.append((worker, spec.configuration.policy.n_sink))
        if worker == self.deadly:
            self._events = [Finished(worker, error="died", died=True), Finished(worker, description=self.back)]
            return
        self._events.append(told(measured(worker, spec), self.kind))

    def wait(self, timeout):
        if self._events:
            yield self._events.pop(0)


def test_who_timed_the_rounds_takes_the_place_of_who_searched(tmp_path):
    confirmed = [{"trial": 0, "rounds": 3, "time_ratio": 1.0, "device": "a GPU"}]
    study = load_study(str(write_study(tmp_path, [row(0, 2.0, 1.0, device="a CPU", threads=4)], confirmed=confirmed)))
    assert (study.trials[0].device, study.trials[0].threads) == ("a GPU", None)
    assert study.searched[1].threads == 4
