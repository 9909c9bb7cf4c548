"""What a trial costs besides itself, beside Ray Tune: OptunaSearch, MLflowLoggerCallback, actors reused.

`python -m tests.benchmarks.compare_tune`: the same trials, which do nothing (four integers, two objectives), the same
number of workers on the same Ray, the same MLflow store, rounds interleaved. Ours is what a sweep does: driver, pool,
study with its journal on disk, MLflow from a process of its own. Two paces for each: from the first finished trial to
the last, and the same until MLflow has everything.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.configuration import WorkerSettings
from orchestrator.driver import Driver
from orchestrator.scheduler import Scheduler
from orchestrator.search.study import Study
from orchestrator.tracking.follower import Tracker
from orchestrator.tracking.mlflow_runs import Projection, Report
from orchestrator.trials_file import TrialsFile
from orchestrator.workers.messages import Assignment, WorkerDescription, WorkerSetup
from orchestrator.workers.pool import WorkerPool
from orchestrator.workers.worker import Worker
from search_spaces import load_space
from streamllm.measuring.store import Arrays, Measurement, MeasurementStore
from streamllm.measuring.text import TokenStream
from streamllm.results.study import BASELINE, STRICT
from streamllm.results.study_folder import StudyFolder

from ..pretended import VARIANT, description, measured
from .made_up import made_up_settings

CAP = 2048
INTEGERS = {
    "n_sink": list(range(16)),
    "compress_every": list(range(1, 17)),
    "cache_slack": list(range(16)),
    "max_drop": list(range(16)),
}
TEXT = TokenStream(np.arange(65), "none", "t")


def objectives(n_sink: int, compress_every: int, cache_slack: int, max_drop: int) -> tuple[float, float]:
    return 5.0 + 1.0 / compress_every + 0.01 * max_drop, 2.0 + 0.1 * cache_slack - 0.01 * n_sink


class Idle(Worker):
    """Measures nothing."""

    def load(self) -> WorkerDescription:
        warnings = self._claim("")
        return description() | self.place() | {"warnings": warnings, "cores": self.cores}

    def measure(self, assignment: Assignment, text: TokenStream, against: Sequence[Arrays] = ()) -> Measurement:
        policy = asdict(assignment.job.what.policy)
        speed, loss = objectives(**{name: policy[name] for name in INTEGERS})
        found = measured(assignment.job, text)
        if assignment.job.is_timed:
            return Measurement(found.record | {"time_ratio": speed})
        assert found.losses is not None
        return replace(found, losses=found.losses + np.array([0.0, loss]))


class Times:
    """An observer that notes when trials finish."""

    def __init__(self) -> None:
        self.finished: list[float] = []

    def trial_finished(self, row: dict[str, Any]) -> None:
        if row["trial"] not in (STRICT, BASELINE):
            self.finished.append(time.perf_counter())


def pace(finished: list[float], end: float) -> dict[str, float]:
    """Milliseconds per trial after the first."""
    more = len(finished) - 1
    return {"search": 1e3 * (finished[-1] - finished[0]) / more, "with MLflow": 1e3 * (end - finished[0]) / more}


def ours(place: Path, trials: int, workers: int) -> dict[str, float]:
    folder = place / "study"
    folder.mkdir(parents=True)
    (folder / "space.yaml").write_text(f"cap: {CAP}\nparameters: {json.dumps(INTEGERS)}\n")
    space = load_space(str(folder / "space.yaml"))
    study, times = Study("ours", folder / "journal.log", space, CAP, seed=0), Times()
    settings = made_up_settings(place.name, space)
    (folder / "sweep.json").write_text(json.dumps(settings))
    rows = TrialsFile(StudyFolder(folder), [])
    store = MeasurementStore(StudyFolder(folder).store)
    tracker = Tracker(Projection(StudyFolder(folder), settings), rows)
    pool = WorkerPool(WorkerSetup("", VARIANT), WorkerSettings(count=workers), worker_class=Idle)
    try:
        Driver(study, Scheduler(pool, store, VARIANT), TEXT, VARIANT, trials, [times, rows, tracker]).run()
    finally:
        pool.shutdown()
    StudyFolder(folder).write_outcome("FINISHED")
    if (problem := tracker.finish(Report(), lambda _: None)) is not None:
        raise RuntimeError(problem)
    return pace(times.finished, time.perf_counter())


def tune(folder: Path, trials: int, workers: int) -> dict[str, float]:
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.optuna import OptunaSearch

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.knobs = config

        def step(self) -> dict[str, Any]:
            speed, loss = objectives(**self.knobs)
            return {"tpot_ms": speed, "loss": loss, "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.knobs = new_config
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

    class Finished(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            finished.append(time.perf_counter())

    finished: list[float] = []
    space = {name: tune.randint(values[0], values[-1] + 1) for name, values in INTEGERS.items()}
    logger = MLflowLoggerCallback(tracking_uri=os.environ["MLFLOW_TRACKING_URI"], experiment_name="tune")
    tune.Tuner(
        tune.with_resources(Trial, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric=["tpot_ms", "loss"], mode=["min", "min"], seed=0),
            num_samples=trials,
            max_concurrent_trials=workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name="tune", callbacks=[logger, Finished()], verbose=0),
    ).fit()
    return pace(finished, time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    # Here, not above: MLflow's process imports this module anew, and a sweep's own imports no torch.
    from .reporting import interleaved, machine, summary

    try:
        import ray
        import ray.tune.search.optuna
    except ImportError as error:
        raise SystemExit(f"error: {error}; pip install 'ray[tune]' is what this compares with") from None

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        ray.init(num_cpus=arguments.workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        paces: dict[str, list[dict[str, float]]] = {"ours": [], "tune": []}

        def measure(who: str) -> float:
            run = {"ours": ours, "tune": tune}[who]
            paces[who].append(run(folder / f"{who}-{len(paces[who])}", arguments.trials, arguments.workers))
            return paces[who][-1]["search"]

        interleaved({who: lambda who=who: measure(who) for who in paces}, arguments.rounds)  # type: ignore[misc]
        ray.shutdown()
    result: dict[str, Any] = {"trials": arguments.trials, "workers": arguments.workers}
    for kind in ("search", "with MLflow"):
        mine, theirs = ([run[kind] for run in paces[who]] for who in ("ours", "tune"))
        ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
        result[kind] = {"ours_ms": mine, "tune_ms": theirs, "ratio": summary(ratios) | {"rounds": ratios}}
        print(
            f"{kind}: ours {np.median(mine):.1f} ms per trial, Ray Tune {np.median(theirs):.1f}: "
            f"{np.median(ratios):.1f} times [{min(ratios):.1f}, {max(ratios):.1f} over {len(ratios)} rounds]"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"benchmark": "compare_tune"} | machine() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
