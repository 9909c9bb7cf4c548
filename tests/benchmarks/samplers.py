"""Samplers compared on a space of which every point was measured (`space_table`): the share of the whole space's
hypervolume that is found, against timings and against the seconds that so many workers would have needed, the quality
of a policy measured once; and how often it was right that hardly anything was left (`--until`). With --pace, what ask
and tell cost as the trials of one study grow in number, the journal on disk.

python -m tests.benchmarks.samplers [--table FILE] [--seeds 15] [--trials 128] [--pace 10000] [--json FILE]
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
from streamllm.results.study import HARDLY

from .reporting import machine

HERE = Path(__file__).parent
TABLE = HERE / "results" / "space-testbed-cpu.json"
AFTER = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Timings after which the share of the hypervolume is taken."""
SHARES = (0.9, 0.99)
"""Of which it is taken when they are reached."""
QUALITY_SEC, SPEED_SEC = 3.0, 4.2
"""What a policy's quality and a configuration's speed take: medians of the README's own sweep, on two cores."""
_ALIKE = 5
"""Configurations at least, over which a tree averages."""
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


class MeasuredSpace:
    """Answers trials from the table, with its qualities, and with times that are off by some noise as timings are.

    The true times are the table's without its own noise: each is what a forest of trees, which knows nothing of how a
    cache works, makes of those that differ little."""

    def __init__(self, table: Path, noise: float) -> None:
        found = json.loads(table.read_text())
        self.space = load_space(str(HERE / found["space"]))
        self._names = [name for name, choices in self.space.parameters.items() if len(choices) > 1]
        rows = [
            row | {"time_ratio": time} for row, time in zip(found["rows"], self._smooth(found["rows"]), strict=True)
        ]
        self._rows = {tuple(row[name] for name in self._names): row for row in rows}
        self._directions = {told_name(name): OBJECTIVES[name] for name in self.space.objectives}
        self._middle = {name: median(row[name] for row in rows) for name in self._directions}
        self._all = self._volume(rows)
        self._noise = noise

    def _smooth(self, rows: Sequence[Row]) -> list[float]:
        from sklearn.ensemble import ExtraTreesRegressor

        choices = {name: self.space.parameters[name] for name in self._names}
        words = [name for name in choices if isinstance(choices[name][0], str)]
        columns = [
            [float(row[name] == choice) for name in words for choice in choices[name]]
            + [float(choices[name].index(row[name])) for name in choices if name not in words]
            for row in rows
        ]
        times = [math.log(row["time_ratio"]) for row in rows]
        forest = ExtraTreesRegressor(300, min_samples_leaf=_ALIKE, random_state=0).fit(columns, times)
        return [math.exp(time) for time in forest.predict(columns)]

    def row(self, trial: OpenTrial, chance: random.Random) -> TrialRow:
        measured = self.truth(trial.params)
        time = measured["time_ratio"] * math.exp(chance.gauss(0.0, self._noise))
        ends = {
            f"time_ratio_{end}": time * math.exp(sign * 1.96 * self._noise) for end, sign in (("low", -1), ("high", 1))
        }
        about = {"trial": trial.number, "state": "complete", "reference_tpot_ms": 1.0}
        return TrialRow.of(measured | about | {"time_ratio": time} | ends)

    def quality(self, look: Look) -> TrialRow:
        measured = self.truth(look.params)
        return TrialRow.of({name: measured[name] for name in self._directions if of_policy(name)})

    def truth(self, params: Mapping[str, Value]) -> Row:
        measured = self._rows[tuple(params[name] for name in self._names)]
        return {name: measured[name] for name in self._directions}

    def share(self, rows: Sequence[Row]) -> float:
        """Of the hypervolume that the whole space has, from the median of every objective: to be better is no feat."""
        return self._volume(rows) / self._all

    def _volume(self, rows: Sequence[Row]) -> float:
        return hypervolume([row | {"state": "complete"} for row in rows], self._directions, self._middle)


