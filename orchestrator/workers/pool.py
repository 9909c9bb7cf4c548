"""The pool: Ray actors that each own one accelerator, or a share of the cores, and measure one job at a time.

A worker waits to be scheduled, loads, then measures. Whatever ends it (its process, its node, a deadline), another is
started in its place; Ray decides where.
"""

from __future__ import annotations

import itertools
import os
import queue
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

from streamllm.errors import UnavailableError, UnsupportedModelError, UsageError, one_line
from streamllm.measuring.conditions import Conditions
from streamllm.measuring.store import Arrays, Measurement

from ..configuration import WorkerSettings
from .accelerators import ONE_EACH
from .cluster import Cluster
from .lease import this_process
from .messages import (
    Assignment,
    SweepError,
    Variant,
    WorkerDescription,
    WorkerPlace,
    WorkerSetup,
    WorkerUnusableError,
)
from .room import Room
from .worker import Worker

if TYPE_CHECKING:
    from streamllm.measuring.text import TokenStream

_DEATHS_IN_A_ROW = 3
"""Deaths without being ready in between after which a worker is not started again."""
_LEAST_TRIAL_TIMEOUT = 3600.0
_TIMES_THE_SLOWEST = 10
_PENDING_NOTE_SEC = 15.0
_PENDING_END_SEC = 120.0
"""After which a cluster that has nothing to run any worker on ends the sweep."""
_LOADING_NOTE_SEC = 60.0
_LOOK_SEC = 1.0
_GROW_SEC = 5.0
_LENT = 4
"""Arrays that Ray keeps at a time: of a text and a total each, at most 256 MiB of each reference."""


Answer = WorkerPlace | WorkerDescription | Conditions | Measurement


class _Promise(Protocol):
    """Ray's reference to what a call will return."""

    def future(self) -> Future[Answer]: ...


class _Method(Protocol):
    def remote(self, *arguments: object) -> _Promise: ...


class _Actor(Protocol):
    """Ray's handle of a `Worker`."""

    place: _Method
    load: _Method
    conditions: _Method
    measure: _Method


@dataclass(frozen=True, slots=True)
class Finished:
    """A worker's answer: a description of itself when it became ready, what it was asked for, or why there is none."""

    worker: int
    description: WorkerDescription | None = None
    conditions: Conditions | None = None
    measurement: Measurement | None = None
    error: str | None = None
    unavailable: bool = False
    """What was asked for cannot be had, here or with this model: no failure."""
    died: bool = False
    lost: bool = False
    """It died so often that no other was started in its place."""


@dataclass(slots=True)
class _Worker:
    actor: _Actor
    state: Literal["pending", "loading", "idle", "measuring", "lost"]
    since: float
    """When it came into that state, by the monotonic clock."""
    call: int
    """Its last call; answers to others are of a process that is no more."""
    deaths: int
    host: str = "?"
    noted: bool = False
    """Whether the user has been told that this state lasts."""


