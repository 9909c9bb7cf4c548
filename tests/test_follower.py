"""The process that follows a sweep for MLflow is killed: another one takes its place."""

import os
import signal
import sys

import pytest

from orchestrator.conclusion import report_of
from orchestrator.tracking import follower
from orchestrator.tracking.follower import Tracker
from orchestrator.tracking.mlflow_runs import Projection, Report
from orchestrator.tracking.writers import Pace
from orchestrator.trials_file import TrialsFile
from streamllm.results.study import load_study
from streamllm.results.study_folder import StudyFolder

from . import preloaded
from .test_tracking import CONFIGURATION, ROWS, contents, row, store
from .test_tracking import study as study
from .waiting import wait_until


class Mortal(follower._Follower):
    """Says why, and dies."""

    def run(self, pipe, said):
        pipe.send((1, None, None, ""))  # it always gets as far as that
        os.dup2(said.detach(), 2)
        print("out of luck", file=sys.stderr)
        sys.exit(3)


@pytest.fixture
def following(study, monkeypatch):
    """Makes trackers of the study, and ends their processes, which have MLflow imported already."""
    context = preloaded.context()
    monkeypatch.setattr(follower.multiprocessing, "get_context", lambda _: context)
    (study / "trials.jsonl").unlink()
    made = []

    def follow(writers=1):
        trials = TrialsFile(StudyFolder(study), [])
        projection = Projection(StudyFolder(study), CONFIGURATION)
        projection._pace = Pace(writers, in_processes=True)
        made.append(Tracker(projection, trials))
        return trials, made[-1]

    yield follow
    for tracker in made:
        tracker._process.kill()


def kill(tracker):
    process = tracker._process
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)


@pytest.mark.parametrize("when", ["at once", "between trials", "at the end", "each time"])
def test_a_killed_follower_is_replaced(following, study, when):
    trials, tracker = following()
    if when in ("at once", "each time"):
        kill(tracker)
    for number, finished in enumerate(ROWS):
        trials.trial_finished(finished)
        tracker.trial_finished(finished)
        if number == 2 and when in ("between trials", "each time"):
            wait_until(lambda: tracker.backlog == 0)
            kill(tracker)
    if when in ("at the end", "each time"):
        wait_until(lambda: tracker.backlog == 0)
        kill(tracker)
    StudyFolder(study).write_outcome("FINISHED")
    assert tracker.finish(report_of(load_study("s"), []), lambda backlog: None) is None
    there = contents(store())
    assert sorted(there) == ["", "0", "1", "2", "3", "baseline"]
    assert there[""][0] == "FINISHED" and there["3"][0] == "FAILED"


def test_one_that_keeps_dying_is_given_up_with_its_last_words(following, study, monkeypatch):
    monkeypatch.setattr(follower, "_Follower", Mortal)
    _, tracker = following()
    reason = tracker.finish(Report(), lambda backlog: None)
    assert reason == "the process that writes to MLflow keeps dying: out of luck"


def test_several_runs_that_a_kill_left_half_written_are_completed(following, study):
    trials, tracker = following(writers=4)
    rows = [row(number) for number in range(60)]
    for one in rows:
        trials.trial_finished(one)
    wait_until(lambda: tracker.backlog < 55)
    kill(tracker)
    tracker.trial_finished(rows[-1])
    wait_until(lambda: tracker.backlog == 0)
    StudyFolder(study).write_outcome("FINISHED")
    assert tracker.finish(report_of(load_study("s"), []), lambda backlog: None) is None
    there = contents(store())
    assert sorted(there) == sorted(["", *map(str, range(60))])
    assert {(found[0], len(found[5].get("time_ratio", [0]))) for found in there.values()} == {("FINISHED", 1)}
    assert all(found[6] == ["losses.npy", "result.json"] for trial, found in there.items() if trial)