def search(
    study: Study,
    answer: Callable[[OpenTrial], Row],
    trials: int,
    workers: int,
    seed: int,
    told: Callable[[int, float], bool | None],
    quality: Callable[[Look], TrialRow] | None = None,
) -> None:
    """Asks and tells as so many workers would who measure side by side, each as long as it takes (`QUALITY_SEC`,
    `SPEED_SEC`, a fifth more or less). told: sees the number finished and the seconds since the start, and says whether
    that is enough. quality: of what is looked at; without it, nothing is."""
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
            if told(finished, now):
                return


def curve(measured: MeasuredSpace, sampler: str, seed: int, workers: int, trials: int) -> list[tuple[float, float]]:
    """After each trial: seconds, and the share of the hypervolume that is found."""
    found: list[tuple[float, float]] = []
    truths: list[Row] = []
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        study = Study("s", Path(folder) / "journal.log", measured.space, measured.space.cap, seed, sampler)

        def answer(trial: OpenTrial) -> TrialRow:
            truths.append(measured.truth(trial.params))
            return measured.row(trial, chance)

        def told(finished: int, seconds: float) -> None:
            found.append((seconds, measured.share(truths)))

        search(study, answer, trials, workers, seed, told, measured.quality)
    return found


def stops(measured: MeasuredSpace, share: float, seed: int) -> Row:
    """When `front` would stop, and what then was left."""
    truths: list[Row] = []
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        study = Study("s", Path(folder) / "journal.log", measured.space, measured.space.cap, seed, "front")

        def answer(trial: OpenTrial) -> TrialRow:
            truths.append(measured.truth(trial.params))
            return measured.row(trial, chance)

        def told(finished: int, seconds: float) -> bool:
            found = study.chance_of(share)
            return found is not None and found < HARDLY

        search(study, answer, measured.space.size, 1, seed, told, measured.quality)
    return {"timings": len(truths), "left": 1 / measured.share(truths) - 1}


def compare(measured: MeasuredSpace, samplers: Sequence[str], seeds: int, trials: int) -> list[Row]:
    rows = []
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
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help=f"(results/{TABLE.name})")
    parser.add_argument("--noise", type=float, default=0.02, metavar="SHARE", help="of a timing (0.02)")
    parser.add_argument("--until", type=float, metavar="SHARE", help="see when and how rightly front stops instead")
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--trials", type=int, default=128)
    parser.add_argument("--pace", type=int, metavar="N", help="time ask and tell up to N trials instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    samplers = arguments.samplers.split(",")
    if unknown := set(samplers) - set(SAMPLERS):
        parser.error(f"samplers {', '.join(unknown)}: must be of {', '.join(SAMPLERS)}")
    if arguments.pace:
        what, rows = "ask and tell", [pace(sampler, arguments.pace) for sampler in samplers]
    elif arguments.until:
        measured = MeasuredSpace(arguments.table, arguments.noise)
        what, rows = "when front stops", [stops(measured, arguments.until, seed) for seed in range(arguments.seeds)]
        right = sum(row["left"] < arguments.until for row in rows)
        timings, left = (spread([row[name] for row in rows]) for name in ("timings", "left"))
        print(
            f"less than {arguments.until:.1%} left in {right} of {len(rows)}: {left['median']:.2%} "
            f"[{left['low']:.2%}, {left['high']:.2%}] after {timings['median']:.0f} [{timings['low']}, "
            f"{timings['high']}] of {measured.space.size} timings"
        )
    else:
        what = "share of the hypervolume after so many trials"
        measured = MeasuredSpace(arguments.table, arguments.noise)
        rows = compare(measured, samplers, arguments.seeds, arguments.trials)
    if arguments.json is not None:
        about = {"benchmark": f"samplers: {what}", "table": arguments.table.name, "noise": arguments.noise}
        finite = json.loads(json.dumps(rows), parse_constant=lambda _: None)  # what was never reached
        arguments.json.write_text(json.dumps(machine() | about | {"rows": finite}, indent=1) + "\n")


if __name__ == "__main__":
    main()
