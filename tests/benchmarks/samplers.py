"""Samplers compared on a space of which every point was measured (samplers.yaml, results/samplers-space-cpu.json): the
share of the whole space's hypervolume that is found, against timings and against the seconds that so many workers would
have needed, the quality of a policy measured once. With --pace, what ask and tell cost as the trials of one study grow
in number, the journal on disk.

python -m tests.benchmarks.samplers [--seeds 5] [--trials 128] [--pace 10000] [--json FILE]
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.options import SAMPLERS
from orchestrator.search.front_sampler import of_policy
from orchestrator.search.study import Look, OpenTrial, Study
from search_spaces import SearchSpace, Value, load_space
from streamllm.results.front import hypervolume
from streamllm.results.schema import FIELDS, OBJECTIVES, told_name
from streamllm.results.schema import Row as TrialRow

HERE = Path(__file__).parent
SPACE = HERE / "samplers.yaml"
TABLE = HERE / "results" / "samplers-space-cpu.json"
STRICT = {"method": "ring", "n_sink": 4, "compress_every": 1, "cache_slack": 0, "max_drop": 0}
AFTER = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Timings after which the share of the hypervolume is taken."""
SHARES = (0.9, 0.99)
"""Of which it is taken when they are reached."""
QUALITY_SEC, SPEED_SEC = 3.2, 7.0
"""What a policy's quality and a configuration's speed take: medians of the README's own sweep, on two cores."""
PACED = """
parameters:
  method: [ring, ours, mit]
  attn_backend: [flash, math]
  n_sink: {low: 0, high: 64}
  compress_every: {low: 1, high: 128}
  cache_slack: {low: 0, high: 32}
  max_drop: {choices: [0, 1, 8, 32], when: {attn_backend: math}}
constraints: [ppl_increase_percent <= 3]
"""

Row = dict[str, Any]


def beside_strict(rows: Sequence[Row]) -> list[Row]:
    """The table has milliseconds alone, of a time when nothing was timed beside a reference: `time_ratio` is their
    quotient with the table's own row of strict StreamingLLM by the ring. One constant for all changes no order, and no
    share of a hypervolume."""
    (strict,) = (row for row in rows if all(row[name] == STRICT[name] for name in STRICT))
    ms = strict["tpot_ms"]
    return [row | {"time_ratio": row["tpot_ms"] / ms, "reference_tpot_ms": ms} for row in rows]


class MeasuredSpace:
    """Answers trials from the table."""

    def __init__(self) -> None:
        self.space = load_space(str(SPACE))
        rows = beside_strict(json.loads(TABLE.read_text())["rows"])
        names = [name for name, choices in self.space.parameters.items() if len(choices) > 1]
        self._rows = {tuple(row[name] for name in names): row for row in rows}
        self._names = names
        self._directions = {told_name(name): OBJECTIVES[name] for name in self.space.objectives}
        self._middle = {name: median(row[name] for row in rows) for name in self._directions}
        self._all = self._volume([row | {"state": "complete"} for row in rows])

    def row(self, trial: OpenTrial) -> TrialRow:
        measured = self._measured(trial.params)
        names = (*self._directions, "reference_tpot_ms")
        return TrialRow(trial=trial.number, state="complete") | {name: measured[name] for name in names}

    def quality(self, look: Look) -> TrialRow:
        measured = self._measured(look.params)
        return TrialRow.of({name: measured[name] for name in self._directions if of_policy(name)})

    def _measured(self, params: Mapping[str, Value]) -> Row:
        return self._rows[tuple(params[name] for name in self._names)]

    def share(self, rows: Sequence[Row]) -> float:
        """Of the hypervolume that the whole space has, from the median of every objective: to be better is no feat."""
        return self._volume(rows) / self._all

    def _volume(self, rows: Sequence[Row]) -> float:
        return hypervolume(rows, self._directions, self._middle)


def search(
    study: Study,
    answer: Callable[[OpenTrial], Row],
    trials: int,
    workers: int,
    seed: int,
    told: Callable[[int, float], None],
    quality: Callable[[Look], TrialRow] | None = None,
) -> None:
    """Asks and tells as so many workers would who measure side by side, each as long as it takes (`QUALITY_SEC`,
    `SPEED_SEC`, a fifth more or less); `told` sees the number finished, and the seconds since the start. quality: of
    what is looked at; without it, nothing is."""
    chance, known = random.Random(seed), set()
    running: list[tuple[float, int, OpenTrial | Look]] = []
    asked = finished = 0
    now = 0.0
    while finished < trials:
        while len(running) < workers and asked < trials:
            what = study.ask(may_look=quality is not None)
            if what is None:
                break
            policy = what.configuration.effective.canonical
            seconds = QUALITY_SEC * (policy not in known)
            known.add(policy)
            if isinstance(what, OpenTrial):
                seconds += SPEED_SEC
                asked += 1
            heapq.heappush(running, (now + seconds * chance.uniform(0.8, 1.2), chance.getrandbits(40), what))
        if not running:
            return
        now, _, what = heapq.heappop(running)
        if isinstance(what, Look):
            assert quality is not None
            study.looked(what, quality(what))
        else:
            study.tell(what.number, answer(what))
            finished += 1
            told(finished, now)


