"""From the command to the first measured trial of the embedded model, by part: a first sweep in a fresh folder, and a
second one, another study that finds everything in the store.

python -m tests.benchmarks.startup [--runs 5] [--against DIR ...] [--json FILE]

against: other checkouts, which take turns with this one, and with the least that Ray, torch and transformers take by
themselves (`bare`). What a sweep does is watched from within, by `startup_watched`; moments are seconds after the
command was given, in the order in which they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .reporting import machine, markdown_table
from .startup_watched import MOMENTS, PROCESSOR

ROOT = Path(__file__).parents[2]
_OPTIONS = ("--trials", "2", "--confirm", "0")
_SWEEPS = ("first sweep", "second sweep")
_VALUES = (*MOMENTS, *(f"{moment}: {PROCESSOR}" for moment in ("worker loaded", "first trial")), "load")
_BARE = """
import json, sys, time
import ray
from tests.benchmarks.startup_watched import Watch

class Worker:
    def place(self): pass

    def load(self): import torch, transformers.models.gpt_neox.modeling_gpt_neox

watch = Watch(float(sys.argv[1]))
ray.init("local", include_dashboard=False, num_cpus=2, log_to_driver=False)
watch.note("Ray runs")
workers = [ray.remote(Worker).options(num_cpus=1).remote() for _ in range(2)]
ray.wait([worker.place.remote() for worker in workers])
watch.note("worker's process")
ray.wait([worker.load.remote() for worker in workers])
watch.note("worker loaded")
print(json.dumps(watch.moments))
"""

Moments = dict[str, float]


def sweeps(root: Path) -> dict[str, Moments]:
    """Both, with the code of that checkout, in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: _watched(root, Path(folder), name.replace(" ", "-")) for name in _SWEEPS}


def bare() -> Moments:
    """Two actors that import torch and a model's code, and nothing of ours. Raises CalledProcessError."""
    load, begun = os.getloadavg()[0], time.time()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-P", "-c", _BARE, str(begun)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {**json.loads(ran.stdout.splitlines()[-1]), "load": load}


def _watched(root: Path, folder: Path, study: str) -> Moments:
    """Raises RuntimeError if it fails."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(root)}
    watched, found = Path(__file__).with_name("startup_watched.py"), folder / f"{study}.json"
    load, begun = os.getloadavg()[0], time.time()
    command = [sys.executable, "-P", str(watched), str(begun), str(found), "--study", study, *_OPTIONS]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {ran.returncode}\n{ran.stdout}\n{ran.stderr}")
    return {**json.loads(found.read_text()), "load": load}


def summary(runs: Sequence[Moments]) -> dict[str, Any]:
    """Of each moment that all have: median, least and most."""
    known = [name for name in _VALUES if all(name in run for run in runs)]
    values = {name: [round(run[name], 2) for run in runs] for name in known}
    return {name: {"median": median(of), "low": min(of), "high": max(of)} for name, of in values.items()}


def revision(root: Path) -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return ran.stdout.strip() if (root / ".git").exists() and not ran.returncode else root.name


def table(found: dict[str, dict[str, Any]]) -> str:
    """A column for each checkout and sweep."""
    columns = {f"{root}, {sweep}": of for root, both in found.items() for sweep, of in both.items()}
    titled = {title: {name: _shown(of.get(name)) for name in _VALUES} for title, of in columns.items()}
    return markdown_table(
        [{"seconds until": name} | {title: of[name] for title, of in titled.items()} for name in _VALUES]
    )


def _shown(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="DIR", help="other checkouts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    roots = [root.resolve() for root in (*arguments.against, ROOT)]
    runs: dict[Path, list[dict[str, Moments]]] = {root: [] for root in roots}
    alone: list[Moments] = []
    for number in range(arguments.runs):
        for root in roots if number % 2 == 0 else roots[::-1]:
            runs[root].append(sweeps(root))
            print(f"{revision(root)}: {runs[root][-1]}", file=sys.stderr, flush=True)
        alone.append(bare())
        print(f"bare: {alone[-1]}", file=sys.stderr, flush=True)
    found = {
        revision(root): {name: summary([both[name] for both in of]) for name in _SWEEPS} for root, of in runs.items()
    }
    found["by themselves"] = {"Ray, torch, transformers": summary(alone)}
    print(table(found))
    if arguments.json is not None:
        result = {"benchmark": "start-up"} | machine() | {"runs": arguments.runs, "seconds until": found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
