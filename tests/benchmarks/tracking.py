"""What a trial costs in MLflow: `python -m tests.benchmarks.tracking [--tracking-uri URI]`.

Rows are made up, everything else is the sweep's own code: create, one batch, artifacts, end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.tracking import mlflow_runs as tracking
from streamllm.measuring.quality import median_interval
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name

from .reporting import machine

_CALLS = ("create_run", "log_batch", "log_artifacts", "set_terminated")


class TimedClient:
    """An MLflow client that takes down how long its calls took."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            started = time.perf_counter()
            result = getattr(self._client, name)(*arguments, **more)
            self.seconds[name].append(time.perf_counter() - started)
            return result

        return call


def made_up_row(trial: int, entry: str) -> dict[str, Any]:
    with_interval = ("time_ratio", "measured_tpot_ms", "speedup", "perplexity")
    with_interval += ("ppl_vs_strict_percent", "ppl_increase_percent")
    metrics = dict.fromkeys(tracking._METRICS, 1.0 + trial)
    metrics |= {f"{name}_{end}": 1.0 + trial for name in with_interval for end in ("low", "high")}
    words = dict.fromkeys(tracking._TAGS, "word") | dict.fromkeys(tracking._PARAMS, "4")
    return words | metrics | {"trial": trial, "state": "complete", "finished_at": time.time(), "quality_entry": entry}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracking-uri", help="of MLflow (a fresh SQLite file)")
    parser.add_argument("--runs", type=int, default=100, metavar="N")
    parser.add_argument("--tokens", type=int, default=20_000, metavar="N", help="of the per-token losses (20000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    for name, value in result["milliseconds"].items():
        print(f"{name:15} {value['median']:7.1f} ms [{value['low']:.1f}, {value['high']:.1f}]")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    os.environ["MLFLOW_EXPERIMENT_NAME"] = f"streamllm-sweep-benchmark-{uuid.uuid4().hex[:8]}"
    configuration: dict[str, Any] = dict.fromkeys(
        ("study", "commit", "model", "dtype", "quantization", "cap", "seed"), "benchmark"
    )
    configuration |= {"study_id": uuid.uuid4().hex, "space": {"name": "none"}, "objectives": {"tpot_ms": "minimize"}}
    store, key = MeasurementStore(folder / "store"), {"kind": "benchmark"}
    store.put(key, Measurement({}, np.random.default_rng(0).random((arguments.tokens, 2))))
    uri = arguments.tracking_uri or f"sqlite:///{folder}/mlflow.db"
    projection = tracking.Projection(configuration, store, uri)
    projection.open()
    client = TimedClient(projection._client)
    projection._client = client
    for trial in range(arguments.runs):
        started = time.perf_counter()
        projection.log(made_up_row(trial, entry_name(key)))
        client.seconds["a run, in all"].append(time.perf_counter() - started)
    assert not projection.refused, projection.refused[0]
    kind = uri.partition(":")[0]
    return (
        {"benchmark": "MLflow"}
        | machine()
        | {"store": kind, "runs": arguments.runs, "milliseconds": summary(client.seconds)}
    )


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    estimates = {name: median_interval(1e3 * np.array(seconds[name])) for name in (*_CALLS, "a run, in all")}
    return {name: {"median": e.value, "low": e.low, "high": e.high} for name, e in estimates.items()}


if __name__ == "__main__":
    main()
