import contextlib
import io
import json
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamllm.__main__ import main
from streamllm.testbed import MODEL_FOLDER

from .conftest import GOLDEN

HEAVY = {"torch", "transformers", "ray", "optuna", "mlflow", "pandas", "matplotlib", "datasets", "numpy"}


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200)


def streamllm(*arguments, cwd=None):
    """What `python -m streamllm` does, in this process, which has torch already."""
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with (
        contextlib.chdir(cwd or "."),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["streamllm", *arguments]),
    ):
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        finally:
            torch.set_num_threads(threads)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def evaluate(*more, cwd=None):
    return measure("evaluate", *more, cwd=cwd)


def measure(command, *more, cwd=None):
    model = ("--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"))
    return streamllm(command, *model, "--threads", "1", *more, cwd=cwd)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("orchestrator.sweep", ["--help"]),
        ("streamllm", ["--help"]),
        ("streamllm", ["evaluate", "--help"]),
        ("streamllm", ["baseline", "--help"]),
        ("streamllm", ["backends", "--help"]),
        ("streamllm", ["diagnose", "--help"]),
        ("streamllm", ["recall", "--help"]),
        ("streamllm", ["profile", "--help"]),
        ("streamllm", ["generate", "--help"]),
        ("dashboards.pareto", ["--help"]),
        ("dashboards.figures", ["--help"]),
        ("dashboards.summarize", ["--help"]),
        ("dashboards.published", ["--help"]),
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


@pytest.fixture
def folder(tmp_path):
    """A model that may be changed."""
    return shutil.copytree(GOLDEN / "llama-tiny", tmp_path / "m")


def refused(folder, command="evaluate", *more):
    ids = () if command == "generate" else ("--token-ids", str(GOLDEN / "tokens.json"))
    done = streamllm(command, "--model", str(folder), *ids, *more, cwd=folder.parent)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_folder_that_lacks_weights(folder):
    weights = load_file(folder / "model.safetensors")
    lacking = next(name for name in weights if "down_proj" in name)
    save_file(
        {name: weights[name] for name in weights if name != lacking}, folder / "model.safetensors", {"format": "pt"}
    )
    assert f"files lack 1 tensors of the model that config.json describes ({lacking})" in refused(folder)


@pytest.mark.parametrize(
    "damage",
    [{"num_attention_heads": 0}, {"num_hidden_layers": 2.5}, {"vocab_size": 2000}, {"hidden_act": "x"}, None],
    ids=str,
)
def test_damaged_folders_are_a_line(folder, damage):
    if damage is None:
        (folder / "model.safetensors").write_bytes(b"torn")
    else:
        change(folder, **damage)
    assert "not a usable folder" in refused(folder)


def test_a_trained_length_of_nothing(folder):
    change(folder, max_position_embeddings=0)
    assert "max_position_embeddings 0: must be a whole number >= 2" in refused(folder)


