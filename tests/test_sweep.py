"""The sweep as its users run it: whole processes, real Ray workers, a real MLflow store."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dashboards import pareto
from dashboards.tables.columns import shown_columns
from orchestrator.sweep import _takes, main, parser, resolve
from orchestrator.tracking.follower import Tracker
from streamllm.errors import UsageError
from streamllm.results.study_folder import StudyFolder

from . import preloaded, quick_sweep
from .conftest import GOLDEN
from .preloaded import ROOT

AWAY = "http://127.0.0.1:9"
"""Nothing listens there."""

SPACE = """
cap: 48
parameters:
  method: [ours, mit]
  attn_backend: [math, flash]
  n_sink: [0, 4]
  compress_every: [1, 16]
known:
  - {method: mit, attn_backend: math, n_sink: 4, compress_every: 1}
"""

DRY = (
    "import sys; from orchestrator.sweep import main\n"
    "code = main(sys.argv[1:])\n"
    "assert not {'ray', 'mlflow'} & set(sys.modules), 'a dry run starts nothing'\n"
    "sys.exit(code)"
)


def arguments(*more):
    model = ("--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"))
    return [*model, "--max-eval-tokens", "300", "--space", "space.yaml", "--study", "s", "--confirm", "0", *more]


def without_server():
    """A quick sweep whose tracking server is away, and that waits for it two seconds only."""
    os.environ["MLFLOW_TRACKING_URI"] = AWAY
    Tracker.finish = partialmethod(Tracker.finish, patience_sec=2.0)
    return quick_sweep.main()


def command(*arguments, cwd):
    """In an interpreter of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment
    )


def sweep(folder, *more, main=quick_sweep.main):
    return preloaded.run(main, *arguments(*more), cwd=folder)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


@pytest.fixture
def prepared(folder, empty_mlflow):
    """The folder with an empty MLflow database in it."""
    shutil.copyfile(empty_mlflow, folder / "mlflow.db")
    return folder


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(folder):
    """Reference and baseline first, then the trials."""
    rows = {row["trial"]: row for row in json_lines(folder / "sweeps/s/trials.jsonl")}
    return [rows.pop("strict"), rows.pop("baseline"), *rows.values()]


