"""`--track`: what single evaluations leave in MLflow, in real stores."""

import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from orchestrator.tracking import single
from streamllm.__main__ import main
from streamllm.commands import evaluate
from streamllm.errors import UsageError
from streamllm.measuring.quality import NonFiniteLossError
from streamllm.results.schema import Row
from streamllm.terminal.tracking import Result

from .conftest import GOLDEN

WHAT = ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--dtype", "float32"]
POLICY = ["--n-sink", "2", "--window-size", "30"]
AWAY = "http://127.0.0.1:1"
"""A port at which nobody listens."""
ROW = Row.of({"method": "ours", "n_sink": 2, "perplexity": 9.5, "dataset": "t", "text_digest": "d1", "n_tokens": 9})


@pytest.fixture(autouse=True)
def here(tmp_path, empty_mlflow, monkeypatch):
    """A working directory with an empty MLflow store."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    shutil.copyfile(empty_mlflow, "mlflow.db")


def client():
    return MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")


def runs():
    """The oldest first."""
    found = client().search_runs([e.experiment_id for e in client().search_experiments()])
    return sorted(found, key=lambda run: (run.info.start_time, "mlflow.parentRunId" in run.data.tags))


def artifacts(run):
    return {file.path for file in client().list_artifacts(run.info.run_id)}


def document(run, name):
    return json.loads(Path(client().download_artifacts(run.info.run_id, name)).read_text())


def run_command(capsys, name, *options, code=0):
    """What it says on stdout, as JSON, and the lines on stderr that are about MLflow."""
    assert main([name, *WHAT, *POLICY, *options, "--json"]) == code
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "MLflow" in line]
    return json.loads(said.out) if code == 0 else said.out, lines


def test_an_evaluation_and_the_baseline_that_was_measured_for_it(capsys):
    both = ["--mode", "both", "--max-eval-tokens", "60", "--baseline-tokens", "8", "--attn-backend", "math", "--track"]
    said, (address,) = run_command(capsys, "evaluate", *both)
    own, baseline = sorted(runs(), key=lambda run: run.data.tags["method"])
    assert own.info.status == baseline.info.status == "FINISHED"
    assert address.startswith("MLflow    http://127.0.0.1:5000/#/experiments/1/runs/")
    assert address.endswith(f"/{own.info.run_id} while `mlflow ui` runs")
    assert client().get_experiment(own.info.experiment_id).name == "streamllm-sweep"

    tags = own.data.tags
    expected = {"backend.requested": "math", "backend.used": "math", "protocol": "fast", "dataset": said["dataset"]}
    expected |= {"method": "ours", "execution": "eager", "quantization": "none", "device": said["device"]}
    expected |= {"state": "complete", "command": "evaluate", "mlflow.source.name": "python -m streamllm evaluate"}
    assert expected.items() <= tags.items() and tags["commit"] and "study" not in tags and "trial" not in tags
    assert own.data.params["n_sink"] == "2" and own.data.params["dtype"] == "float32"
    for name in ("tpot_ms", "tpot_ms_low", "perplexity", "ppl_increase_percent", "peak_kv", "speedup"):
        assert own.data.metrics[name] == said[name], name
    assert not {"n_sink", "threads", "finished_at", "n_tokens"} & set(own.data.metrics), "facts are no metrics"
    (dataset,) = own.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == (said["dataset"], said["text_digest"][:36])

    assert artifacts(own) == {"result.json", "evaluation.json", "losses.npy"}
    assert Row.from_json(document(own, "result.json"), "MLflow").to_json() == said
    assert set(document(own, "evaluation.json")) == {"baseline", "streaming"}
    losses = np.load(client().download_artifacts(own.info.run_id, "losses.npy"))
    assert np.exp(losses[:, 1].mean()) == pytest.approx(said["perplexity"])
    assert baseline.data.tags["method"] == "recompute" and baseline.data.metrics["speedup"] == 1

    run_command(capsys, "evaluate", *both)
    assert [run.data.tags["method"] for run in runs()].count("recompute") == 1, "the second time it was there"
    assert len(runs()) == 3


def test_several_baselines_are_runs_below_their_mean(capsys):
    said, errors = run_command(capsys, "baseline", "--runs", "2", "--protocol", "decode-loop", "--max-eval-tokens",
                               "40", "--tracking-uri", f"sqlite:///{Path('mlflow.db').absolute()}")  # fmt: skip
    assert not [line for line in errors if "not logged" in line], errors
    mean, *single_runs = runs()
    assert [run.data.tags["mlflow.parentRunId"] for run in single_runs] == 2 * [mean.info.run_id]
    assert {run.info.run_name for run in single_runs} == {"run 1 of 2", "run 2 of 2"}
    assert mean.data.metrics["time_ratio"] == said["time_ratio"] == pytest.approx(
        np.mean([run.data.metrics["time_ratio"] for run in single_runs])
    )  # fmt: skip
    assert mean.data.metrics["time_ratio_std"] == said["time_ratio_std"]
    assert len(document(mean, "baseline.json")["runs"]) == 2
    assert {run.info.status for run in runs()} == {"FINISHED"}


def test_a_diagnosis_and_a_profile(capsys):
    said, _ = run_command(capsys, "diagnose", "--compress-every", "16", "--track")
    (diagnosis,) = runs()
    assert artifacts(diagnosis) == {"losses.csv", "losses.parquet", "spike.png", "summary.json"}
    for name in ("peak_nats", "area_nats_low", "ppl_increase_percent", "perplexity"):
        assert diagnosis.data.metrics[name] == said[name]
    assert diagnosis.data.tags["mlflow.note.content"] == said["summary"]

    said, _ = run_command(capsys, "profile", "--intervals", "--track")
    (profile,) = [run for run in runs() if run.data.tags["command"] == "profile"]
    assert artifacts(profile) == {"profile.json", "profile.trace.json.gz"}
    assert profile.data.metrics["measured_tpot_ms"] == said["tpot_ms"] and "tpot_ms" not in profile.data.metrics
    assert profile.data.metrics["parts_ms/attention"] == said["parts_ms"]["attention"]
    assert profile.data.tags["backend.used"] == said["backend"]


def test_without_it_there_is_nothing(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    said, lines = run_command(capsys, "evaluate", "--max-eval-tokens", "40")
    assert said["perplexity"] and not lines and not runs()


def test_a_server_that_is_away_costs_nothing_but_the_run(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    said, lines = run_command(capsys, "evaluate", "--max-eval-tokens", "40", "--track")
    assert said["perplexity"]
    assert lines == [
        f"warning: not logged to MLflow: MlflowException: API request to {AWAY}/api/2.0/mlflow/experiments/get-by-name "
        "failed"
    ]


def test_mlflow_is_not_there(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    said, (line,) = run_command(capsys, "evaluate", "--max-eval-tokens", "40", "--track")
    assert said["perplexity"] and "pip install mlflow" in line and line.startswith("warning: not logged to MLflow: ")


def test_what_failed_is_a_failed_run_and_what_was_refused_is_none(capsys, monkeypatch):
    errors = [UsageError("too short a text"), NonFiniteLossError("token 7: the loss is inf")]

    def fail(*_):
        raise errors.pop(0)

    monkeypatch.setattr(evaluate, "_measured", fail)
    short = ["--max-eval-tokens", "40", "--track"]
    assert main(["evaluate", *WHAT, "--window-size", "0", *short]) == 2
    run_command(capsys, "evaluate", *short, code=2)
    assert not runs()
    run_command(capsys, "evaluate", *short, code=1)
    (failed,) = runs()
    assert failed.info.status == "FAILED" and failed.data.tags["state"] == "failed"
    assert failed.data.tags["reason"] == "NonFiniteLossError: token 7: the loss is inf"
    assert failed.data.params["window_size"] == "30"


def completed(**more):
    return Result(record={**ROW, "state": "complete"}, name="n", command="evaluate", began_at=1.7e9, **more)


def test_a_run_that_could_not_be_completed_does_not_stay_running(monkeypatch, tmp_path):
    with pytest.raises(OSError, match="gone"):
        single.log([completed(files=[tmp_path / "gone"])], None, print)
    (run,) = runs()
    assert run.info.status == "FAILED" and "gone" in run.data.tags["reason"]


def test_two_at_once_share_a_store():
    """The experiment is created by one of them."""
    addresses = []
    threads = [threading.Thread(target=lambda: addresses.extend(single.log([completed()], None, print)))
               for _ in range(2)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(addresses)) == 2 and len(runs()) == 2
    assert [e.name for e in client().search_experiments()].count("streamllm-sweep") == 1
