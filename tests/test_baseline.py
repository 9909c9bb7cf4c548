import json

import numpy as np
import pytest
import torch

from streamllm.__main__ import main
from streamllm.engine.backends import BACKENDS
from streamllm.engine.methods.recompute import WholeWindow, losses_at
from streamllm.measuring.baseline import average, baseline_policy, compared
from streamllm.measuring.quality import QualityComparison
from streamllm.measuring.reference_time import with_times
from streamllm.policy import EvictionPolicy
from streamllm.results.schema import Row

from .conftest import GOLDEN

TIMES = (
    "runtime_sec",
    "prefill_sec",
    "first_token_latency_sec",
    "avg_attn_ms",
    "peak_memory_mb",
)


def made(tpot, reused=True):
    times = dict.fromkeys(TIMES, 2 * tpot)
    record = {"perplexity": 9.0, "reused": reused, "reference_tpot_ms": 2.0}
    for name in ("time_ratio", "measured_tpot_ms"):
        record |= {name: tpot, f"{name}_low": tpot - 9, f"{name}_high": tpot + 9}
    return Row.of(record | times), np.zeros((3, 2))


def test_several_runs_are_their_mean_and_spread():
    record, _ = average([made(10.0), made(13.0, reused=False), made(16.0)])
    assert (record["time_ratio"], record["time_ratio_std"], record["runs"]) == (13.0, 3.0, 3)
    assert (record["time_ratio_low"], record["time_ratio_high"]) == (10.0, 16.0)
    (timed,) = with_times([record])
    assert (timed["tpot_ms"], timed["tpot_ms_std"], timed["tpot_ms_high"]) == (26.0, 6.0, 32.0)
    assert (record["runtime_sec"], record["runtime_sec_std"]) == (26.0, 6.0)
    assert record["perplexity"] == 9.0 and not record["reused"]
    assert average([made(10.0)])[0] == made(10.0)[0]


def test_results_are_compared_at_every_token_with_the_reference_and_at_the_sample_with_the_baseline():
    losses = np.array([[0, 1.0], [1, 1.5], [2, 9.0], [3, 2.0]])
    reference = np.array([[0, 1.0], [1, 1.4], [2, 8.9], [3, 1.8]])
    baseline = {"time_ratio": 40.0}, np.array([[0, 0.9], [1, 1.2]])
    result = compared({"time_ratio": 10.0}, losses, baseline, QualityComparison(reference, baseline[1]))
    assert result["speedup"] == 4.0
    assert result["ppl_vs_strict_percent"] == pytest.approx(100 * np.expm1(0.1))
    assert result["ppl_increase_percent"] == pytest.approx(100 * np.expm1(0.1 + 0.15))
    chunked = compared({"time_ratio": 10.0}, losses, baseline, None)
    assert chunked["ppl_increase_percent"] == pytest.approx(100 * np.expm1(0.2)), "at the tokens that both have"
    assert "ppl_vs_strict_percent" not in chunked


def test_the_baselines_window_is_the_policys_total_within_the_trained_length():
    policy = EvictionPolicy(n_sink=4, window_size=60, compress_every=32, cache_slack=8)
    assert baseline_policy(policy, "fast", None) == EvictionPolicy(n_sink=0, window_size=72)
    assert baseline_policy(policy, "decode-loop", 64).window_size == 64
    assert baseline_policy(policy, "chunked", None).compress_every == 32


def test_runs_are_kept_averaged_and_compared_with(tmp_path, monkeypatch, capsys):
    """Each run is measured once; what is compared afterwards is compared with their mean."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "results" / "baselines" / "wikitext_baseline_avg.json"
    what = ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--max-eval-tokens", "60"]
    what += ["--window-size", "28", "--protocol", "decode-loop", "--json"]

    def command(name, *more):
        monkeypatch.setattr("sys.argv", ["streamllm", name, *what, *more])
        assert main() == 0
        return json.loads(capsys.readouterr().out)

    first = command("baseline")
    assert "runs" not in first
    mean = command("baseline", "--runs", "3", "--output-file", str(file))
    written = json.loads(file.read_text())
    assert written["baseline"] == mean and mean["runs"] == len(written["runs"]) == 3
    assert [run["reused"] for run in written["runs"]] == [True, False, False]
    assert written["runs"][0]["time_ratio"] == first["time_ratio"]
    times = [run["time_ratio"] for run in written["runs"]]
    assert mean["time_ratio"] == pytest.approx(np.mean(times))
    assert mean["time_ratio_std"] == pytest.approx(np.std(times, ddof=1))
    assert {run["perplexity"] for run in written["runs"]} == {mean["perplexity"]}
    assert command("baseline") == mean | {"reused": True}
    streaming = command("evaluate")
    assert streaming["speedup"] == pytest.approx(mean["time_ratio"] / streaming["time_ratio"])
    monkeypatch.setattr("sys.argv", ["streamllm", "baseline", *what, "--runs", "0"])
    assert main() == 2
    assert capsys.readouterr().err == "error: runs 0: must be a whole number >= 1\n"


@pytest.mark.parametrize("length", [2, 3, 4, 31, 32, 33, 34])
def test_texts_shorter_than_a_window_and_just_longer(length, golden_model, golden_tokens):
    """Window by window, each in a plain forward pass of its own."""
    loaded, tokens, window, seen = golden_model("neox-tiny"), golden_tokens[:length], 32, []
    found = losses_at(loaded, tokens, window, range(length - 1), BACKENDS["math"], lambda *done: seen.append(done))
    for end in range(1, length):
        piece = torch.from_numpy(tokens[max(end - window, 0) : end])
        output = loaded.forward(piece[None], torch.arange(len(piece)), WholeWindow(loaded, BACKENDS["math"]))
        expected = -output.logits[0, -1].double().log_softmax(-1)[tokens[end]]
        assert found[end - 1] == pytest.approx(expected.item(), abs=1e-5)
    assert len(found) == length - 1
    assert seen[-1] == (length - 1, length - 1)


@pytest.mark.parametrize("length", [2, 3, 32, 33])
@pytest.mark.parametrize("protocol", ["fast", "decode-loop"])
def test_tiny_texts_beside_the_baseline(length, protocol, tmp_path, monkeypatch, capsys):
    """As long as nothing is evicted, both see the same tokens."""
    monkeypatch.chdir(tmp_path)
    what = ("--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--dtype", "float32")
    how = ("--n-sink", "4", "--window-size", "28", "--threads", "1", "--protocol", protocol, "--mode", "both", "--json")
    monkeypatch.setattr("sys.argv", ["streamllm", "evaluate", *what, *how, "--max-eval-tokens", str(length)])
    assert main() == 0
    result = json.loads(capsys.readouterr().out)
    assert result["evaluated_tokens"] == length - 1
    assert result["ppl_increase_percent"] == pytest.approx(0, abs=1e-2)
