"""Kills the parts of sweeps at random moments: `python -m tests.fuzz.kills --rounds 30 --seed 1`.

A round is a study of its own, a search or a matrix. One of its processes is killed once, whatever it is doing; the
command is given again as long as it does not end well. Then every trial must be there once: in the study, in the store
and in MLflow. Workers measure nothing, slowly; Ray, the journal, the store and MLflow's database are real.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.mortal_sweep import run
from tests.preloaded import context

GOLDEN = Path(__file__).parents[1] / "golden"
SPACE = "cap: 48\nparameters: {method: [ours, mit], n_sink: [0, 1, 2, 4], compress_every: [1, 2, 4]}\n"
TRIALS = 24
MATRIX = "cap: 48\nmatrix: {method: [ours, mit, recompute], n_sink: [0, 1, 2, 4], compress_every: [1, 2]}\n"
_ARGUMENTS = ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--space", "space.yaml"]
_ARGUMENTS += ["--study", "s", "--workers", "2", "--confirm", "1"]
KINDS = {"search": (SPACE, [*_ARGUMENTS, "--trials", str(TRIALS)]), "matrix": (MATRIX, _ARGUMENTS)}
"""A space's file, and the arguments of the command; of either there are `TRIALS` in all."""
TARGETS = {
    "driver": ("", signal.SIGKILL),
    "driver, Ctrl-C": ("", signal.SIGINT),
    "driver, terminated": ("", signal.SIGTERM),
    "all, hung up": ("group", signal.SIGHUP),
    "all, terminated": ("group", signal.SIGTERM),
    "a worker": ("ray::Slow", signal.SIGKILL),
    "MLflow's follower": ("spawn_main", signal.SIGKILL),
    "Ray's head": ("gcs_server", signal.SIGKILL),
    "the node's raylet": ("raylet/raylet", signal.SIGKILL),
}
_LATEST_SEC = 12.0
_LIMIT_SEC = 300.0
_STARTS = 4


@dataclass(frozen=True)
class Round:
    kind: str
    target: str
    was_there: bool
    """Whether there was such a process then."""
    finished: int
    """Trials, when the command had ended for the first time."""
    codes: list[int]
    """Exit codes, start after start."""
    wrong: list[str]


