"""MLflow as a projection of a study's folder and store: real stores, real servers, no sweep."""

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import unquote

import numpy as np
import pytest
from mlflow import MlflowClient

from dashboards.page.sources import runs_address
from orchestrator import sync
from orchestrator.conclusion import report_of, write_outputs
from orchestrator.tracking import mlflow_runs as tracking
from orchestrator.tracking.child_runs import Destination, WriterProcess
from orchestrator.tracking.client import WriterError
from orchestrator.tracking.follower import Tracker
from orchestrator.tracking.locks import opening, writing
from orchestrator.tracking.mlflow_runs import Projection, Report
from orchestrator.tracking.system_metrics import system_metrics
from orchestrator.tracking.writers import Pace
from orchestrator.trials_file import TrialsFile
from orchestrator.workers.lease import study_lease
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name
from streamllm.results.mlflow_address import artifact_page, fronts_page, runs_page, shown_at, store_uri
from streamllm.results.schema import POLICY_KNOBS, Row
from streamllm.results.study import EXPERIMENT, load_study, view_of
from streamllm.results.study_folder import StudyFolder, write_rows

from .browser import browser, needs_browser
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
        "trial": trial, **words, **policy, **times, **quality, "measuring_sec": 2.5, "quality_entry": entry_name(KEY),
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
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
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