class WorkerPool:
    """Starts workers and passes jobs to them.

    A `count` of 0 is one per accelerator, or per `cpus` cores where there is none, and as many more as the cluster
    grows by. `note` is given lines for the user. Raises UsageError.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        settings: WorkerSettings,
        *,
        note: Callable[[str], None] = lambda _: None,
        worker_class: type[Worker] = Worker,
    ) -> None:
        import ray

        self._ray = ray
        self._cluster = Cluster.join(settings.address)
        self._setup = setup
        self._count = settings.count
        self.trial_timeout = settings.trial_timeout
        self._load_timeout = settings.load_timeout
        self._note = note
        self._class = worker_class
        self._slowest = 0.0
        self._texts: dict[str, object] = {}
        """Ray's references to them, by digest."""
        self._lent: OrderedDict[tuple[str, ...], object] = OrderedDict()
        """Ray's references to arrays, by their names, those wanted last at the end."""
        self._workers: dict[int, _Worker] = {}
        self._answers: queue.SimpleQueue[tuple[int, int, Future[Answer]]] = queue.SimpleQueue()
        self._calls = itertools.count()
        self._looked = self._grown = self._able = time.monotonic()
        self._next_note_sec = _PENDING_NOTE_SEC
        try:
            self._room = Room.of(self._cluster.nodes(), settings)
            for index in range(self._count or self._capacity()):
                self._start(index)
        except BaseException:
            self.shutdown()
            raise

    def share(self, text: TokenStream) -> None:
        """Lets workers have the text of that digest: it is sent once to each node."""
        self._texts[text.digest] = self._ray.put(text)

    def lend(self, names: Sequence[str], arrays: Callable[[str], Arrays]) -> None:
        """Lets jobs be measured `against` the arrays of those names: they are sent once to each node, and kept until
        others have been wanted for long."""
        key = tuple(names)
        if key not in self._lent:
            self._lent[key] = self._ray.put([arrays(name) for name in key])
        self._lent.move_to_end(key)
        while len(self._lent) > _LENT:
            self._lent.popitem(last=False)

    def submit(self, worker: int, assignment: Assignment) -> None:
        sent = [assignment, self._texts[assignment.subject.text]]
        if assignment.job.against:
            sent.append(self._lent[assignment.job.against])
        self._call(worker, "measuring", self._workers[worker].actor.measure, *sent)

    def ask_conditions(self, worker: int, variant: Variant) -> None:
        """Has it load the model as that variant, to say under which conditions it would measure."""
        self._call(worker, "measuring", self._workers[worker].actor.conditions, variant)

    def host(self, worker: int) -> str:
        return self._workers[worker].host

    def wait(self, timeout: float) -> Iterator[Finished]:
        """Everything that finished within `timeout` seconds, all that is there at once. Raises SweepError if no worker
        is left, the store is full or Ray has ended."""
        yield from self._look_after()
        with suppress(queue.Empty):
            answer = self._answers.get(timeout=timeout)
            while True:
                if (finished := self._receive(*answer)) is not None:
                    yield finished
                answer = self._answers.get_nowait()

    def shutdown(self) -> None:
        """Ends Ray, if it was started here; otherwise only its own workers."""
        if self._cluster.was_there:
            for worker in self._workers.values():
                self._kill(worker)
        self._cluster.leave()

    def _start(self, index: int, deaths: int = 0) -> None:
        actor = self._ray.remote(self._class).options(
            num_gpus=1 if self._room.on_accelerators else 0,
            num_cpus=0 if self._room.on_accelerators else self._room.cores,
            name=None,
            runtime_env={"env_vars": _of_openmp() | ONE_EACH | {"OMP_NUM_THREADS": str(self._room.cores)}},
        )
        handle: _Actor = actor.remote(self._setup, self._room.cores, this_process(), self._room.on_accelerators)
        self._workers[index] = _Worker(handle, "pending", 0.0, -1, deaths)
        self._call(index, "pending", handle.place)

    def _call(
        self, index: int, state: Literal["pending", "loading", "measuring"], method: _Method, *arguments: object
    ) -> None:
        worker = self._workers[index]
        call = worker.call = next(self._calls)
        _enter(worker, state)
        future = method.remote(*arguments).future()
        future.add_done_callback(lambda done: self._answers.put((index, call, done)))

    def _receive(self, index: int, call: int, answer: Future[Answer]) -> Finished | None:
        worker = self._workers[index]
        if call != worker.call:
            return None
        error = answer.exception()
        if error is not None:
            return self._failure(index, error)
        value = answer.result()
        if isinstance(value, Measurement | Conditions):
            worker.deaths = 0
            took = _enter(worker, "idle")
            if isinstance(value, Conditions):
                return Finished(index, conditions=value)
            self._slowest = max(self._slowest, took)
            return Finished(index, measurement=value)
        if worker.state == "pending":
            worker.host = value["host"]
            self._call(index, "loading", worker.actor.load)
            return None
        worker.deaths = 0
        _enter(worker, "idle")
        return Finished(index, description=cast(WorkerDescription, value))

    def _failure(self, index: int, error: BaseException) -> Finished:
        """A method that raised, or a worker that is no more."""
        worker = self._workers[index]
        if not isinstance(error, self._ray.exceptions.RayTaskError):
            return self._died(index, _why_died(error))
        cause = error.cause
        if isinstance(cause, WorkerUnusableError):
            return self._died(index, str(cause))
        if worker.state != "measuring" and not isinstance(cause, UsageError):
            return self._died(index, one_line(cause))
        worker.deaths = 0
        is_loading = worker.state == "loading"  # what is wrong then ends the sweep, and is said in full
        _enter(worker, "idle")
        if not is_loading:
            is_unavailable = isinstance(cause, UnavailableError | UnsupportedModelError)
            reason = " ".join(str(cause).split()) if is_unavailable else one_line(cause)
            return Finished(index, error=reason, unavailable=is_unavailable)
        where = f"on {worker.host}: " * (worker.host != socket.gethostname())
        return Finished(index, error=f"{where}{cause}")

    def _died(self, index: int, reason: str) -> Finished:
        """Starts another in its place, unless it keeps dying. Raises SweepError if no worker is left."""
        worker = self._workers[index]
        self._kill(worker)
        deaths = worker.deaths + 1
        lost = deaths == _DEATHS_IN_A_ROW
        self._note(f"worker {index} on {worker.host}: {reason}; {'not started again' if lost else 'starting another'}")
        if lost:
            worker.call = -1
            _enter(worker, "lost")
        else:
            self._start(index, deaths)
        if all(worker.state == "lost" for worker in self._workers.values()):
            raise SweepError(f"no worker is left: {reason}")
        return Finished(index, error=reason, died=True, lost=lost)

    def _kill(self, worker: _Worker) -> None:
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(worker.actor)

    def _look_after(self) -> Iterator[Finished]:
        """Now and then: grows with the cluster, ends what is overdue, says what is being waited for."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SEC:
            return
        self._looked = now
        self._cluster.check()
        if self._count == 0 and now - self._grown > _GROW_SEC:
            self._grown = now
            for index in range(len(self._workers), self._capacity()):
                self._start(index)
        self._explain(now)
        for index in [i for i, worker in self._workers.items() if worker.state == "loading"]:
            yield from self._loading(index, now)
        yield from self._overdue(now)

    def _explain(self, now: float) -> None:
        """Says what pending workers wait for. Raises SweepError if the cluster has had nothing for any for long."""
        pending = [worker for worker in self._workers.values() if worker.state == "pending"]
        longest = max((now - worker.since for worker in pending), default=0.0)
        if not pending:
            self._next_note_sec = _PENDING_NOTE_SEC
        elif longest > self._next_note_sec:
            self._next_note_sec = 4 * longest
            who = f"{len(pending)} of {len(self._workers)} workers"
            self._note(f"waiting for {self._room.asks} for each of {who}: {self._resources()}")
        up = any(worker.state not in ("pending", "lost") for worker in self._workers.values())
        if up or self._capacity():
            self._able = now
        elif now - self._able > _PENDING_END_SEC:
            raise SweepError(f"no worker can be started: each needs {self._room.asks}, and {self._resources()}")

    def _capacity(self) -> int:
        """How many workers the cluster as it is now has room for."""
        return self._room.workers(self._cluster.nodes())

    def _resources(self) -> str:
        name = self._room.resource
        return f"the cluster has {self._cluster.total(name)}, of which {self._cluster.free(name):g} free"

    def _loading(self, index: int, now: float) -> Iterator[Finished]:
        worker = self._workers[index]
        seconds = now - worker.since
        if seconds > self._load_timeout:
            yield self._died(index, f"not ready within {self._load_timeout:g} s")
        elif seconds > _LOADING_NOTE_SEC and not worker.noted:
            worker.noted = True
            self._note(f"worker {index} on {worker.host}: still loading; it has {self._load_timeout:g} s for it")

    def _overdue(self, now: float) -> Iterator[Finished]:
        """Ends the first of every host's overdue trials; the others may only be waiting for it to end its timing."""
        limit = self.trial_timeout or max(_LEAST_TRIAL_TIMEOUT, _TIMES_THE_SLOWEST * self._slowest)
        measuring = [(w.call, i) for i, w in self._workers.items() if w.state == "measuring"]
        for host in {w.host for _, i in measuring if now - (w := self._workers[i]).since > limit}:
            first, *others = sorted((call, i) for call, i in measuring if self._workers[i].host == host)
            for _, i in others:
                self._workers[i].since = now
            yield self._died(first[1], f"no answer within {limit:g} s")