def descendants(pid: int) -> list[tuple[int, str]]:
    """Processes under this one, and their command lines."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in path.read_text().split()]
        except OSError:
            continue
        for child in children:
            try:
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found += [(child, line), *descendants(child)]
    return found


def kill(driver: int, target: str, choose: random.Random) -> bool:
    pattern, number = TARGETS[target]
    try:
        if pattern == "group":
            os.killpg(driver, number)
            return True
        own = [pid for pid, line in descendants(driver) if pattern in line] if pattern else [driver]
        if not own:
            return False
        os.kill(choose.choice(own), number)
    except ProcessLookupError:
        return False
    return True


def play(
    folder: Path, database: Path, target: str, is_time: Callable[[], bool], choose: random.Random, kind: str = "search"
) -> Round:
    """One round, in that empty folder, with a copy of an empty database of MLflow."""
    space, command = KINDS[kind]
    (folder / "space.yaml").write_text(space)
    shutil.copyfile(database, folder / "mlflow.db")
    codes: list[int] = []
    wrong: list[str] = []
    finished, was_there = 0, False
    stored: dict[Path, int] = {}
    while len(codes) < _STARTS and (not codes or codes[-1] != 0):
        process = context().Process(target=run, args=("never", folder, command))
        process.start()
        if not codes:
            while process.is_alive() and not is_time():
                time.sleep(0.05)
            was_there = process.is_alive() and kill(process.pid or 0, target, choose)
        process.join(_LIMIT_SEC)
        if process.is_alive():
            wrong.append(f"start {len(codes) + 1} had not ended after {_LIMIT_SEC:g} s")
            process.kill()
            process.join()
        codes.append(process.exitcode or 0)
        said = "".join(path.read_text() for path in (folder / "stdout", folder / "stderr") if path.is_file())
        if any(word in said for word in ("Traceback", "*** SIG", "(raylet)")):
            wrong.append(f"start {len(codes)} said: {said[-2000:]}")
        now = {path: path.stat().st_mtime_ns for path in (folder / "sweeps/.store").rglob("*.json")}
        if any(now.get(path) != at for path, at in stored.items()):
            wrong.append(f"start {len(codes)} measured something again")
        stored = now
        if len(codes) == 1:
            finished = len(set(rows_of(folder)) - {"strict", "baseline"})
    if codes[-1] != 0:
        wrong.append(f"it did not end well in {_STARTS} starts")
    else:
        wrong += check(folder, kind)
    return Round(kind, target, was_there, finished, codes, wrong)


def rows_of(folder: Path) -> list[str]:
    path = folder / "sweeps/s/trials.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [str(json.loads(line)["trial"]) for line in lines if line.endswith("\n")]


def check(folder: Path, kind: str) -> list[str]:
    """All that is not as it should be, after the end."""
    from mlflow import MlflowClient

    from streamllm.results.study import load_study

    wrong = []
    numbers = [str(number) for number in range(TRIALS)]
    rows = [trial for trial in rows_of(folder) if trial not in ("strict", "baseline")]
    if set(rows) != set(numbers) or (kind == "search" and len(rows) != TRIALS):  # a matrix' rounds make rows anew
        wrong.append(f"trials.jsonl has {Counter(rows)}")
    study = load_study(str(folder / "sweeps/s"))
    told = {(row["method"], row["n_sink"], row["compress_every"], row.get("cell")) for row in study.trials}
    if len(told) != TRIALS:
        wrong.append("a configuration is there twice")
    entries = len([*(folder / "sweeps/.store").rglob("*.json")])
    if entries < TRIALS:
        wrong.append(f"the store has {entries} entries")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    trials = Counter(run.data.tags.get("trial", "parent") for run in runs)
    fixed = ["strict", "baseline"] if kind == "search" else []
    if trials != Counter([*numbers, *fixed, "parent"]):
        wrong.append(f"MLflow has {trials}")
    ends = Counter(run.info.status for run in runs)
    if set(ends) != {"FINISHED"}:
        wrong.append(f"MLflow's runs are {ends}")
    cells = [json.loads(path.read_text()) for path in (folder / "sweeps/s/results").glob("*.json")]
    if kind == "matrix" and [cell["state"] for cell in cells] != ["complete"] * TRIALS:
        wrong.append(f"cells are {Counter(cell['state'] for cell in cells)}")
    left = [path for path in folder.rglob("*") if path.name.endswith(".new")]
    if left:
        wrong.append(f"left behind: {left}")
    return wrong


def empty_database(folder: Path) -> Path:
    """MLflow takes seconds to make one."""
    from mlflow import MlflowClient

    path = folder / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def table(rounds: list[Round]) -> str:
    lines = [f"{'':6} {'killed':20} {'rounds':>6} {'hit':>4} {'finished at the kill':>21} {'exit codes':24} wrong"]
    for kind, target in itertools.product(KINDS, TARGETS):
        mine = [one for one in rounds if (one.kind, one.target) == (kind, target)]
        if mine:
            at = [one.finished for one in mine if one.was_there]
            codes = ", ".join(f"{code}" for code in sorted({one.codes[0] for one in mine}))
            reach = f"{min(at)} to {max(at)}" if at else "-"
            lines.append(
                f"{kind:6} {target:20} {len(mine):6} {sum(one.was_there for one in mine):4} {reach:>21} {codes:24} "
                f"{sum(bool(one.wrong) for one in mine)}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="round to begin with")
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        database = empty_database(Path(name))
        for number in range(arguments.first, arguments.rounds):
            choose = random.Random(f"{arguments.seed} {number}")
            kind, target = [*KINDS][number % len(KINDS)], [*TARGETS][number % len(TARGETS)]
            folder = Path(name) / str(number)
            folder.mkdir()
            started = time.monotonic()
            after = choose.uniform(0.5, _LATEST_SEC)
            one = play(folder, database, target, lambda at=started + after: time.monotonic() > at, choose, kind)
            rounds.append(one)
            print(
                f"round {number}: {kind}, {target} after {after:.1f} s{'' if one.was_there else ' (not there)'}, "
                f"{one.finished} finished, exit {one.codes}, {time.monotonic() - started:.0f} s, load "
                f"{os.getloadavg()[0]:.1f}: {'; '.join(one.wrong) or 'all there once'}",
                flush=True,
            )
            shutil.rmtree(folder, ignore_errors=True)
    print(table(rounds))
    return int(any(one.wrong for one in rounds))


if __name__ == "__main__":
    sys.exit(main())
