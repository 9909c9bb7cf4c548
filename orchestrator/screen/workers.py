"""What each worker does, as long as it is shown."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from streamllm.measuring.jobs import Job
from streamllm.terminal.progress import LINE_SEC, regularly

from ..workers.messages import WorkerDescription

SHOWN = 8
"""Workers shown one by one; of more, how many do what."""


class Doings:
    """Of all workers, by number."""

    def __init__(self) -> None:
        self._doing: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._doing)

    def __str__(self) -> str:
        doing = "; ".join(f"worker {worker}: {what}" for worker, what in sorted(self._doing.items())[:SHOWN])
        return doing or "workers are starting"

    def set(self, worker: int, what: str = "idle") -> None:
        self._doing[worker] = what

    def table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        if not self._doing:
            table.add_row("workers are starting")
        elif len(self._doing) <= SHOWN:
            for worker, doing in sorted(self._doing.items()):
                table.add_row(f"worker {worker}", doing)
        else:
            idle = sum(doing == "idle" for doing in self._doing.values())
            table.add_row(f"{len(self._doing)} workers", f"{len(self._doing) - idle} measure, {idle} idle")
        return table


def described(description: WorkerDescription) -> str:
    """Where a worker is."""
    where = f"GPU {description['visible_devices']}, " if description["visible_devices"] else ""
    cores = ",".join(map(str, description["cores"])) or "all"
    return f"{where}{description['conditions'].kind['device']}, cores {cores}"


class WorkersView:
    """The workers below the lines of a log on a terminal; elsewhere a line now and then. `say` is given lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._doings = Doings()
        self._shown = ExitStack()
        self._console = Console(stderr=True, highlight=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            live = Live(console=self._console, get_renderable=self._doings.table, refresh_per_second=4, transient=True)
            self._shown.enter_context(live)
        else:
            self._shown.enter_context(regularly(lambda: self._say(str(self._doings)), LINE_SEC))
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def worker_ready(self, worker: int, description: WorkerDescription) -> None:
        self._doings.set(worker)
        self._say(f"worker {worker}: {described(description)}")

    def worker_idle(self, worker: int) -> None:
        self._doings.set(worker)

    def job_started(self, worker: int, job: Job) -> None:
        self._doings.set(worker, str(job))
