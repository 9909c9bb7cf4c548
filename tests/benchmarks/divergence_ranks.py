"""Whether KL ranks policies otherwise than perplexity: both of several policies of one total, beside strict
StreamingLLM, each pair of neighbours in either order told apart or not.

python -m tests.benchmarks.divergence_ranks [--model smollm2] [--text FILE] [--tokens 6144] [--total 512] [--threads 2]
                                            [--store FOLDER] [--json FILE]

What is measured is kept in a store, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from streamllm.configuration import Configuration
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.measuring import plans
from streamllm.measuring.measurements import Measurements
from streamllm.measuring.quality import QualityComparison
from streamllm.measuring.store import MeasurementStore
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import EvictionPolicy, with_derived_window

from .reporting import report

POLICIES: dict[str, dict[str, int]] = {
    "strict": {},
    "no sinks": {"n_sink": 0},
    "one sink": {"n_sink": 1},
    "16 sinks": {"n_sink": 16},
    "64 sinks": {"n_sink": 64},
    "R = 16": {"compress_every": 16},
    "R = 64": {"compress_every": 64},
    "R = 128": {"compress_every": 128},
    "R = 64, S = 32": {"compress_every": 64, "n_sink": 32},
    "slack 32": {"cache_slack": 32},
    "slack 64": {"cache_slack": 64},
    "slack 64, drop 8": {"cache_slack": 64, "max_drop": 8, "compress_every": 16},
    "half the total": {"total": 256},
}


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__))
    options.add_argument("--model", default="smollm2", help="as `evaluate` takes it (smollm2)")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--text", type=Path, help="a file (the embedded text)")
    options.add_argument("--tokens", type=int, default=6144, help="of the text (6144)")
    options.add_argument("--total", type=int, default=512, help="total KV (512)")
    options.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    options.add_argument("--store", type=Path, default=Path("sweeps/.store"))
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    loaded = load_model(arguments.model, arguments.dtype)
    source = TextSource(text=arguments.text, max_eval_tokens=arguments.tokens)
    stream = load_tokens(source, load_tokenizer(arguments.model), loaded.vocabulary)
    measurements = Measurements.of(MeasurementStore(arguments.store), loaded, stream, arguments.total)
    comparison = QualityComparison(measurements.strict(keeps=True).losses)
    rows: list[dict[str, Any]] = []
    for name, knobs in POLICIES.items():
        given = {"n_sink": 4, "window_size": 1, "compress_every": 1} | knobs
        policy = with_derived_window(EvictionPolicy(**{k: v for k, v in given.items() if k != "total"}),
                                     given.get("total", arguments.total))  # fmt: skip
        found = measurements.run(plans.compared(Configuration("ours", policy), arguments.total))
        beside = comparison.vs_strict(found.losses)
        record = found.record
        rows.append(
            {
                "policy": name,
                "PPL vs strict %": _interval(beside.value, beside.low, beside.high, 2),
                "KL": _named(record, "kl", 4),
                "KL p99": _named(record, "kl_p99", 3),
                "same top %": _named(record, "same_top_percent", 1),
                "RMS dp %": _named(record, "dp_rms_percent", 2),
                "ppl": beside.value,
                "kl": record["kl"],
            }
        )
        print(f"{name}: {rows[-1]['PPL vs strict %']}, KL {rows[-1]['KL']}", file=sys.stderr, flush=True)
    for measure in ("ppl", "kl"):
        for place, index in enumerate(np.argsort([row[measure] for row in rows]), start=1):
            rows[index][f"by {measure}"] = place
    shown = [{key: value for key, value in row.items() if key not in ("ppl", "kl")} for row in rows]
    title = f"divergence, total {arguments.total}, {len(stream.tokens)} tokens of {stream.label}"
    report(title, loaded, shown, arguments.json, {"kl_positions": record["kl_positions"]})


def _named(record: dict[str, Any], name: str, decimals: int) -> str:
    return _interval(record[name], record.get(f"{name}_low"), record.get(f"{name}_high"), decimals)


def _interval(value: float, low: float | None, high: float | None, decimals: int) -> str:
    ends = "" if low is None or high is None else f" [{low:.{decimals}f}, {high:.{decimals}f}]"
    return f"{value:.{decimals}f}{ends}"


if __name__ == "__main__":
    main()