def _of_openmp() -> dict[str, str]:
    """Variables that are read when a process starts, if this one has them: a node of a cluster does not inherit its
    environment."""
    names = ("OMP_WAIT_POLICY", "ATEN_CPU_CAPABILITY")
    return {name: os.environ[name] for name in names if name in os.environ}


def settings_for_workers() -> dict[str, str]:
    """Variables that a run needs wherever it measures: ours, those of `.env` among them, and Hugging Face's."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "FLASH_SDPA" or name.startswith(("STREAMLLM_", "HF_"))
    }


def _enter(worker: _Worker, state: Literal["pending", "loading", "idle", "measuring", "lost"]) -> float:
    """How long it was in the state before, in seconds."""
    now = time.monotonic()
    took, worker.state, worker.since, worker.noted = now - worker.since, state, now, False
    return took


def _why_died(error: BaseException) -> str:
    """Ray explains a death in a paragraph; the one cause that a user can do something about is its memory monitor."""
    if type(error).__name__ == "OutOfMemoryError" or "running low on memory" in str(error):
        return "the worker died: out of memory, Ray ended it before the node's memory was full"
    detail = re.search(r"Worker exit detail: ([^\n.]*)", str(error))
    return f"the worker died ({detail[1] if detail else type(error).__name__})"