def runs_of(folder):
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def test_a_sweep_from_end_to_end(folder, cluster):
    """The first one by the command itself, on a Ray and with a database of its own."""
    first = ("--trials", "4", "--workers", "2", "--confirm", "2")
    done = command("-m", "tests.quick_sweep", *arguments(*first), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "capped at" not in done.stderr, "the space's cap is below the trained length"
    assert "[4/4]" in done.stderr
    assert "Pareto front" in done.stdout and "python -m dashboards.pareto" in done.stdout
    view = "#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=s"
    assert f"MLflow    http://127.0.0.1:5000/{view} while `mlflow ui` runs\n" in done.stdout

    strict, baseline, *trials = rows_of(folder)
    assert (strict["method"], strict["n_sink"], strict["compress_every"]) == ("ring", 4, 1)
    assert baseline["method"] == "recompute" and baseline["window_size"] + baseline["n_sink"] == 48
    assert len(trials) == 4
    for row in trials:
        assert row["state"] == "complete"
        assert row["n_sink"] + row["window_size"] == 48
        assert row["backend"] == row["backend_requested"]
        assert row.get("speedup", 0) in (0, pytest.approx(baseline["time_ratio"] / row["time_ratio"]))
        assert row["ppl_vs_strict_percent_low"] <= row["ppl_vs_strict_percent"] <= row["ppl_vs_strict_percent_high"]
        assert "tpot_ms" not in row, "its unit is known at the end"
    output = folder / "sweeps/s"
    front = list(csv.DictReader((output / "pareto.csv").open()))
    assert 1 <= len(front) <= 4
    assert (output / "pareto.md").read_text().count("\n| ") == 1 + len(front) + 2
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((output / "sweep.json").read_text())
    assert settings["cap"] == 48
    recommended = settings["recommendation"]
    assert str(recommended["trial"]) in {row["trial"] for row in front}
    assert recommended["why"] in done.stdout and recommended["command"] in done.stdout

    runs = runs_of(folder)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["s"]
    children = {run.data.tags["trial"]: run for run in runs if run not in parents}
    assert parents[0].data.tags["recommended"] == str(recommended["trial"])
    assert set(children) == {"strict", "baseline", *(str(row["trial"]) for row in trials)}
    on_front = {row["#"] if "#" in row else row["trial"] for row in front}
    for row in trials:
        run = children[str(row["trial"])]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.tags["backend.used"] == row["backend"]
        assert run.data.tags["pareto"] == str(str(row["trial"]) in on_front)
        assert run.data.metrics["ppl_vs_strict_percent"] == pytest.approx(row["ppl_vs_strict_percent"])
        assert run.data.params["n_sink"] == str(row["n_sink"])
        (read,) = run.inputs.dataset_inputs
        assert (read.dataset.name, read.dataset.digest) == (row["dataset"], row["text_digest"][:36])

    increases = {row["trial"]: row["ppl_increase_percent"] for row in json_lines(output / "increases.jsonl")}
    assert set(increases) == {"strict", *(row["trial"] for row in trials)}
    for trial, increase in increases.items():
        assert children[str(trial)].data.metrics["ppl_increase_percent"] == pytest.approx(increase)

    confirmed = {str(row["trial"]): row for row in json_lines(output / "confirmed.jsonl")}
    assert on_front | {"baseline"} <= confirmed.keys()
    for trial, row in confirmed.items():
        assert row["rounds"] == children[trial].data.metrics["rounds"] == 2
        assert children[trial].data.metrics["time_ratio"] == row["time_ratio"]
        assert trial == "baseline" or 0 <= row["front_probability"] <= 1
    stored = {path: path.stat().st_mtime_ns for path in (folder / "sweeps/.store").rglob("*.json")}
    again = sweep(folder, *first, "--address", cluster.address, main=without_server)
    assert again.returncode == 0, again.stderr
    assert f"-m orchestrator.sync {Path('sweeps/s')}" in again.stderr
    assert {str(row["trial"]): row for row in json_lines(output / "confirmed.jsonl")} == confirmed
    assert {path: path.stat().st_mtime_ns for path in (folder / "sweeps/.store").rglob("*.json")} == stored

    exported = preloaded.run(pareto.main, "s", "--format", "csv", "--all", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    assert len(list(csv.DictReader((output / "pareto.csv").open()))) == 4

    planned = ("--trials", "8", "--time-budget", "1h", "--sampler", "tpe", "--dry-run")
    dry = command("-c", DRY, *arguments(*planned), cwd=folder)
    assert dry.returncode == 0, dry.stderr
    assert "s, goes on" in dry.stdout and "up to 8 trials, finished after about 3600 s" in dry.stdout
    assert "medians of 4 trials" in dry.stdout
    assert len(rows_of(folder)) == 6

    other = sweep(folder, "--trials", "4", "--seed", "7")
    assert other.returncode == 2
    assert "seed: 0 then, 7 now" in other.stderr


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("--space", "nowhere"), "space 'nowhere'"),
        (("--trials", "0"), "trials 0"),
        (("--until", "1.5"), "until 1.5: must be a share above 0 and below 1, such as 0.01"),
        (
            ("--until", "0.01", "--sampler", "tpe"),
            "until 0.01 with sampler 'tpe': only front can tell what is left",
        ),
        (("--workers", "-1"), "workers -1: must be a whole number >= 0"),
        (("--cpus-per-worker", "-1"), "cpus_per_worker -1"),
        (("--seed", "-1"), "seed -1"),
        (("--confirm", "-1"), "confirm -1"),
        (("--load-timeout", "0"), "load_timeout 0.0: must be a number of seconds > 0"),
        (("--time-budget", "soon"), "time budget 'soon'"),
        (("--study", "a/b"), "study 'a/b'"),
        (("--study", ".."), "study '..': use letters"),
        (("--study", ".store"), "study '.store': use letters"),
        (("--study", ""), "study '': use letters"),
        (("--study", "x" * 201), "201 bytes long; use at most 200"),
        (("--text", "nowhere.txt"), "several are given; give one of them"),
        (("--model", "nowhere"), "model 'nowhere'"),
        (("--space", "small.yaml"), "cap 3: below n_sink 4"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(folder, bad, message, monkeypatch, capfd):
    (folder / "small.yaml").write_text("cap: 3\nparameters: {n_sink: [0, 4]}")
    monkeypatch.chdir(folder)
    assert main(arguments(*bad)) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["small.yaml", "space.yaml"]


def test_books_have_studies_of_their_own_and_older_studies_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def resolved(*more):
        return resolve(parser().parse_args(["--dataset-name", "pg19", *more]))

    dragons, whole = resolved("--book", "Dragon's blood", "--split", "train"), resolved()
    assert (
        dragons.identity.study == "testbed-pg19-train-dragons-blood-default"
        and whole.identity.study == "testbed-pg19-default"
    )
    assert dragons.to_dict("")["source"] | {"book": None, "split": "test"} == whole.to_dict("")["source"]
    whole.output.mkdir(parents=True)
    study = whole.claim()
    file = whole.output / "sweep.json"
    document = json.loads(file.read_text())
    assert document["source"].pop("join") == "lines" and document["source"].pop("book") is None
    for name in ("cpus_per_worker", "trial_timeout", "load_timeout", "confirm"):
        del document[name]
    file.write_text(json.dumps(document))
    assert whole.check() == study
    assert resolved("--workers", "1", "--confirm", "0", "--sampler", "tpe", "--trials", "9").claim() == study
    assert json.loads(file.read_text())["confirm"] == 0
    with pytest.raises(UsageError, match=r"source\.book: None then, '3' now"):
        resolved("--book", "3", "--study", whole.identity.study).check()


ON_CUDA = """
parameters:
  method: [ring, ours]
  execution: {choices: [eager], cuda: [cudagraph], when: {method: ring}}
"""


def test_a_study_keeps_the_choices_of_the_devices_it_began_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ring.yaml").write_text(ON_CUDA)

    def resolved(kind, *more):
        monkeypatch.setattr("orchestrator.workers.device_kinds.device_kinds", lambda address: {kind})
        return resolve(parser().parse_args(["--space", "ring.yaml", "--time-budget", "1h", *more]))

    on_cpu, on_gpu = resolved("cpu"), resolved("cuda", "--study", "gpu")
    assert on_cpu.identity.space.parameters["execution"] == ("eager",) and on_cpu.trials == 2
    assert on_gpu.identity.space.parameters["execution"] == ("eager", "cudagraph") and on_gpu.trials == 3
    for configuration in (on_cpu, on_gpu):
        configuration.output.mkdir(parents=True)
        configuration.claim()
    assert resolved("cuda").identity.space == on_cpu.identity.space
    assert resolved("cuda", "--study", "gpu").identity.space == on_gpu.identity.space
    with pytest.raises(UsageError, match=r"exists with other settings .space\.parameters: "):
        resolved("cpu", "--study", "gpu").check()
    monkeypatch.setattr(
        "orchestrator.workers.device_kinds.device_kinds", lambda address: pytest.fail("asked a cluster")
    )
    dry = ["--space", "ring.yaml", "--study", "new", "--dry-run"]
    assert resolve(parser().parse_args([*dry, "--address", "10.0.0.1:6379"])).identity.space == on_gpu.identity.space
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve(parser().parse_args(dry)).identity.space == on_gpu.identity.space


QUANTIZED = """
cap: 48
parameters: {quantization: [none, int8_weight_only], method: ours, attn_backend: math}
"""


def test_quantization_is_a_knob(prepared, cluster):
    pytest.importorskip("torchao")
    folder = prepared
    (folder / "space.yaml").write_text(QUANTIZED)
    done = sweep(folder, "--trials", "4", "--workers", "1", "--confirm", "1", "--address", cluster.address)
    assert done.returncode == 0, done.stderr
    strict, baseline, *trials = rows_of(folder)
    assert not {"quantization", "reference_digest"} & {*strict, *baseline}
    by_name = {row["quantization"]: row for row in trials}
    assert set(by_name) == {"none", "int8_weight_only"} and len(trials) == 2
    assert {row["reference_digest"] for row in trials} == {strict["model_digest"]}
    assert by_name["int8_weight_only"]["model_digest"] == f"{strict['model_digest']} int8_weight_only"
    assert by_name["int8_weight_only"]["perplexity"] != by_name["none"]["perplexity"]
    runs = {run.data.tags.get("trial"): run.data.tags.get("quantization") for run in runs_of(folder)}
    assert {str(row["trial"]): row["quantization"] for row in trials}.items() <= runs.items()
    assert runs["strict"] == "none"
    assert "quantization" in {column.key for column in shown_columns(trials)}
    output = folder / "sweeps/s"
    assert {str(row["trial"]) for row in json_lines(output / "confirmed.jsonl")} - {"baseline"}
    recommended = json.loads((output / "sweep.json").read_text())["recommendation"]
    name = {str(row["trial"]): row["quantization"] for row in trials}[str(recommended["trial"])]
    assert ("--quantization int8_weight_only" in recommended["command"]) == (name != "none")


def test_quantization_is_asked_for_in_one_place(folder, monkeypatch):
    (folder / "space.yaml").write_text(QUANTIZED)
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=r"quantization 'int4_weight_only': the space 'space' has its own \(none, "):
        resolve(parser().parse_args(arguments("--quantization", "int4_weight_only")))
    monkeypatch.setattr("orchestrator.configuration.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="quantization 'int8_weight_only': needs torchao; pip install"):
        resolve(parser().parse_args(arguments()))


def test_files_changed_under_a_study_are_seen_and_threads_stay(prepared, cluster, monkeypatch, capfd):
    folder = prepared
    monkeypatch.chdir(folder)
    shutil.copytree(GOLDEN / "neox-tiny", folder / "m")
    (folder / "ids.json").write_text((GOLDEN / "tokens.json").read_text())
    own = ("--model", "m", "--token-ids", "ids.json", "--trials", "1", "--address", cluster.address, "--workers")

    def refused(*more):
        assert main(arguments(*own, *more)) == 2
        return capfd.readouterr().err

    done, cores = sweep(folder, *own, "1"), min(len(os.sched_getaffinity(0)), 2)  # the cluster's
    assert done.returncode == 0, done.stderr
    assert {row["threads"] for row in rows_of(folder)} == {cores}
    if cores > 1:
        more = sweep(folder, *own, str(cores))
        assert more.returncode == 2 and "room for 1, each with its own" in more.stderr
    assert f"was timed with {cores} per worker" in refused("1", "--cpus-per-worker", str(cores + 1))
    (folder / "ids.json").write_text(json.dumps([7, *json.loads((GOLDEN / "tokens.json").read_text())]))
    assert re.search(r"text_file_digest: \w{12}\.\.\. then, \w{12}\.\.\. now", refused("1"))
    (folder / "ids.json").write_text((GOLDEN / "tokens.json").read_text())
    shutil.copyfile(GOLDEN / "llama-tiny/model.safetensors", folder / "m/model.safetensors")
    assert "model_digest: " in refused("1")


def test_whether_the_folder_could_be_told_how_the_sweep_ended(tmp_path):
    """It cannot where a folder has the file's name; with room for it, it can."""
    folder, notes = StudyFolder(tmp_path), []
    folder.outcome.mkdir()
    (folder.outcome / "x").touch()
    assert _takes(folder, "FINISHED", notes.append) is False
    (said,) = notes
    assert said.startswith("error: the study cannot be written: ") and "what is finished is kept" in said
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"], "nothing torn is left"
    (folder.outcome / "x").unlink()
    folder.outcome.rmdir()
    assert _takes(folder, "KILLED", notes.append) is True
    assert folder.read_outcome()[0] == "KILLED" and len(notes) == 1


def test_a_second_driver_is_told_who_has_the_study(folder):
    from orchestrator.workers.lease import study_lease

    (folder / "sweeps/s").mkdir(parents=True)
    with study_lease(StudyFolder(folder / "sweeps/s")):
        done = sweep(folder)
    assert done.returncode == 2
    assert f"run by process {os.getpid()}" in done.stderr


def test_a_study_of_which_everything_is_damaged_goes_on(prepared, cluster):
    """Nothing is measured again, no run is made twice, and each file is told of in a line."""
    folder, study = prepared, prepared / "sweeps/s"
    given = ("--address", cluster.address, "--workers", "1", "--trials", "3", "--confirm", "1")
    done = sweep(folder, *given)
    assert done.returncode == 0, done.stderr
    trials, runs = (
        [row for row in rows_of(folder) if row["trial"] in range(3)],
        {run.info.run_id for run in runs_of(folder)},
    )
    stored = {path: path.stat().st_mtime_ns for path in (folder / "sweeps/.store").rglob("*.json")}
    for name, number in (("journal.log", 3), ("trials.jsonl", 2), ("rounds.jsonl", 0), ("sweep.json", 7)):
        lines = (study / name).read_bytes().splitlines(keepends=True)
        lines[number] = b"\xff" + lines[number]
        (study / name).write_bytes(b"".join(lines))
    (study / "outcome.json").write_text("[]")
    (study / "driver.lock").unlink()
    (study / "driver.lock").mkdir()

    done = sweep(folder, *given)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    told = ("driver.lock", "sweep.json", "journal.log", "rounds.jsonl", "trials.jsonl")
    assert [line.split(".damaged-1")[0].rpartition(" ")[2] for line in warnings] == [*told]
    assert [row for row in rows_of(folder) if row["trial"] in range(3)] == trials
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    assert {run.info.run_id for run in runs_of(folder)} == runs
    again = sweep(folder, *given)
    assert again.returncode == 0 and "warning: " not in again.stderr, again.stderr
