"""Study folders with known contents, for tests of tables, figures and damage."""

import json

OBJECTIVES = {"tpot_ms": "minimize", "ppl_increase_percent": "minimize"}
SOURCE = {
    "text": None,
    "token_ids": None,
    "dataset_name": None,
    "dataset_config": None,
    "split": "test",
    "offset": 0,
    "max_eval_tokens": None,
}


def row(trial, tpot_ms, increase, **more):
    """A complete trial as `trials.jsonl` has it; intervals are 10% and one point wide each way; over strict
    StreamingLLM, whose perplexity is re-computation's, a tenth of a point."""
    values = {
        "trial": trial, "state": "complete", "model": "m", "dataset": "d", "protocol": "fast", "dtype": "float32",
        "method": "ours", "backend": "flash", "backend_requested": "flash", "execution": "eager", "threads": 1,
        "n_sink": 4, "window_size": 252, "compress_every": 1, "cache_slack": 0, "max_drop": 0, "peak_kv": 257,
        "tpot_ms": tpot_ms, "tpot_ms_low": 0.9 * tpot_ms, "tpot_ms_high": 1.1 * tpot_ms,
        "speedup": 40 / tpot_ms, "first_token_latency_sec": 0.04, "runtime_sec": 9.0, "feasible": True, "worker": 0,
        "perplexity": 15 + increase / 6, "ppl_increase_percent": increase,
        "ppl_increase_percent_low": increase - 1, "ppl_increase_percent_high": increase + 1,
        "ppl_vs_strict_percent": increase,
        "ppl_vs_strict_percent_low": increase - 0.1, "ppl_vs_strict_percent_high": increase + 0.1,
    }  # fmt: skip
    return values | more


def failed(trial, **more):
    return {
        "trial": trial, "state": "failed", "reason": "MemoryError: no room", "method": "ours",
        "backend_requested": "math", "execution": "eager", "n_sink": 4, "window_size": 252, "compress_every": 1,
        "cache_slack": 0, "max_drop": 0, "feasible": False, "worker": 0, **more,
    }  # fmt: skip


BASELINE = row("baseline", 40.0, 0.0, method="recompute", n_sink=0, window_size=256, peak_kv=256)


def write_study(folder, trials, name="s", objectives=OBJECTIVES, confirmed=(), baseline=BASELINE, **settings):
    """Writes a study's folder under `sweeps/`, and returns it."""
    output = folder / "sweeps" / name
    output.mkdir(parents=True)
    configuration = {
        "study": name, "summary": f"m on d, study {name}", "objectives": objectives, "model": "testbed", "cap": 256,
        "quantization": "none", "source": SOURCE, "seed": 0, "commit": "c0ffee", **settings,
    }  # fmt: skip
    rows = [baseline, *trials] if baseline else trials
    (output / "sweep.json").write_text(json.dumps(configuration))
    (output / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (output / "confirmed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in confirmed))
    return output
