"""MLflow as a projection of a study's folder and store: real stores, real servers, no sweep."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from orchestrator import sync
from orchestrator.conclusion import report_of, write_outputs
from orchestrator.tracking import mlflow_runs as tracking
from orchestrator.tracking.follower import Tracker
from orchestrator.tracking.mlflow_runs import Projection
from orchestrator.trials_file import TrialsFile
from orchestrator.workers.lease import study_lease
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name
from streamllm.results.schema import Row
from streamllm.results.study import load_study, view_of
from streamllm.results.study_folder import StudyFolder, write_rows

from .made_studies import SOURCE
from .waiting import wait_until

CONFIGURATION = {
    "study": "s",
    "study_id": "5711d",
    "commit": "c0ffee",
    "model": "m",
    "dtype": "float32",
    "quantization": "int8_weight_only",
    "cap": 48,
    "seed": 0,
    "trials": 4,
    "space": {"name": "default"},
    "source": SOURCE,
    "summary": "m on t",
    "objectives": {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"},
}
KEY = {"kind": "quality"}
LOSSES = np.column_stack((np.arange(5.0), np.linspace(1, 2, 5)))


def row(trial, tpot=2.0, increase=1.0, **more):
    policy = {"n_sink": 4, "window_size": 44, "compress_every": 1, "cache_slack": 0, "max_drop": 0}
    times = {"time_ratio": tpot / 2, "time_ratio_low": tpot / 2 - 0.05, "time_ratio_high": tpot / 2 + 0.05}
    times |= {"measured_tpot_ms": 1.5 * tpot, "reference_tpot_ms": 2.0, "speedup": 9.0 / tpot}
    quality = {"perplexity": 15.5, "ppl_vs_strict_percent": increase, "ppl_increase_percent": increase + 0.5}
    words = {"method": "ours", "backend": "math", "backend_requested": "flash", "dtype": "float32", "model": "m"}
    words |= {"device": "CPU", "protocol": "fast", "dataset": "t", "state": "complete", "feasible": True}
    return Row.of({
        "trial": trial, **words, **policy, **times, **quality, "runtime_sec": 2.5, "quality_entry": entry_name(KEY),
        "finished_at": 1.7e9, "commit": "c0ffee", "reused": False, **more
    })  # fmt: skip


_KEPT = ("trial", "method", "backend_requested", "n_sink", "finished_at", "commit")
FAILED = Row.of({name: row(3)[name] for name in _KEPT} | {
    "state": "failed", "reason": "RuntimeError: nope", "feasible": False, "window_size": 44, "compress_every": 1,
    "cache_slack": 0, "max_drop": 0,
})  # fmt: skip
ROWS = [row("baseline", 9.0, 0.0, method="recompute"), row(0, 3.0, 0.5), row(1, 2.0, 1.0), row(2, 4.0, 4.0), FAILED]


@pytest.fixture
def study(tmp_path, empty_mlflow, monkeypatch):
    """A folder of a finished study, in a working directory with an empty MLflow store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_mlflow, "mlflow.db")
    folder = tmp_path / "sweeps/s"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps(CONFIGURATION))
    MeasurementStore(tmp_path / "sweeps/.store").put(KEY, Measurement({}, LOSSES))
    write_rows(folder / "trials.jsonl", ROWS)
    StudyFolder(folder).write_outcome("FINISHED")
    return folder


def store(name="mlflow.db"):
    """MLflow keeps connections by URI, for as long as the process lives: no two tests may have the same."""
    return f"sqlite:///{Path(name).absolute()}"


def test_children_follow_to_a_new_parent(study):
    """The parent run was deleted in the UI."""
    assert synchronise() == 0
    client = MlflowClient(store())
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "streamllm-sweep"]
    (parent,) = [run for run in client.search_runs([experiment]) if "mlflow.parentRunId" not in run.data.tags]
    client.delete_run(parent.info.run_id)
    assert synchronise() == 0
    runs = client.search_runs([experiment])
    (parent,) = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {run.data.tags.get("mlflow.parentRunId", parent) for run in runs} == {parent} and len(runs) == 6


def test_a_name_that_mlflow_has_no_tags_for(study):
    (study / "sweep.json").write_text(json.dumps(CONFIGURATION | {"study": "a+b"}))
    assert synchronise() == 0
    client = MlflowClient(store())
    tags = client.get_experiment_by_name("streamllm-sweep").tags
    assert "tags.study = 'a+b'" in tags[f"mlflow.sharedViewState.{view_of('a+b')}"]
    assert view_of("a+b") != view_of("a-b") and view_of("model-text.v1_x") == "model-text.v1_x"