def test_a_study_that_is_synchronised_later_took_as_long_as_it_took(study):
    """From its first measurement to its end, whenever MLflow gets to know it."""
    assert synchronise() == 0
    client = MlflowClient(store())
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "streamllm-sweep"]
    runs = client.search_runs([experiment])
    (parent,) = [run.info for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.start_time == int(1.7e12) - 2500 == min(run.info.start_time for run in runs)
    assert parent.end_time == int(1000 * StudyFolder(study).read_outcome()[1]) > parent.start_time


def test_one_that_ended_without_a_measurement_did_so_when_it_did(study):
    (study / "trials.jsonl").write_text("")
    began = Projection(StudyFolder(study), CONFIGURATION, store())._began_at()
    assert began == int(1000 * StudyFolder(study).read_outcome()[1])


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
        names_store = {"mlflow.parentRunId"} | ({"digest"} if not trial else set())  # of the report, with its links
        tags = {name: value for name, value in run.data.tags.items() if name not in names_store}
        tags = {name: value.replace(run.info.run_id, "itself") for name, value in tags.items()}
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
    experiment = client.get_experiment_by_name(EXPERIMENT)
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
    assert {"pareto.md", "pareto.csv", "pareto.png", "results_summary.png", "Report.html", "sweep.json"} <= {
        file.path for file in client.list_artifacts(runs[""].info.run_id)
    }
    assert runs[""].data.params["cap"] == "48"


def test_mlflows_own_view_shows_what_matters_at_once(study):
    assert synchronise() == 0
    client = MlflowClient(store())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    link = "[All runs of study s](#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=s)"
    fronts = f"[The fronts of all studies]({fronts_page('1')[1:]})"
    assert experiment.tags["mlflow.note.content"].startswith(
        f"{link}\n\n{fronts}\n\nSweeps of streamllm-sweep: a parent"
    )
    view = json.loads(experiment.tags["mlflow.sharedViewState.s"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`time_ratio`", True)
    assert search(view["searchFilter"]) == ["", "0", "1", "2", "3", "baseline"]
    runs = client.search_runs([experiment.experiment_id])
    logged = {f"{kind}.`{name}`" for run in runs for kind in ("params", "metrics", "tags")
              for name in getattr(run.data, kind)}  # fmt: skip
    logged.add("attributes.`Dataset`")
    assert view["selectedColumns"] == view["columnOrder"] and set(view["selectedColumns"]) - logged == {
        "metrics.`peak_kv`",
        "metrics.`kl`",
        "metrics.`rounds`",
        "metrics.`front_probability`",
    }, "of columns that are never logged"
    assert view["columnOrder"][:11] == [
        "tags.`pareto`", "metrics.`tpot_ms`", "metrics.`front_probability`", "metrics.`ppl_vs_strict_percent`",
        "tags.`method`", "tags.`backend.used`", *(f"params.`{knob.name}`" for knob in POLICY_KNOBS),
    ]  # fmt: skip
    parent = next(run for run in runs if "trial" not in run.data.tags)
    note = parent.data.tags["mlflow.note.content"]
    report = f"[The report]({artifact_page('1', parent.info.run_id, 'Report.html')[1:]})"
    assert client.list_artifacts(parent.info.run_id)[0].path == "Report.html"
    assert note.startswith(f"{link}\n\n{report}\n\nHow fast can m stream") and "4 configurations were tried" in note
    assert "| ours | math |" in note, "the front"


def test_digests_versions_and_who_measured_are_tags_of_trials_and_of_the_study(study, monkeypatch):
    alike = {"model_digest": "da7a", "text_digest": "7e47", "version": "0.1", "software": "torch 2, omp PASSIVE"}
    first = row(0, 3.0, 0.5, worker=0, host="n1", **alike)
    second = row(1, 2.0, 1.0, worker=1, host="n2", **alike | {"device": "GPU"})
    write_rows(study / "trials.jsonl", [first])
    assert synchronise() == 0
    assert contents()[""][3]["device"] == "CPU"
    write_rows(study / "trials.jsonl", [first, second])
    assert synchronise() == 0
    assert search("tags.host = 'n2' and tags.worker = '1' and tags.software LIKE 'torch 2%'") == ["1"]
    assert search("tags.model_digest = 'da7a' and tags.text_digest = '7e47' and tags.version = '0.1'") == ["", "0", "1"]
    tags = contents()[""][3]
    assert (tags["device"], tags["host"], tags["software"]) == ("CPU; GPU", "n1; n2", "torch 2, omp PASSIVE")
    set_again = []
    monkeypatch.setattr(MlflowClient, "set_tag", lambda _, run, name, value: set_again.append(name))
    assert synchronise() == 0 and set_again == []


def test_studies_are_told_apart_and_compared_by_what_is_recommended(study):
    for name in ("s", "other"):
        (study / "sweep.json").write_text(json.dumps(CONFIGURATION | {"study": name, "study_id": name}))
        assert synchronise() == 0
    client = MlflowClient(store())
    runs = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    colors = {(run.data.tags["study"], run.data.tags["mlflow.runColor"]) for run in runs}
    assert len(colors) == len(dict(colors)) == len({color for _, color in colors}) == 2
    parents = [run for run in runs if "trial" not in run.data.tags]
    assert [run.data.tags["recommended"] for run in parents] == ["0", "0"]
    compared = parents[0].data.metrics
    assert (compared["recommended/tpot_ms"], compared["recommended/ppl_vs_strict_percent"]) == (3.0, 0.5)


def test_the_machine_is_watched_while_a_study_is_followed(study, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    client = MlflowClient(store())
    run = client.create_run(client.create_experiment("x")).info.run_id
    for _ in range(2):
        before = len(client.get_metric_history(run, "system/cpu_utilization_percentage"))
        with system_metrics(run, store()):
            wait_until(
                lambda before=before: len(client.get_metric_history(run, "system/cpu_utilization_percentage")) > before
            )
    steps = [metric.step for metric in client.get_metric_history(run, "system/cpu_utilization_percentage")]
    assert steps == [*range(len(steps))], "it goes on where it was"
    for name in [name for name in sys.modules if name.startswith("mlflow.system_metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psutil", None)
    with system_metrics(run, "nowhere"):
        pass


@needs_browser
def test_what_mlflows_ui_makes_of_it(study, tmp_path):
    """In a browser that has never been there."""
    assert synchronise() == 0
    port = free_port()
    with server(tmp_path, port), browser("--window-size=3600,1000") as chromium:
        wait_until(lambda: answers(port), 300)
        open_in_mlflow(chromium, f"http://127.0.0.1:{port}/#/experiments/1", f"{_TEXT}.includes('All runs of study s')")
        link = chromium.run("return [...document.links].find(link => link.innerText == 'All runs of study s').href")
        assert link == f"http://127.0.0.1:{port}{runs_page('1', 's')}"
        open_in_mlflow(chromium, f"http://127.0.0.1:{port}/#/experiments/1/runs", f"{_NAMES}.startsWith('s')")
        wait_until(lambda: unfolded(chromium), 120, what="six runs")
        open_in_mlflow(chromium, link, f"{_NAMES} == '001 ours,000 ours,002 ours,baseline,003 ours,s'")
        shown = chromium.run(f"return {_TEXT}").split("\n")
        assert {"pareto", "tpot_ms", "ppl_vs_strict_percent", "backend.used", "n_sink", "Dataset"} <= set(shown)
        fronts = f"http://127.0.0.1:{port}{fronts_page('1')}"
        open_in_mlflow(chromium, fronts, f"{_TEXT}.includes('tpot_ms vs. ppl_vs_strict_percent')")
        chromium.until(f"{_NAMES} == '001 ours,000 ours'")
        assert "Model metrics" not in chromium.run(f"return {_TEXT}"), "a bar chart of each metric"


def open_in_mlflow(chromium, address, condition):
    """Waits until the page there is as it is to be. It is loaded anew: MLflow's pages break where one is left for
    another while it loads, and say that something went wrong; then it is opened again."""

    def there():
        if chromium.run(f"return {_TEXT}.includes('Something went wrong')"):
            load()
        return chromium.run(f"return {condition}")

    def load():
        chromium.open("about:blank")
        chromium.until("location.href == 'about:blank'")
        chromium.open(address)
        chromium.until("location.href != 'about:blank'")

    load()
    wait_until(there, 120, pause=0.1, what=condition)


def unfolded(chromium):
    """Whether the study's runs are all shown. MLflow itself unfolds them, but not always, and a press just when it does
    folds them again: after a press it is waited for what comes of it, and looked again."""
    shown = chromium.run(f"return {_NAMES}")
    if shown == "s":
        chromium.run("document.querySelector('.ag-pinned-left-cols-container button').click()")
        with contextlib.suppress(AssertionError):
            chromium.until(f"{_NAMES} != 's'", 10)
    return len(shown.split(",")) == 6


def trials_page(trial):
    """Where the report links to."""
    told = runs_address(load_study("s"))
    assert told["command"] == "mlflow ui" and told["address"].startswith("http://127.0.0.1:5000/#/experiments/1/runs?")
    return f"{told['address']}'{trial}'"


def test_the_study_notes_where_its_runs_are_for_the_report_to_link_to(study):
    assert runs_address(load_study("s")) is None
    assert synchronise() == 0
    condition = unquote(trials_page("2").partition("&searchFilter=")[2])
    assert search(condition) == ["2"]
    folder = StudyFolder(study)
    assert folder.read_tracking() == (store(), "1")
    folder.write_tracking("https://there", "2")
    assert folder.read_tracking() == ("https://there", "2")
    folder.tracking.write_text('{"uri": 3}')
    assert runs_address(load_study("s")) is None


_TEXT = "(document.body?.innerText ?? '')"
_NAMES = (
    "[...document.querySelectorAll('.ag-pinned-left-cols-container [role=row]')]"
    ".sort((one, other) => one.getAttribute('row-index') - other.getAttribute('row-index'))"
    ".map(row => row.querySelector('a')?.innerText.split(' S=')[0]).join(',')"
)
"""Of the runs in the table, in its order."""


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
    assert [value for value, *_ in run[5]["tpot_ms"]] == [2.0, 3.0, 4.0], "the reference takes 4 ms now"


def test_what_a_kill_left_running_or_twice_is_ended_and_once(study, monkeypatch):
    monkeypatch.setattr(tracking, "_PAGE", 2)  # what is deleted would move the rest from one page to another
    client = MlflowClient(store())
    experiment = client.create_experiment(EXPERIMENT)
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


def test_several_at_a_time_log_what_one_does(study, empty_mlflow, monkeypatch):
    """Of a data set that the experiment does not know yet; a trial's last row counts."""
    rows = [row(n, 2.0 + n, text_digest="d" * 64) for n in range(16)]
    fixed = [row("baseline", 9.0, 0.0, method="recompute", perplexity=15.0 + n) for n in range(8)]
    write_rows(study / "trials.jsonl", [row for both in zip(fixed, rows, rows[8:], strict=False) for row in both])
    assert synchronise() == 0
    one = contents()
    shutil.copyfile(empty_mlflow, "several.db")
    monkeypatch.setattr(tracking, "pace_for", lambda uri: Pace(3, in_processes=True))
    assert synchronise(store("several.db")) == 0
    assert contents(store("several.db")) == one
    assert one["baseline"][5]["perplexity"][-1][0] == 22.0 and len(one) == 18


def test_another_process_writes_as_this_one_and_says_what_it_cannot(study):
    projection = Projection(StudyFolder(study), CONFIGURATION, store())
    projection.open()
    parent, experiment = projection._runs[""], projection._experiment
    to = Destination(store(), experiment, parent, str(study.parent / ".store"), {"study": "s"})
    other = WriterProcess(to, projection._lock.fileno())
    run = other.write(None, row(7), row(7, tpot_ms=2.5), "d")
    found = MlflowClient(store()).get_run(run)
    assert (found.info.status, found.data.metrics["tpot_ms"], found.data.tags["mlflow.parentRunId"]) == (
        "FINISHED", 2.5, parent
    )  # fmt: skip
    with pytest.raises(WriterError, match="Changing param values is not allowed") as refused:
        other.write(run, row(7, n_sink=3), row(7), "d")
    assert refused.value.is_refusal and other.write(run, row(7), row(7), "d") == run, "it goes on"
    other.close()
    with pytest.raises(WriterError, match="has died") as died:
        other.write(run, row(7), row(7), "d")
    assert not died.value.is_refusal


def test_who_is_killed_is_followed_when_what_wrote_for_it_has_ended_which_is_soon(study):
    """Else what it has just begun would be begun again by who goes on from there."""
    lock = writing(study / "mlflow.lock", pytest.fail)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        to = Destination(f"http://127.0.0.1:{silent.getsockname()[1]}", "1", "p", "nowhere", {})
        other = WriterProcess(to, lock.fileno())
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(other.write, None, row(7), row(7), "d")
            connection, _ = silent.accept()  # it waits for an answer, half a minute
            lock.close()
            said = SimpleQueue()
            next_one = pool.submit(writing, study / "mlflow.lock", said.put)
            assert "another process that writes this study's runs" in said.get(timeout=60)
            assert not next_one.done()
            closed_at = time.monotonic()
            other._process.stdin.close()
            next_one.result(60).close()
            assert time.monotonic() - closed_at < 20
            with pytest.raises(WriterError, match="has died"):
                asked.result(60)
            connection.close()


def test_a_sweeps_milliseconds_are_there_before_it_ends_and_move_by_more_than_a_thousandth_or_not(study):
    """A run is not logged again for what another trial did to the median of the reference's times."""
    rows = [row(n, 2.0, reference_tpot_ms=reference) for n, reference in enumerate((2.0, 2.1, 2.101, 2.102))]
    write_rows(study / "trials.jsonl", rows)
    projection = Projection(StudyFolder(study), CONFIGURATION, store())
    projection.open()
    assert [one["trial"] for one in projection.log_all(rows)] == [0, 1, 2, 3]
    assert search("metrics.tpot_ms > 1.9") == ["0", "1", "2", "3"]
    projection.close(load_study("s"), Report())
    there = {
        trial: [round(value, 6) for value, *_ in found[5].get("tpot_ms", ())] for trial, found in contents().items()
    }
    assert there == {"": [], "0": [2.0, 2.1005], "1": [2.05, 2.1005], "2": [2.1], "3": [2.1005]}


def test_what_mlflow_refuses_does_not_hold_up_the_rest(study, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    write_rows(study / "trials.jsonl", [*ROWS, row(4, dtype="x" * 7000), row(5)])
    assert synchronise() == 1
    assert "MLflow refuses trial 4" in capsys.readouterr().err
    assert "5" in contents()


def test_a_trial_that_came_to_be_another_configuration_gets_a_run_of_its_own_once(study, capsys):
    """After half a journal was lost."""
    synchronise()
    assert search("tags.pareto = 'True'") == ["0", "1"]
    write_rows(study / "trials.jsonl", [ROWS[0], row(0, 1.0, 0.1, n_sink=1, window_size=47), *ROWS[2:]])
    assert synchronise() == 0
    runs = MlflowClient(store()).search_runs(["1"])
    (old,) = [run for run in runs if run.data.tags.get("replaced") == "True"]
    assert (old.data.params["n_sink"], old.data.tags["replaced.trial"], old.info.status) == ("4", "0", "FINISHED")
    assert not {"trial", "study", "study_id", "pareto"} & old.data.tags.keys()
    assert search("tags.trial = '0' and params.n_sink = '1' and tags.pareto = 'True'") == ["0"]
    assert search("tags.study = 's'") == ["", "0", "1", "2", "3", "baseline"], "what the view shows"
    capsys.readouterr()
    assert synchronise() == 0
    assert "0 of them logged" in capsys.readouterr().out
    assert len(MlflowClient(store()).search_runs(["1"])) == len(runs) == 7


@pytest.mark.parametrize("kept", [("trial",), ("study_id", "trial"), ("pareto", "study_id", "trial")])
def test_a_kill_while_a_run_is_set_aside_costs_none(study, kept):
    synchronise()
    client = MlflowClient(store())
    (run,) = client.search_runs(["1"], "tags.trial = '0'")
    for name in {"study", "pareto", "study_id", "trial"} - set(kept):
        client.delete_tag(run.info.run_id, name)
    write_rows(study / "trials.jsonl", [ROWS[0], row(0, n_sink=1), *ROWS[2:]])
    assert synchronise() == 0
    assert search("tags.study = 's'") == ["", "0", "1", "2", "3", "baseline"]
    assert len(search("attributes.status != 'RUNNING'")) == 7


def test_runs_name_their_data_set_and_are_unfolded(study):
    rows = [row(n, text_digest="d" * 64, n_tokens=4096) for n in range(2)]
    write_rows(study / "trials.jsonl", [*ROWS[:1], *rows, *ROWS[3:]])
    synchronise()
    runs = {run.data.tags.get("trial", ""): run for run in MlflowClient(store()).search_runs(["1"])}
    sets = {trial: [i.dataset for i in run.inputs.dataset_inputs] for trial, run in runs.items()}
    assert {trial: [(d.name, d.digest) for d in found] for trial, found in sets.items() if trial in ("0", "1")} == {
        "0": [("t", "d" * 36)], "1": [("t", "d" * 36)]
    }  # fmt: skip
    assert json.loads(sets["0"][0].profile) == {"tokens": 4096}
    assert [trial for trial, found in sorted(sets.items()) if not found] == ["", "3"], "the parent, and one that failed"
    assert {trial for trial, run in runs.items() if run.data.tags.get("mlflow.runType") == "evaluation"} == {
        "0", "1", "2", "3", "baseline"
    }  # fmt: skip


def test_the_experiment_is_the_one_that_the_environment_names(study, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "/Users/me/x")
    client = MlflowClient(store())
    mine = client.create_experiment("/Users/me/x", tags={"mlflow.note.content": "mine"})
    assert sync.main(["s"]) == 0
    assert f"http://127.0.0.1:5000/#/experiments/{mine}/runs?" in capsys.readouterr().out
    assert len(client.search_runs([mine])) == 6 and client.get_experiment_by_name(EXPERIMENT) is None
    tags = client.get_experiment(mine).tags
    assert tags["mlflow.note.content"] == "mine" and "mlflow.sharedViewState.s" in tags
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    other = client.create_experiment("other")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", other)
    assert sync.main(["s"]) == 0
    assert len(client.search_runs([other])) == 6
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    assert synchronise() == 0, "what is given wins"
    assert not Path("elsewhere.db").exists()


def test_the_page_is_where_the_store_is_served(study, monkeypatch):
    page = runs_page("7", "a b")
    assert page == "/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=a%20b"
    assert shown_at("https://me:secret@there/mlflow/", page) == f"https://there/mlflow{page}"
    assert shown_at(store_uri(), page) == f"http://127.0.0.1:5000{page} while `mlflow ui` runs"
    assert shown_at("sqlite:///x.db", page).endswith(" while `mlflow ui --backend-store-uri sqlite:///x.db` runs")
    assert shown_at("databricks://profile", page) == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert store_uri() == "http://there" and store_uri("sqlite:///x.db") == "sqlite:///x.db"


def test_two_at_once_on_a_fresh_database(study):
    """MLflow alone: "duplicate column name", for one of them, in every try."""
    Path("mlflow.db").unlink()
    command = [sys.executable, "-m", "orchestrator.sync", "s"]
    shutil.copytree("sweeps/s", "sweeps/r")
    Path("sweeps/r/sweep.json").write_text(json.dumps(CONFIGURATION | {"study": "r", "study_id": "2nd"}))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    started = [
        subprocess.Popen([*command[:-1], name], env=environment, stderr=subprocess.PIPE, text=True) for name in "rs"
    ]
    said = [process.communicate(timeout=500)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert len(MlflowClient(store()).search_runs(["1"])) == 12


def test_whoever_opens_the_database_is_waited_for_until_it_dies(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    program = (
        "import sys, time; from orchestrator.tracking.locks import opening\n"
        "with opening(sys.argv[1], print): print('mine', flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    holder = subprocess.Popen([sys.executable, "-c", program, uri], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"mine\n"
    said = []

    def waiting(reason):
        said.append(reason)
        holder.kill()

    with opening(uri, waiting):
        assert said == [f"waiting for another process that opens {tmp_path}/mlflow.db"]
    with opening(uri, waiting):
        pass
    assert len(said) == 1
    holder.communicate()


def failure(capsys, uri=None):
    """The line that says why MLflow cannot be brought up to date."""
    capsys.readouterr()
    assert sync.main(["s", *(["--tracking-uri", uri] if uri else [])]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: MLflow cannot be brought up to date: ") and error.count("\n") == 1
    return error.strip()


def test_a_deleted_experiment_is_restored_by_the_command_that_is_named(study, capsys):
    synchronise()
    client = MlflowClient(store())
    client.delete_experiment("1")
    said = failure(capsys, store())
    assert "the experiment 'streamllm-sweep' was deleted" in said and "MLFLOW_EXPERIMENT_NAME" in said
    command = re.search(r"MLFLOW_TRACKING_URI=\S+ mlflow (experiments restore --experiment-id 1)", said)
    environment = os.environ | {"MLFLOW_TRACKING_URI": store()}
    subprocess.run([sys.executable, "-m", "mlflow", *command[1].split()], env=environment, check=True)
    assert synchronise() == 0


def test_an_old_folder_of_mlflows_is_named_with_what_to_do(study, capsys, monkeypatch):
    Path("mlruns/0").mkdir(parents=True)
    Path("mlruns/0/meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    assert store_uri() == (Path.cwd() / "mlruns").as_uri(), "as MLflow itself"
    folder = Path.cwd() / "mlruns"
    assert failure(capsys).endswith(
        f"maintenance mode and will not receive further updates; mv {folder} {folder}.old, or "
        "MLFLOW_TRACKING_URI=sqlite:///mlflow.db leaves it where it is"
    )


@pytest.mark.parametrize(
    "revision, told",
    [
        ("451aebb31d03", "; keep a copy of the database, then: mlflow db upgrade {uri}"),
        ("0123456789ab", "; a newer MLflow has written it: pip install --upgrade mlflow, or mv {path} {path}.old"),
    ],
)
def test_a_schema_of_another_version(study, capsys, revision, told):
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute("update alembic_version set version_num = ?", [revision])
    said = failure(capsys, store())
    assert said.endswith(told.format(uri=store(), path=Path("mlflow.db").absolute()))
    assert revision in said


def test_a_database_that_is_none(study, capsys):
    Path("mlflow.db").write_text("no database " * 1000)
    path = Path("mlflow.db").absolute()
    assert failure(capsys).endswith(f"file is not a database; mv {path} {path}.old")


def test_what_follows_a_sweep_says_what_to_do_too(study, request):
    Path("mlflow.db").write_text("no database " * 1000)
    tracker = Tracker(Projection(StudyFolder(study), CONFIGURATION), TrialsFile(StudyFolder(study), []))
    request.addfinalizer(tracker._process.kill)
    wait_until(lambda: tracker.problem is not None)
    path = Path("mlflow.db").absolute()
    told = tracker.finish(Report(), lambda backlog: None, patience_sec=0.0)
    assert told == tracker.problem and told.endswith(f"file is not a database; mv {path} {path}.old")
    assert tracker.address == ""


USER = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


@pytest.mark.parametrize(
    "status, told", [(401, f"error code 401 != 200; set {USER}"), (403, f" or set {USER} to those of somebody who may")]
)
def test_a_server_that_does_not_let_one_in(study, capsys, status, told):
    with stub(status, b"You are not authenticated. " + b"Please see there. " * 30) as uri:
        assert failure(capsys, uri).endswith(told)


def test_databricks_names_are_paths(study, capsys):
    message = "Got an invalid experiment name 'x'. An absolute path is required."
    body = {"error_code": "INVALID_PARAMETER_VALUE", "message": message}
    with stub(400, json.dumps(body).encode()) as uri:
        told = "MLFLOW_EXPERIMENT_NAME=/Users/YOU/streamllm-sweep: there, names are absolute paths"
        assert failure(capsys, uri).endswith(told)


@contextmanager
def stub(status, body):
    """A server that answers all requests alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_sync_says_what_is_wrong(study, capsys, monkeypatch):
    monkeypatch.setattr(sync, "_PATIENCE_SEC", 0.5)
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
    projection = Projection(StudyFolder(study), CONFIGURATION, proxy.uri)
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
