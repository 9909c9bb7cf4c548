import json
import subprocess
import sys

import numpy as np
import pytest

from .conftest import GOLDEN

HEAVY = {"torch", "transformers", "ray", "optuna", "mlflow", "pandas", "matplotlib", "datasets", "numpy"}


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200)


def evaluate(*more, cwd=None):
    model = ("--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"))
    return python("-m", "streamllm", "evaluate", *model, "--threads", "1", *more, cwd=cwd)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("orchestrator.sweep", ["--help"]),
        ("streamllm", ["--help"]),
        ("streamllm", ["evaluate", "--help"]),
        ("dashboards.pareto", ["--help"]),
    ],
)
def test_help_imports_nothing_heavy(module, arguments):
    """What makes `--help` answer in under half a second, without a clock."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', *{arguments!r}]\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"print('heavy:', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = python("-c", code)
    assert "usage: " in done.stdout
    assert done.stdout.endswith("heavy: []\n")


@pytest.mark.parametrize("protocol", ["fast", "decode-loop"])
def test_evaluate_prints_one_flat_json_object(protocol, tmp_path):
    losses = tmp_path / "losses.npy"
    more = (
        "--json",
        "--protocol",
        protocol,
        "--window-size",
        "60",
        "--max-eval-tokens",
        "200",
        "--attn-backend",
        "math",
    )
    done = evaluate(*more, "--per-token-losses", str(losses), "--output-file", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert not any(isinstance(value, dict | list) for value in result.values())
    assert result["peak_kv"] == 65
    assert result["backend"] == result["backend_requested"] == "math"
    assert result["method"] == "ours" and result["protocol"] == protocol
    for key in ("perplexity", "tpot_ms", "quality_sec", "runtime_sec"):
        assert result[key] > 0
    written = np.load(losses)
    assert written.dtype == np.float64
    golden = json.loads((GOLDEN / "neox-tiny" / "mit_losses.json").read_text())[0]["losses"]
    np.testing.assert_allclose(written, golden[:199], atol=2e-4)
    assert result["perplexity"] == pytest.approx(np.exp(written.mean()))


def test_the_baselines_sample_leaves_nan_elsewhere(tmp_path):
    losses, ids = tmp_path / "losses.npy", tmp_path / "ids.json"
    ids.write_text(json.dumps([i % 251 for i in range(1500)]))
    more = ("--token-ids", str(ids), "--method", "recompute", "--window-size", "28")
    done = evaluate(*more, "--per-token-losses", str(losses), "--json")
    assert json.loads(done.stdout)["evaluated_tokens"] == 1024
    written = np.load(losses)
    assert written.shape == (1499,)
    assert np.isfinite(written).sum() == 1024


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("--window-size", "0"), "window_size 0"),
        (("--n-sink", "5000"), "cap 2048: below n_sink 5000"),
        (("--max-eval-tokens", "1"), "max_eval_tokens 1"),
        (("--output-file", "no/where.json"), "no such folder"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(bad, message):
    done = evaluate(*bad)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_past_the_trained_length_there_is_a_warning(tmp_path):
    done = evaluate("--method", "dense", "--max-eval-tokens", "200", "--json")
    assert "warning" not in done.stderr
    long = tmp_path / "long.json"
    long.write_text(json.dumps([i % 256 for i in range(4200)]))
    done = python(
        "-m",
        "streamllm",
        "evaluate",
        "--model",
        str(GOLDEN / "neox-tiny"),
        "--token-ids",
        str(long),
        "--method",
        "dense",
    )
    assert "attend to up to 4199 keys, the model was trained on 4096;" in done.stderr