def synchronise(uri=None):
    return sync.main(["s", "--tracking-uri", uri or store()])


def contents(uri=None):
    """All that MLflow has of the study, by trial ("" is the parent): every run once."""
    client = MlflowClient(uri or store())
    found = {}
    for run in client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000):
        trial = run.data.tags.get("trial", "")
        assert trial not in found, "two runs of one trial"
        tags = {name: value for name, value in run.data.tags.items() if name != "mlflow.parentRunId"}
        history = {
            name: [(m.value, m.timestamp, m.step) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        times = (run.info.start_time if trial else None, run.info.end_time)
        artifacts = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        found[trial] = (run.info.status, run.info.run_name, times, tags, run.data.params, history, artifacts)
    return found


def search(condition):
    client = MlflowClient(store())
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return sorted(run.data.tags.get("trial", "") for run in client.search_runs([experiment.experiment_id], condition))


def test_runs_are_found_by_what_they_are_and_carry_what_was_measured(study):
    confirmed = Row.of({"trial": 1, "time_ratio": 1.25, "time_ratio_low": 1.125, "rounds": 3, "reference_tpot_ms": 2.0})
    write_rows(study / "confirmed.jsonl", [confirmed | {"front_probability": 0.75}])
    assert synchronise() == 0
    assert search("tags.pareto = 'True' and tags.`backend.used` = 'math' and metrics.ppl_increase_percent < 3") == ["1"]
    assert search("tags.`backend.requested` = 'flash' and tags.feasible = 'False'") == ["3"]
    assert search("tags.study = 's' and tags.method = 'ours' and metrics.tpot_ms < 3.5") == ["0", "1"]
    assert search("tags.quantization = 'int8_weight_only' and tags.commit = 'c0ffee' and params.n_sink = '4'") == [
        "0", "1", "2", "3", "baseline"
    ]  # fmt: skip
    assert search("tags.protocol = 'fast' and tags.dataset = 't' and tags.device = 'CPU'") == [
        "0",
        "1",
        "2",
        "baseline",
    ]
    assert search("attributes.status = 'FAILED' and tags.reason LIKE '%nope'") == ["3"]
    assert search("metrics.tpot_ms > 2.4 and metrics.rounds = 3 and metrics.front_probability >= 0.75") == ["1"]
    assert search("metrics.tpot_ms_high > 4 and tags.trial = '2'") == ["2"]

    client = MlflowClient(store())
    runs = {run.data.tags.get("trial", ""): run for run in client.search_runs(["1"])}
    assert {run.data.tags.get("mlflow.parentRunId") for trial, run in runs.items() if trial} == {runs[""].info.run_id}
    assert runs["1"].data.metrics["tpot_ms"] == 2.5, "the confirmed one"
    assert (runs["1"].info.end_time, runs["1"].info.start_time) == (1_700_000_000_000, 1_699_999_997_500)
    result = client.download_artifacts(runs["1"].info.run_id, "")
    assert Row.from_json(json.loads(Path(result, "result.json").read_text()), "MLflow") == ROWS[2]
    assert np.array_equal(np.load(f"{result}/losses.npy"), LOSSES)
    assert {"pareto.md", "pareto.csv", "pareto.png", "results_summary.png", "report.html", "sweep.json"} <= {
        file.path for file in client.list_artifacts(runs[""].info.run_id)
    }
    assert runs[""].data.params["cap"] == "48"


def test_mlflows_own_view_shows_what_matters_at_once(study):
    assert synchronise() == 0
    client = MlflowClient(store())
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert "parent run per study" in experiment.tags["mlflow.note.content"]
    view = json.loads(experiment.tags["mlflow.sharedViewState.s"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`time_ratio`", True)
    assert search(view["searchFilter"]) == ["", "0", "1", "2", "3", "baseline"]
    runs = client.search_runs([experiment.experiment_id])
    logged = {f"{kind}.`{name}`" for run in runs for kind in ("params", "metrics", "tags")
              for name in getattr(run.data, kind)}  # fmt: skip
    assert view["selectedColumns"] == view["columnOrder"] and set(view["selectedColumns"]) - logged == {
        "metrics.`peak_kv`",
        "metrics.`rounds`",
        "metrics.`front_probability`",
    }, "of columns that are never logged"
    note = next(run for run in runs if "trial" not in run.data.tags).data.tags["mlflow.note.content"]
    assert note.startswith("How fast can m stream") and "4 configurations were tried" in note
    assert "| ours | math |" in note, "the front"


def test_a_description_that_mlflow_would_cut_says_what_is_missing():
    note = "\n".join(f"| {n} | {'x' * 90} |" for n in range(200))
    kept = tracking.shortened(note).splitlines()
    assert len("\n".join(kept)) <= 8000
    shown = len(kept) - 2
    assert kept[:shown] == note.splitlines()[:shown] and shown > 70
    assert kept[-1] == f"({200 - shown} more lines are in the artifact pareto.md)"
    assert tracking.shortened("short") == "short"


def test_mlflow_is_rebuilt_whole_and_syncing_again_changes_nothing(study, empty_mlflow, capsys):
    assert synchronise() == 0
    first = contents()
    assert sorted(first) == ["", "0", "1", "2", "3", "baseline"]
    assert {trial: found[0] for trial, found in first.items() if found[0] != "FINISHED"} == {"3": "FAILED"}
    assert "5 of them logged" in capsys.readouterr().out
    assert synchronise() == 0
    assert "0 of them logged" in capsys.readouterr().out
    assert contents() == first
    shutil.copyfile(empty_mlflow, "lost.db")
    assert synchronise(store("lost.db")) == 0
    assert contents(store("lost.db")) == first


def test_what_changed_since_is_brought_up_to_date(study):
    write_rows(study / "trials.jsonl", ROWS[:3])
    synchronise()
    assert search("tags.pareto = 'True'") == ["0", "1"]
    write_rows(study / "trials.jsonl", [*ROWS, row(4, 1.0, 0.1)])
    synchronise()
    assert search("tags.pareto = 'True'") == ["4"]
    assert len(contents()) == 7


def test_what_is_no_longer_confirmed_is_taken_back_and_milliseconds_follow_the_reference(study):
    confirmed = Row.of(
        {"trial": 1, "time_ratio": 1.5, "rounds": 3, "front_probability": 0.75, "reference_tpot_ms": 2.0}
    )
    write_rows(study / "confirmed.jsonl", [confirmed])
    synchronise()
    assert search("metrics.rounds > 0") == ["1"] and search("metrics.tpot_ms = 3") == ["0", "1"]
    (study / "confirmed.jsonl").unlink()
    write_rows(study / "trials.jsonl", [*ROWS, *(row(n, 5.0, 5.0, reference_tpot_ms=4.0) for n in range(4, 12))])
    synchronise()
    assert search("metrics.rounds > 0") == [] and search("metrics.front_probability >= 0.5") == []
    run = contents()["1"]
    assert [value for value, *_ in run[5]["time_ratio"]] == [1.0, 1.5, 1.0]
    assert [value for value, *_ in run[5]["tpot_ms"]] == [3.0, 4.0], "in the unit of all: the reference takes 4 ms now"


def test_what_a_kill_left_running_or_twice_is_ended_and_once(study):
    client = MlflowClient(store())
    experiment = client.create_experiment(tracking.EXPERIMENT)
    common = {"study": "s", "study_id": "5711d"}
    client.create_run(experiment, tags=common)
    for trial in ("1", "2", "2", "77"):  # begun, begun, asked for twice of a slow server, and of no trial any more
        client.create_run(experiment, tags=common | {"trial": trial})
    assert synchronise() == 0
    runs = contents()
    assert {trial: found[0] for trial, found in runs.items()} == {
        "": "FINISHED", "baseline": "FINISHED", "0": "FINISHED", "1": "FINISHED", "2": "FINISHED", "3": "FAILED",
        "77": "KILLED",
    }  # fmt: skip
    assert runs["1"][5]["time_ratio"] == [(1.0, 1_700_000_000_000, 0)]
    assert "result.json" in runs["2"][6]


def test_what_mlflow_refuses_does_not_hold_up_the_rest(study, capsys):
    synchronise()
    write_rows(study / "trials.jsonl", [row(0, n_sink=1), *ROWS[2:], row(5)])
    capsys.readouterr()
    assert synchronise() == 1
    assert "MLflow refuses trial 0" in capsys.readouterr().err
    assert "5" in contents()


def test_sync_says_what_is_wrong(study, capsys):
    assert sync.main(["nowhere"]) == 2
    assert "study 'nowhere'" in capsys.readouterr().err
    with study_lease(StudyFolder(study)):
        assert synchronise() == 2
    assert "being run by process" in capsys.readouterr().err
    assert synchronise(f"http://127.0.0.1:{free_port()}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: MLflow cannot be brought up to date") and error.count("\n") == 1


def test_a_row_that_is_being_written_is_not_read(study):
    with (study / "trials.jsonl").open("a") as file:
        file.write(json.dumps(dict(row(9)))[:50])
    assert [r["trial"] for r in load_study("s").trials] == [0, 1, 2, 3]


def test_the_trials_file_follows_the_study_and_keeps_the_baseline(study):
    trials = TrialsFile(StudyFolder(study), [ROWS[1]])
    assert not (study / "outcome.json").exists(), "a study that runs has no outcome"
    trials.trial_finished(ROWS[0] | {"reused": True, "finished_at": 1.8e9})
    trials.trial_finished(ROWS[2])
    results = load_study("s")
    assert ROWS[0].items() <= results.baseline.items(), "found again, not measured again"
    assert [row["trial"] for row in results.trials] == [0, 1] and results.trials[1]["tpot_ms"] == 2.0
    trials.trial_finished(ROWS[0] | {"time_ratio": 4.0})
    assert load_study("s").baseline["tpot_ms"] == 8.0
    assert trials.count == 4


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def server(folder, port):
    """A real tracking server that serves artifacts too, until the block ends: then it is killed."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    log = (folder / "server.log").open("a")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait(30)


class SlowProxy:
    """Passes connections on to a port, each piece after `delay` seconds."""

    def __init__(self, port):
        self.port, self.delay = port, 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)  # which wakes who accepts; a close alone does not
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                upstream = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                client.close()
                continue
            for source, target in ((client, upstream), (upstream, client)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or each piece waits 40 ms more
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source, target):
        try:
            while piece := source.recv(65536):
                time.sleep(self.delay)
                target.sendall(piece)
        except OSError:
            pass
        for end in (source, target):
            end.close()


@pytest.mark.timeout(900)
def test_a_server_that_is_down_comes_is_slow_dies_and_is_back(study, tmp_path, capfd, request):
    port = free_port()
    proxy = SlowProxy(port)
    request.addfinalizer(proxy.close)
    (study / "trials.jsonl").unlink()
    trials = TrialsFile(StudyFolder(study), [])
    projection = Projection(CONFIGURATION, MeasurementStore(study.parent / ".store"), proxy.uri)
    tracker = Tracker(projection, trials, longest_pause_sec=1.0)

    def finish_trial(row):
        trials.trial_finished(row)
        tracker.trial_finished(row)

    finish_trial(ROWS[0])
    wait_until(lambda: tracker.problem is not None)
    finish_trial(ROWS[1])
    assert tracker.backlog == 2
    with server(tmp_path, port):
        wait_until(lambda: tracker.backlog == 0)
        assert tracker.problem is None
        proxy.delay = 0.2
        finish_trial(ROWS[2])
        wait_until(lambda: tracker.backlog == 0)
    proxy.delay = 0.0
    finish_trial(ROWS[3])
    wait_until(lambda: tracker.problem is not None)
    assert tracker.backlog == 1
    finish_trial(ROWS[4])
    StudyFolder(study).write_outcome("FINISHED")
    results = load_study("s")  # before the server is there: then it finishes
    report = report_of(results, [*write_outputs(results), study / "sweep.json"])
    assert tracker.finish(report, lambda backlog: None, patience_sec=0.0) is not None, "does not wait for ever"
    assert tracker.backlog == 2
    with server(tmp_path, port):
        assert tracker.finish(report, lambda backlog: None, patience_sec=300) is None
        through_server = contents(proxy.uri)
        assert sorted(through_server) == ["", "0", "1", "2", "3", "baseline"]
        assert "View run" not in capfd.readouterr().out
        assert through_server[""][0] == "FINISHED" and through_server["3"][0] == "FAILED"
        assert synchronise(proxy.uri) == 0
        assert contents(proxy.uri) == through_server
        client = MlflowClient(proxy.uri)
        run = client.search_runs(["1"], "tags.trial = '1'")[0]
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
        assert np.array_equal(np.load(f"{client.download_artifacts(run.info.run_id, '')}/losses.npy"), LOSSES)
