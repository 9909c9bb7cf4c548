"""A sweep that writes down when it came to what: `python -P startup_watched.py BEGUN FILE OPTIONS...`, for `startup`.
It uses nothing of this checkout's, as the sweep may be another's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MOMENTS = (
    "Ray runs",
    "input checked",
    "worker's process",
    "worker loaded",
    "first quality",
    "first timing",
    "first trial",
    "both trials",
    "reference and baseline",
    "end",
)
PROCESSOR = "processor time"
"""Until a moment, of the sweep and all that it started: what other people's processes change less than the clock."""


def processor_seconds() -> float:
    """Of this process and all those under it, as far as they still run."""
    own = psutil.Process()
    found = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            found += times.user + times.system
    return found


class Watch:
    def __init__(self, begun: float) -> None:
        self._begun = begun
        self.moments: dict[str, float] = {}

    def note(self, name: str, again: bool = False) -> None:
        """again: the last time counts, else the first."""
        if again or name not in self.moments:
            self.moments[name] = time.time() - self._begun
            self.moments[f"{name}: {PROCESSOR}"] = processor_seconds()

    def after(self, owner: Any, name: str, moment: str) -> None:
        """Notes the moment when that function of a module or a class has returned."""
        before = getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            result = before(*arguments, **more)
            self.note(moment)
            return result

        setattr(owner, name, watched)


def main(begun: float, file: Path, options: list[str]) -> int:
    import orchestrator.sweep as sweep

    watch = Watch(begun)
    watch.after(sweep, "resolve", "input checked")
    import orchestrator.workers.cluster as cluster

    watch.after(cluster, "_vital", "Ray runs")
    _watch_lazily(watch)
    code = sweep.main(options)
    watch.note("end")
    file.write_text(json.dumps(watch.moments))
    return code


def _watch_lazily(watch: Watch) -> None:
    """What would import much: watched once the sweep itself has imported it."""
    import orchestrator.sweep as sweep

    introduce: Callable[..., None] = sweep._introduce

    def first(*arguments: Any) -> None:
        from orchestrator.driver import Driver
        from orchestrator.workers.pool import WorkerPool

        _watch_pool(watch, WorkerPool)
        _watch_driver(watch, Driver)
        introduce(*arguments)

    setattr(sweep, "_introduce", first)  # noqa: B010


def _watch_pool(watch: Watch, pool: Any) -> None:
    receive, submit, jobs = pool._receive, pool.submit, {}
    reached = {"pending": "worker's process", "loading": "worker loaded"}

    def received(self: Any, worker: int, *more: Any) -> Any:
        state = self._workers[worker].state
        result = receive(self, worker, *more)
        kind = {"quality": "first quality", "speed": "first timing"}.get(jobs.pop(worker, ""), "")
        if moment := reached.get(state, kind):
            watch.note(moment)
        return result

    def submitted(self: Any, worker: int, assignment: Any) -> None:
        jobs[worker] = assignment.job.kind
        submit(self, worker, assignment)

    pool._receive, pool.submit = received, submitted


def _watch_driver(watch: Watch, driver: Any) -> None:
    announce = driver._announce

    def announced(self: Any, row: Any) -> None:
        if isinstance(row["trial"], int):
            watch.note("first trial")
            watch.note("both trials", again=True)
        else:
            watch.note("reference and baseline", again=True)
        announce(self, row)

    driver._announce = announced


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
