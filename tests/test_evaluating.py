"""`streamllm.evaluate`: what the command does, from Python."""

import json

import numpy as np
import pandas as pd
import pytest

import streamllm
from streamllm.__main__ import main
from streamllm.errors import UnavailableError, UsageError
from streamllm.measuring.text import TextError
from streamllm.results.schema import Row

RING = streamllm.Configuration("ring", streamllm.EvictionPolicy(n_sink=4, window_size=60))
SHORT = streamllm.TextSource(max_eval_tokens=200)


def test_it_is_what_the_command_does(tmp_path, monkeypatch, capsys):
    how = streamllm.Measuring(baseline_tokens=8)
    found = streamllm.evaluate(RING, source=SHORT, how=how, with_baseline=True, store=tmp_path / "store")
    assert isinstance(found.row, Row) and found.losses.shape == (199, 2)
    assert found.row["speedup"] > 1 and found.baseline["method"] == "recompute"
    options = ["--method", "ring", "--window-size", "60", "--max-eval-tokens", "200", "--mode", "both"]
    options += ["--baseline-tokens", "8"]
    losses, output = tmp_path / "losses.parquet", tmp_path / "both.json"
    files = ["--per-token-losses", str(losses), "--output-file", str(output), "--store", str(tmp_path / "store")]
    monkeypatch.setattr("sys.argv", ["streamllm", "evaluate", *options, *files, "--json"])
    assert main() == 0
    said, written = json.loads(capsys.readouterr().out), json.loads(output.read_text())
    assert written["streaming"] == said and written["baseline"]["reused"], "the baseline is the store's now"
    assert set(found.row.to_json()) == set(said) and set(found.baseline.to_json()) == set(written["baseline"])
    for name in ("perplexity", "perplexity_low", "ppl_vs_strict_percent", "ppl_increase_percent", "method", "total_kv"):
        assert found.row.get(name) == said.get(name), name
    np.testing.assert_array_equal(found.losses[:, 1], pd.read_parquet(losses)["loss"])


@pytest.mark.parametrize(
    ("error", "refused", "more"),
    [
        (UsageError, "execution 'compile': the steps of method 'ours'", {"method": "ours", "execution": "compile"}),
        (UsageError, "method 'rings': must be one of dense, kvpress, kvpress_shim, mit", {"method": "rings"}),
        (UsageError, "backend 'none': must be one of auto, eager", {"method": "ring", "backend": "none"}),
        (UsageError, "execution 'fast': must be one of eager", {"method": "ring", "execution": "fast"}),
        (UsageError, "quantization 'int3': must be one of none", {"method": "ring", "quantization": "int3"}),
        (UnavailableError, "protocol 'fast': method 'refresh' is measured by decode-loop only", {"method": "refresh"}),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(error, refused, more, monkeypatch):
    monkeypatch.setattr("streamllm.evaluating.load_model_and_text", None)
    with pytest.raises(error, match=refused):
        streamllm.evaluate(streamllm.Configuration(policy=RING.policy, **more))
    for options, message in (({"dtype": "int3"}, "dtype 'int3': must be one of auto, float32"),):
        with pytest.raises(UsageError, match=message):
            streamllm.evaluate(RING, **options)
    with pytest.raises(TextError, match="max_eval_tokens 1: must be >= 2"):
        streamllm.evaluate(RING, source=streamllm.TextSource(max_eval_tokens=1))


def test_how_it_is_measured_is_checked_where_it_is_made():
    with pytest.raises(UsageError, match="protocol 'slow': must be one of fast"):
        streamllm.Measuring(protocol="slow")
    with pytest.raises(UsageError, match="baseline_tokens -1: must be a whole number >= 0"):
        streamllm.Measuring(baseline_tokens=-1)


def test_threads_are_checked_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("streamllm.engine.loading.load_model", None)
    with pytest.raises(UsageError, match="threads -3: must be a whole number >= 1"):
        streamllm.evaluate(RING, threads=-3)
    monkeypatch.setattr("sys.argv", ["streamllm", "evaluate", "--threads", "0"])
    assert main() == 2
    assert capsys.readouterr().err == "error: threads 0: must be a whole number >= 1\n"