def curve(measured: MeasuredSpace, sampler: str, seed: int, workers: int, trials: int) -> list[tuple[float, float]]:
    """After each trial: seconds, and the share of the hypervolume."""
    found: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        study = Study("s", Path(folder) / "journal.log", measured.space, measured.space.cap, seed, sampler)

        def told(finished: int, seconds: float) -> None:
            found.append((seconds, measured.share(study.rows)))

        search(study, measured.row, trials, workers, seed, told, measured.quality)
    return found


def compare(samplers: Sequence[str], seeds: int, trials: int) -> list[Row]:
    measured, rows = MeasuredSpace(), []
    for workers, sampler in product((1, 2, 8), samplers):
        started = time.perf_counter()
        curves = [curve(measured, sampler, seed, workers, trials) for seed in range(seeds)]
        spent = (time.perf_counter() - started) / seeds / trials
        row: Row = {"sampler": sampler, "workers": workers, "ms per trial": 1e3 * spent}
        for after in (after for after in AFTER if after <= trials):
            row[str(after)] = spread([one[after - 1][1] for one in curves])
        for share in SHARES:
            row[f"{share:.0%} after"] = {
                "timings": spread([_reached(one, share, lambda place, _: place + 1) for one in curves]),
                "seconds": spread([_reached(one, share, lambda _, seconds: seconds) for one in curves]),
            }
        rows.append(row)
        shown = "  ".join(f"{after}: {row[str(after)]['median']:.0%}" for after in AFTER if after <= trials)
        times = "  ".join(f"{share:.0%}: {row[f'{share:.0%} after']['seconds']['median']:.0f} s" for share in SHARES)
        print(f"{sampler:7} {workers} workers  {row['ms per trial']:6.1f} ms/trial  {shown}   {times}", flush=True)
    return rows


def spread(values: Sequence[float]) -> Row:
    ordered = sorted(values)
    return {"median": median(ordered), "low": ordered[0], "high": ordered[-1], "all": list(values)}


def _reached(curve: Sequence[tuple[float, float]], share: float, what: Callable[[int, float], float]) -> float:
    return next((what(place, seconds) for place, (seconds, there) in enumerate(curve) if there >= share), math.inf)


def pace(sampler: str, trials: int, in_flight: int = 64, parts: int = 10) -> Row:
    """Milliseconds per ask and tell, of the wall clock and of this process, in each part of a study; and the seconds it
    takes to open it again."""

    def answer(trial: OpenTrial) -> TrialRow:
        params, noise = trial.params, random.Random(trial.number)
        cost = 8 / (1 + params["n_sink"]) + 0.02 * params["compress_every"] + noise.random() - 1
        values = {
            "trial": trial.number,
            "state": "complete",
            "time_ratio": 1 + 0.01 * params["n_sink"] + 2 / params["compress_every"] + 0.1 * noise.random(),
            "reference_tpot_ms": 10 + noise.random(),
            "ppl_vs_strict_percent": cost,
            "ppl_increase_percent": cost + 1,
        }
        others = [name for name, field in FIELDS.items() if field.mlflow == "metric" and name not in values]
        return TrialRow.of(values | {name: noise.random() for name in others})  # rows are as long as real ones

    with tempfile.TemporaryDirectory() as folder:
        journal, file = Path(folder) / "journal.log", Path(folder) / "paced.yaml"
        file.write_text(PACED)
        space: SearchSpace = load_space(str(file))
        marks = [(time.perf_counter(), time.process_time())]

        def told(finished: int, _: float) -> None:
            if finished % (trials // parts) == 0:
                marks.append((time.perf_counter(), time.process_time()))
                wall, process = (1e3 * (marks[-1][i] - marks[-2][i]) / (trials // parts) for i in (0, 1))
                print(f"{sampler:7} to trial {finished:6}  {wall:6.2f} ms, {process:6.2f} ms of CPU", flush=True)

        search(Study("s", journal, space, space.cap, 0, sampler), answer, trials, in_flight, 0, told)
        size, started = journal.stat().st_size, time.perf_counter()
        again = Study("s", journal, space, space.cap, 0, sampler)
        resumed = time.perf_counter() - started
        assert len(again.rows) == trials
    walls, processes = ([1e3 * (b[i] - a[i]) / (trials // parts) for a, b in pairwise(marks)] for i in (0, 1))
    print(f"{sampler:7} opened again in {resumed:.1f} s, journal of {size / 2**20:.0f} MB")
    return {
        "sampler": sampler,
        "in flight": in_flight,
        "trials": trials,
        "ms per trial": walls,
        "CPU ms per trial": processes,
        "resume sec": resumed,
        "journal bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samplers", default="front,tpe,nsga2,gp,qmc,random,grid", help="those to compare")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=128)
    parser.add_argument("--pace", type=int, metavar="N", help="time ask and tell up to N trials instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    samplers = arguments.samplers.split(",")
    if unknown := set(samplers) - set(SAMPLERS):
        parser.error(f"samplers {', '.join(unknown)}: must be of {', '.join(SAMPLERS)}")
    if arguments.pace:
        rows = [pace(sampler, arguments.pace) for sampler in samplers]
    else:
        rows = compare(samplers, arguments.seeds, arguments.trials)
    if arguments.json is not None:
        what = "ask and tell" if arguments.pace else "share of the hypervolume after so many trials"
        arguments.json.write_text(json.dumps({"benchmark": f"samplers: {what}", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
