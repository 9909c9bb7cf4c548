"""Times that different kinds of worker took stand in one table, but never as if one had taken them."""

import csv
import json

import pytest

from dashboards.pareto import main, rich_table
from dashboards.report import report
from dashboards.tables import kinds
from dashboards.tables.formats import FORMATS
from dashboards.tables.table import pareto_table
from orchestrator.search.rounds import rounds_so_far, take_rounds
from orchestrator.workers.kinds import Kinds, kind_of
from orchestrator.workers.messages import SweepError
from orchestrator.workers.pool import Finished
from streamllm.results.schema import Row
from streamllm.results.study import load_study
from streamllm.results.study_folder import StudyFolder

from .made_studies import BASELINE, row, write_study
from .pretended import PretendPool, description, measured, subject
from .test_confirm import ROWS, ready

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
        head = "timed" if name == "latex" else "timed on"  # "on" is on the line below
        assert head in text and named in text, name
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


def test_a_worker_of_another_kind_is_warned_of_and_does_not_confirm():
    two, notes = ONE | {"threads": 2}, []
    study = Kinds([Row(model_digest="d", **ONE)], notes.append)
    for worker, kind in enumerate((ONE, two)):
        study.check(worker, description(kind=kind))
    assert notes == ["warning: worker 1 is of another kind than when the study began: threads 2, then 1"]
    here = {"here": [0]}
    assert study.to_confirm({kind_of(two): {"here": [1, 2]}, kind_of(ONE): here}) == kind_of(ONE)
    others = {kind_of(two): {"here": [1, 2]}, kind_of(ONE | {"device": "Xeon"}): here}
    assert study.to_confirm(others) == kind_of(two), "it goes on elsewhere: all that is confirmed is confirmed there"


def test_rounds_of_another_kind_of_worker_do_not_count(tmp_path):
    def round_of(kind):
        pool = PretendPool(descriptions=[description(kind=kind)])
        take_rounds(StudyFolder(tmp_path), ready(pool, tmp_path), subject(), ROWS, 1, kind=kind_of(kind))
        return [one.line for one in rounds_so_far(StudyFolder(tmp_path), kind_of(kind))]

    assert round_of(ONE) == [1]
    assert round_of(ONE | {"software": "torch 2.10"}) == [2]
    assert round_of(ONE) == [1, 3]


def test_a_worker_that_comes_back_elsewhere_takes_no_part_in_a_round(tmp_path):
    def answer(worker, job):
        pool.descriptions[0] = description(kind=ONE | {"device": "Xeon"})
        return Finished(worker, error="died", died=True) if worker == 0 else measured(job)

    pool = PretendPool(answer=answer, descriptions=[description(kind=ONE)] * 2)
    taken = take_rounds(StudyFolder(tmp_path), ready(pool, tmp_path), subject(), ROWS, 2, kind=kind_of(ONE))
    assert [worker for worker, _ in pool.asked] == [0, 1, 1, 1, 1, 1, 1], "no turn in the second round either"
    assert {time["device"] for one in taken for time in one.times.values()} == {"EPYC"}


def test_a_round_does_not_go_on_on_a_worker_that_came_back_as_another_kind(tmp_path):
    """Though it has the number of the one that died, and no other is free."""

    def answer(worker, job):
        pool.descriptions[0] = description(kind=ONE | {"device": "Xeon"})
        return Finished(worker, error="died", died=True)

    pool = PretendPool(answer=answer, descriptions=[description(kind=ONE)])
    with pytest.raises(SweepError, match="no worker is left of the kind"):
        take_rounds(StudyFolder(tmp_path), ready(pool, tmp_path), subject(), ROWS, 1, kind=kind_of(ONE))
    assert len(pool.submitted) == 1


def test_who_timed_the_rounds_takes_the_place_of_who_searched(tmp_path):
    confirmed = [{"trial": 0, "rounds": 3, "time_ratio": 1.0, "device": "a GPU"}]
    study = load_study(str(write_study(tmp_path, [row(0, 2.0, 1.0, device="a CPU", threads=4)], confirmed=confirmed)))
    assert (study.trials[0].device, study.trials[0].threads) == ("a GPU", None)
    assert study.searched[1].threads == 4
