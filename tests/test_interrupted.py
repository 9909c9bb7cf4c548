"""The driver is ended at every moment there is, by `kill -9` or Ctrl-C; the same command goes on from there."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from .conftest import GOLDEN
from .fuzz import kills
from .mortal_sweep import MOMENTS, run
from .preloaded import context, ended
from .waiting import wait_until

SPACE = "cap: 48\nparameters: {method: [ours, mit], n_sink: [0, 2, 4], compress_every: [1, 16]}\n"
TRIALS = 11
ARGUMENTS = ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--space", "space.yaml"]
ARGUMENTS += ["--study", "s", "--trials", str(TRIALS), "--workers", "2", "--confirm", "1"]


@pytest.fixture
def start(tmp_path, cluster, empty_mlflow):
    """Starts sweeps as processes that have everything imported already, on a Ray that is there already."""
    (tmp_path / "space.yaml").write_text(SPACE)
    shutil.copyfile(empty_mlflow, tmp_path / "mlflow.db")

    def start(moment):
        process = context().Process(target=run, args=(moment, tmp_path, [*ARGUMENTS, "--address", cluster.address]))
        process.start()
        return process

    return start


def stored(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "sweeps/.store").rglob("*.json")}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "sweeps/s/trials.jsonl").read_text().splitlines()]


def runs_of(folder):
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_ended_at_every_moment_and_started_again(start, tmp_path):
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    process = start("never")
    wait_until(lambda: not process.is_alive() or (stderr.exists() and "[ 1/" in stderr.read_text()), 300)

    def interrupted():
        """Asked for again each time: a library may be in no state to take it."""
        if not process.is_alive() or "interrupted" in stderr.read_text():
            return True
        os.killpg(process.pid, signal.SIGINT)
        return False

    wait_until(interrupted, 300, pause=1.0)
    ended(process)
    log = stderr.read_text()
    assert process.exitcode == 130, log
    assert "interrupted: the same command goes on from here" in log and "Traceback" not in log
    assert "Pareto front" in stdout.read_text() and "go on" in stdout.read_text(), "what is there is shown"
    assert json.loads((tmp_path / "sweeps/s/outcome.json").read_text())["status"] == "KILLED"

    finished, measured = 1, stored(tmp_path)
    for moment in MOMENTS:
        process = start(moment)
        ended(process)
        log = stderr.read_text()
        assert process.exitcode == (0 if moment == "never" else -signal.SIGKILL), log
        going_on = next(line for line in log.splitlines() if line.startswith("going on: "))
        before, finished = finished, int(going_on.split()[2])
        assert finished >= before, moment
        now = stored(tmp_path)
        assert {path: now[path] for path in measured} == measured, f"{moment}: a measurement was made again"
        measured = now
    assert finished == TRIALS, "all were finished before confirming"

    rows = [row for row in rows_of(tmp_path) if row["trial"] not in ("strict", "baseline")]
    assert sorted(row["trial"] for row in rows) == list(range(TRIALS)), "each once"
    assert len({(row["method"], row["n_sink"], row["compress_every"]) for row in rows}) == TRIALS
    assert (tmp_path / "sweeps/s/confirmed.jsonl").is_file()
    parents = [run for run in runs_of(tmp_path) if "trial" not in run.data.tags]
    children = [run for run in runs_of(tmp_path) if "trial" in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert sorted(run.data.tags["trial"] for run in children) == sorted(
        ["strict", "baseline", *map(str, range(TRIALS))]
    )
    assert {run.info.status for run in children} == {"FINISHED"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_first_ctrl_c_does_not_reach_what_follows(tmp_path):
    """In a process where nothing was spawned before."""
    (tmp_path / "follow.py").write_text(
        "from pathlib import Path\n"
        "from orchestrator.tracking.follower import Tracker\n"
        "from orchestrator.tracking.mlflow_runs import Projection\n"
        "from orchestrator.trials_file import TrialsFile\n"
        "from streamllm.results.study_folder import StudyFolder\n"
        "if __name__ == '__main__':\n"
        "    tracker = Tracker(Projection(StudyFolder(Path.cwd()), {}), TrialsFile(StudyFolder(Path.cwd()), []))\n"
        "    print(Path(f'/proc/{tracker._process.pid}/status').read_text())\n"
        "    tracker._process.kill()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "follow.py"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert "SigBlk:" in said.stdout, said.stderr
    blocked = int(said.stdout.split("SigBlk:")[1].split()[0], 16)
    assert blocked >> (signal.SIGINT - 1) & 1


def begun(process, stderr):
    """Waits until the first trial is finished."""
    wait_until(lambda: not process.is_alive() or (stderr.exists() and "[ 1/" in stderr.read_text()), 300)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_schedulers_and_closed_terminals_send_is_as_ctrl_c(number, start, tmp_path):
    process = start("never")
    begun(process, tmp_path / "stderr")
    os.killpg(process.pid, number)  # MLflow's follower is hit too
    ended(process)
    log = (tmp_path / "stderr").read_text()
    assert process.exitcode == 128 + number, log
    assert log.count("interrupted: the same command goes on from here") == 1
    assert "Traceback" not in log and "***" not in log, "Ray prints stacks"
    assert json.loads((tmp_path / "sweeps/s/outcome.json").read_text())["status"] == "KILLED"
    assert "RUNNING" not in {run.info.status for run in runs_of(tmp_path)}


def test_a_study_that_is_removed_meanwhile_is_one_line(start, tmp_path):
    process = start("never")
    begun(process, tmp_path / "stderr")
    wait_until(lambda: shutil.rmtree(tmp_path / "sweeps/s", ignore_errors=True) or not (tmp_path / "sweeps/s").exists())
    ended(process)
    last = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert process.exitcode == 1 and last.startswith("error: the study cannot be written: No such file or directory")


@pytest.mark.parametrize(
    ("kind", "target", "codes"),
    [
        ("search", "Ray's head", [1, 0]),
        ("search", "all, terminated", [143, 0]),
        ("search", "a worker", [0]),
        ("matrix", "driver", [-9, 0]),
    ],
)
def test_on_a_ray_of_its_own(kind, target, codes, tmp_path, empty_mlflow):
    """As in `python -m tests.fuzz.kills`, at a moment that is not random."""
    third = {"search": "[ 3/", "matrix": "[3/"}[kind]
    one = kills.play(tmp_path, empty_mlflow, target, lambda: third in read(tmp_path / "stderr"), random.Random(1), kind)
    assert one.was_there and one.wrong == [] and one.codes == codes


def read(path):
    return path.read_text() if path.exists() else ""