def test_a_policy_beyond_a_window_of_the_models_own_is_measured_with_a_warning(folder, tmp_path):
    change(folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)
    for file in MODEL_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    done = evaluate(
        "--model", str(folder), "--window-size", "200", "--max-eval-tokens", "300", "--mode", "streaming", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = "every layer attends to its last 64 tokens only (sliding window), the cache holds up to 205"
    assert said in done.stdout + done.stderr


SEEDS_KEYS = {
    "perplexity",
    "runtime_sec",
    "prefill_sec",
    "first_token_latency_sec",
    "tpot_ms",
    "decode_toks_per_sec",
    "avg_attn_ms",
    "peak_memory_mb",
    "speedup",
    "ppl_increase_percent",
    "backend",
}


@pytest.mark.parametrize("protocol", ["fast", "decode-loop", "chunked"])
def test_evaluate_prints_one_flat_object_and_writes_the_documents_structure(protocol, tmp_path):
    losses, file = tmp_path / "losses.npy", tmp_path / "result.json"
    what = ("--window-size", "60", "--max-eval-tokens", "300", "--attn-backend", "math", "--dtype", "float32")
    how = ("--protocol", protocol, *(("--prefill-tokens", "100") if protocol == "chunked" else ()), "--mode", "both")
    output = ("--json", "--per-token-losses", str(losses), "--output-file", str(file))
    done = evaluate(*what, *how, *output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result, written = json.loads(done.stdout), json.loads(file.read_text())
    assert result == written["streaming"]
    assert set(written) == {"baseline", "streaming"}
    keys = SEEDS_KEYS if protocol != "fast" else SEEDS_KEYS - {"runtime_sec"} | {"measuring_sec"}
    assert all(set(record) >= keys for record in written.values())
    assert not any(isinstance(value, dict | list) for value in result.values())
    assert result["peak_kv"] == (100 if protocol == "chunked" else 65)
    assert result["backend"] == result["backend_requested"] == "math"
    assert result["method"] == "ours" and result["protocol"] == protocol
    assert written["baseline"]["method"] == "recompute"
    assert min(result[key] for key in keys - {"backend", "ppl_increase_percent"}) > 0
    assert result["ppl_increase_percent_low"] <= result["ppl_increase_percent"] <= result["ppl_increase_percent_high"]
    assert result["speedup"] == pytest.approx(written["baseline"]["time_ratio"] / result["time_ratio"])
    table = np.load(losses)
    assert table.dtype == np.float64 and table.shape == (299,)
    assert result["perplexity"] == pytest.approx(np.exp(np.nanmean(table)))
    assert np.isfinite(table).all() == (protocol != "chunked")
    if protocol != "chunked":
        golden = json.loads((GOLDEN / "neox-tiny" / "mit_losses.json").read_text())[0]["losses"]
        np.testing.assert_allclose(table, golden[:299], atol=2e-4)


def test_a_baseline_is_measured_once(tmp_path):
    """By its own command; `evaluate` finds it, of another total it does not."""
    what = ("--max-eval-tokens", "200", "--protocol", "decode-loop", "--json")
    first = json.loads(measure("baseline", "--n-sink", "4", "--window-size", "28", *what, cwd=tmp_path).stdout)
    again = json.loads(measure("baseline", "--n-sink", "2", "--window-size", "30", *what, cwd=tmp_path).stdout)
    assert (first["reused"], again["reused"]) == (False, True)
    assert first | {"reused": True} == again
    compared = json.loads(evaluate("--window-size", "20", "--cache-slack", "8", *what, cwd=tmp_path).stdout)
    assert compared["speedup"] == pytest.approx(first["time_ratio"] / compared["time_ratio"])
    alone = evaluate("--window-size", "20", *what, cwd=tmp_path)
    assert "speedup" not in json.loads(alone.stdout)
    assert "no baseline is stored for this: --mode both" in alone.stderr


def test_the_source_documents_commands(tmp_path):
    """Their flags as they write them (§1), on a small model."""
    flags = "--n-sink 4 --window-size 60 --compress-every 1 --streaming-mode mit --mode streaming --max-eval-tokens 200"
    model = ("--model-name", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"))
    file = tmp_path / "results" / "ablation" / "pg19_c1.json"  # (§4: a folder that nobody made)
    more = ("--execution", "eager", "--output-file", str(file))
    done = streamllm("evaluate", *model, *flags.split(), *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["streaming"]["n_tokens"] == 200
    values = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert values["method"] == "mit" and values["window_size"] == "60"


def test_per_token_losses_as_parquet(tmp_path):
    import pandas as pd

    file = tmp_path / "losses.parquet"
    done = evaluate("--window-size", "28", "--max-eval-tokens", "150", "--per-token-losses", str(file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(file)
    assert table.token.tolist() == list(range(1, 150))
    assert table.loss.dtype == "float64"


def test_backends_prints_the_documents_smoke_test():
    outcome = json.loads(streamllm("backends", "--json").stdout)
    assert outcome["flash_enabled"] is outcome["smoke_test"] is True
    off = outcome["logit_difference"]
    assert off["math"] == 0 and 0 < off["flash"] < 1e-3 and "flash_attention_2" not in off
    table = streamllm("backends").stdout
    assert "flash_attention_2   -  " in table and "\nmath                math                0.0e+00\n" in table


def test_a_backend_that_is_not_there(tmp_path):
    more = ("--window-size", "28", "--max-eval-tokens", "100", "--attn-backend", "flash_attention_2")
    done = evaluate(*more, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert "warning: attention backend 'flash_attention_2' does not run on cpu" in done.stderr
    result = json.loads(done.stdout)
    assert (result["backend_requested"], result["backend"]) == ("flash_attention_2", "flash")
    strict = evaluate(*more, "--strict", cwd=tmp_path)
    assert strict.returncode == 2
    assert strict.stderr.startswith("error: attention backend 'flash_attention_2' does not run")


def test_the_baselines_sample_leaves_nan_elsewhere(tmp_path):
    losses, ids = tmp_path / "losses.npy", tmp_path / "ids.json"
    ids.write_text(json.dumps([i % 251 for i in range(500)]))
    more = ("--token-ids", str(ids), "--method", "recompute", "--window-size", "28", "--baseline-tokens", "30")
    done = evaluate(*more, "--per-token-losses", str(losses), "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert (result["evaluated_tokens"], result["sampled_tokens"]) == (499, 32)
    written = np.load(losses)
    assert written.shape == (499,)
    assert np.isfinite(written).sum() == 32


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("--window-size", "0"), "window_size 0"),
        (("--n-sink", "5000"), "cap 2048: below n_sink 5000"),
        (("--max-eval-tokens", "1"), "max_eval_tokens 1"),
        (("--baseline-tokens", "0"), "baseline_tokens '0': must be a whole number >= 1, 'all' or 'auto'"),
        (("--baseline-tokens", "9", "--protocol", "decode-loop"), "baseline_tokens '9': is for --protocol fast"),
        (("--book", "3"), "book '3': is for texts in rows; give dataset_name"),
        (("--output-file", "/dev/null/result.json"), "it, or its folder, cannot be made (not a folder)"),
        (("--per-token-losses", "losses.csv"), "must end in .npy or .parquet"),
        (("--prefill-tokens", "64"), "prefill_tokens 64: must be >= 1, and --protocol chunked"),
        (("--protocol", "chunked", "--prefill-tokens", "64", "--window-size", "60"), "prefill_tokens 64: must exceed"),
        (("--protocol", "chunked", "--prefill-tokens", "31", "--window-size", "9"), "31: must be at least 32, as many"),
        (
            ("--method", "kvpress", "--dtype", "bfloat16"),
            "method 'kvpress' in bfloat16 is only nearly the function that",
        ),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(bad, message):
    done = evaluate(*bad)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_past_the_trained_length_there_is_a_warning(tmp_path):
    done = evaluate("--method", "dense", "--max-eval-tokens", "200", "--json", cwd=tmp_path)
    assert "trained" not in done.stderr
    folder = shutil.copytree(GOLDEN / "neox-tiny", tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    what = ("--token-ids", str(GOLDEN / "tokens.json"), "--max-eval-tokens", "150", "--threads", "1")
    done = streamllm("evaluate", "--model", str(folder), *what, "--method", "dense", cwd=tmp_path)
    assert "attend to up to 149 keys, the model was trained on 100:" in done.stderr
