"""The default sweep run several times over, everything measured anew, with busy processes beside it: how much its
numbers spread, and whether it says the same again.

python -m tests.benchmarks.repeated_sweeps [--sweeps 3] [--load 2] [--json FILE]

A configuration confirmed in two sweeps or more is a row: standard deviations, over sweeps, of the logarithms of what is
paired (`speedup`, `time_ratio`) and of the raw milliseconds beside it, `measured_tpot_ms`, which single timing would
have been left with; of a quotient of the baseline's and the configuration's own too, the speedup by single times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

from dashboards.recommendation import recommended
from streamllm.measuring.pairing import load_average
from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults, load_study

from .reporting import busy_processes, machine, markdown_table

ROOT = Path(__file__).parents[2]
KNOBS = (
    "method",
    "backend_requested",
    "execution",
    "n_sink",
    "window_size",
    "compress_every",
    "cache_slack",
    "max_drop",
)
MEASURES = ("log speedup", "log time_ratio", "log measured_tpot_ms", "log measured speedup")

Configuration = tuple[Any, ...]


def sweep(folder: Path, options: Sequence[str]) -> StudyResults:
    """Runs it in a folder of its own, where its store and MLflow are too. Raises RuntimeError if it fails."""
    folder.mkdir()
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "orchestrator.sweep", "--output", str(folder / "study"), *options]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {ran.returncode}\n{ran.stdout}\n{ran.stderr}")
    return load_study(str(folder / "study"))


def configuration(row: AnyRow) -> Configuration:
    return tuple(row[name] for name in KNOBS)


def name(of: Configuration) -> str:
    method, backend, execution, n_sink, window, interval, slack, drop = of
    how = "" if execution == "eager" else f" {execution}"
    return f"{method} {backend}{how} S={n_sink} W={window} R={interval} slack={slack} drop={drop}"


def values(row: AnyRow, baseline: AnyRow) -> dict[str, float]:
    raw = row["measured_tpot_ms"]
    found = (row["speedup"], row["time_ratio"], raw, baseline["measured_tpot_ms"] / raw)
    return dict(zip(MEASURES, map(math.log, found), strict=True))


def searched(study: StudyResults) -> tuple[AnyRow, list[AnyRow]]:
    """Baseline and trials as the search measured them."""
    (baseline,) = (row for row in study.searched if row["trial"] == "baseline")
    return baseline, [row for row in study.searched if row is not baseline and row["state"] == "complete"]


def confirmed(study: StudyResults) -> tuple[AnyRow, list[AnyRow]]:
    assert study.baseline is not None
    return study.baseline, [row for row in study.trials if row.get("rounds")]


Stage = Callable[[StudyResults], tuple[AnyRow, list[AnyRow]]]


def repeated(studies: Sequence[StudyResults], stage: Stage) -> dict[Configuration, list[dict[str, float]]]:
    """What each sweep measured of a configuration, of those that two sweeps or more have at that stage."""
    found: dict[Configuration, list[dict[str, float]]] = defaultdict(list)
    for study in studies:
        baseline, rows = stage(study)
        for of, row in {configuration(row): row for row in rows}.items():
            found[of].append(values(row, baseline))
    return {of: sweeps for of, sweeps in found.items() if len(sweeps) > 1}


def spreads(sweeps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {f"sd {measure}": stdev(one[measure] for one in sweeps) for measure in MEASURES}


def pooled(stage: str, found: Mapping[Configuration, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Over all configurations: the root of the mean variance, each weighing its degrees of freedom."""
    freedom = sum(len(sweeps) - 1 for sweeps in found.values())
    row: dict[str, Any] = {"times of": stage, "configurations": len(found)}
    for measure in MEASURES if freedom else ():
        squares = sum((len(sweeps) - 1) * spreads(sweeps)[f"sd {measure}"] ** 2 for sweeps in found.values())
        row[f"sd {measure}"] = math.sqrt(squares / freedom)
    return row


def answer(study: StudyResults) -> dict[str, Any]:
    """What a sweep says in the end."""
    found = recommended(study, study.front)
    return {
        "front": [name(configuration(row)) for row in study.front],
        "recommended": None if found.row is None else name(configuration(found.row)),
        "kind": found.kind,
        "confirmed": len(confirmed(study)[1]),
    }


def agreement(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many sweeps give the most frequent answer."""
    fronts = Counter(frozenset(one["front"]) for one in answers)
    recommendations = Counter(one["recommended"] for one in answers)
    return {"same front": max(fronts.values()), "same recommendation": max(recommendations.values())}


def configuration_rows(studies: Sequence[StudyResults], answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for of, sweeps in repeated(studies, confirmed).items():
        rows.append(
            {
                "configuration": name(of),
                "sweeps": len(sweeps),
                "on the front of": sum(name(of) in one["front"] for one in answers),
                "recommended by": sum(name(of) == one["recommended"] for one in answers),
                "speedup": math.exp(median(one["log speedup"] for one in sweeps)),
                **spreads(sweeps),
            }
        )
    return sorted(rows, key=lambda row: -row["speedup"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--load", type=int, default=2, metavar="N", help="busy processes beside them (2)")
    parser.add_argument("--trials", type=int, default=16, metavar="N", help="of each sweep (16)")
    parser.add_argument("--max-eval-tokens", type=int, metavar="N", help="of the text (the sweep's default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    options = ["--trials", str(arguments.trials)]
    if arguments.max_eval_tokens is not None:
        options += ["--max-eval-tokens", str(arguments.max_eval_tokens)]
    studies, answers, seconds, loads = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, busy_processes(arguments.load):
        for index in range(arguments.sweeps):
            started = time.perf_counter()
            studies.append(sweep(Path(folder) / f"sweep-{index}", options))
            seconds.append(time.perf_counter() - started)
            loads.append(load_average())
            answers.append(answer(studies[-1]))
            print(f"sweep {index + 1}/{arguments.sweeps}: {seconds[-1]:.0f} s, load {loads[-1]:.1f}", flush=True)
    rows = configuration_rows(studies, answers)
    stages = {"the search": searched, "confirming": confirmed}
    overall = [pooled(stage, repeated(studies, of)) for stage, of in stages.items()]
    agree = agreement(answers)
    print(f"{arguments.sweeps} sweeps of {arguments.trials} trials, {arguments.load} busy processes beside them")
    print(f"\n{markdown_table(rows)}\n\n{markdown_table(overall)}\n")
    for index, said in enumerate(answers, start=1):
        print(f"sweep {index}: recommended {said['recommended']} ({said['kind']}); front: {'; '.join(said['front'])}")
    print(f"of {len(answers)}: {agree['same front']} same front, {agree['same recommendation']} same recommendation")
    if arguments.json is not None:
        facts = {
            "benchmark": "repeated sweeps",
            **machine(),
            "trials": arguments.trials,
            "max_eval_tokens": arguments.max_eval_tokens,
            "busy_processes": arguments.load,
            "seconds": seconds,
            "load_after_each": loads,
            "answers": answers,
            "agreement": agree,
            "overall": overall,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
