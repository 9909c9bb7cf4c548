"""What a trial costs in MLflow: `python -m tests.benchmarks.tracking [--tracking-uri URI]`.

Rows are made up, with everything that a row can have; all else is the sweep's own code. Calls are timed one by one;
then as many runs again are logged as a sweep logs them, several at a time where the store takes that, and ended.
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
from orchestrator.tracking.row_in_mlflow import METRICS, PARAMS, TAGS
from streamllm.measuring.quality import median_interval
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name
from streamllm.results.schema import Row
from streamllm.results.study_folder import StudyFolder

from .reporting import machine

_CALLS = ("create_run", "log_batch", "log_inputs", "set_terminated")


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


def made_up_row(trial: int, entry: str) -> Row:
    with_interval = ("time_ratio", "measured_tpot_ms", "speedup", "perplexity")
    with_interval += ("ppl_vs_strict_percent", "ppl_increase_percent")
    metrics = dict.fromkeys(METRICS, 1.0 + trial)
    metrics |= {f"{name}_{end}": 1.0 + trial for name in with_interval for end in ("low", "high")}
    words = dict.fromkeys(TAGS, "word") | dict.fromkeys(PARAMS, "4")
    about = {"trial": trial, "state": "complete", "finished_at": time.time(), "quality_entry": entry}
    return Row.of(words | metrics | about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracking-uri", help="of MLflow (a fresh SQLite file)")
    parser.add_argument("--runs", type=int, default=100, metavar="N")
    parser.add_argument("--tokens", type=int, default=20_000, metavar="N", help="of the per-token losses (20000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder, "study"))
    for name, value in result["milliseconds"].items():
        print(f"{name:15} {value['median']:7.1f} ms [{value['low']:.1f}, {value['high']:.1f}]")
    print(
        "several at a time, where the store takes that: {wall:.1f} ms a run, {own CPU:.1f} of CPU".format(
            **result["ms per run, as a sweep logs them"]
        )
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    os.environ["MLFLOW_EXPERIMENT_NAME"] = f"streamllm-sweep-benchmark-{uuid.uuid4().hex[:8]}"
    configuration: dict[str, Any] = dict.fromkeys(
        ("study", "commit", "model", "dtype", "quantization", "cap", "seed"), "benchmark"
    )
    configuration |= {"study_id": uuid.uuid4().hex, "space": {"name": "none"}, "objectives": {"tpot_ms": "minimize"}}
    store, key = MeasurementStore(StudyFolder(folder).store), {"kind": "benchmark"}
    store.put(key, Measurement({}, np.random.default_rng(0).random((arguments.tokens, 2))))
    uri = arguments.tracking_uri or f"sqlite:///{folder}/mlflow.db"
    projection = tracking.Projection(StudyFolder(folder), configuration, uri)
    projection.open()
    client = TimedClient(projection._client)
    projection._client = client
    projection._begin_to_write()
    for trial in range(arguments.runs):
        started = time.perf_counter()
        projection.log(made_up_row(trial, entry_name(key)))
        client.seconds["a run, in all"].append(time.perf_counter() - started)
    rows = [made_up_row(trial, entry_name(key)) for trial in range(arguments.runs, 2 * arguments.runs)]
    began, spent = time.perf_counter(), time.process_time()
    for _ in projection.log_all(rows):
        pass
    together = {
        "wall": 1e3 * (time.perf_counter() - began) / len(rows),
        "own CPU": 1e3 * (time.process_time() - spent) / len(rows),
    }
    assert not projection.refused, projection.refused[0]
    kind = uri.partition(":")[0]
    return (
        {"benchmark": "MLflow"}
        | machine()
        | {"store": kind, "runs": arguments.runs, "milliseconds": summary(client.seconds)}
        | {"ms per run, as a sweep logs them": together}
    )


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    estimates = {name: median_interval(1e3 * np.array(seconds[name])) for name in (*_CALLS, "a run, in all")}
    return {name: {"median": e.value, "low": e.low, "high": e.high} for name, e in estimates.items()}


if __name__ == "__main__":
    main()
