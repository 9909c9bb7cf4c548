"""The scheduler: runs plans. What their jobs measure is read from the store or, once however many ask for it, measured
by a worker: a quality anywhere, a time where nothing disturbs it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

from streamllm.engine.methods import METHODS
from streamllm.errors import UnavailableError, UsageError
from streamllm.measuring.conditions import Conditions
from streamllm.measuring.done import Done
from streamllm.measuring.jobs import Job, Plan
from streamllm.measuring.keys import Keys
from streamllm.measuring.store import Arrays, Measurement, MeasurementStore, StoreError, code_digest, entry_name
from streamllm.measuring.text import TokenStream

from .nodes import Member, Node
from .waiting import JobError, Running, Waiting, Wanted
from .workers.kinds import Kind, kind_of
from .workers.messages import Assignment, Subject, SweepError, Variant, WorkerDescription
from .workers.pool import Finished

if TYPE_CHECKING:
    from streamllm.measuring.plans import Evaluated

T = TypeVar("T")

_DEATHS = 2
"""Workers that end on a job before it counts as failed."""
_LOOK_AHEAD = 32
"""Jobs among which a worker finds one of a model that it has loaded."""


class Pool(Protocol):
    """Workers, by number."""

    def share(self, text: TokenStream) -> None: ...

    def submit(self, worker: int, assignment: Assignment) -> None: ...

    def lend(self, names: Sequence[str], arrays: Callable[[str], Arrays]) -> None: ...

    def ask_conditions(self, worker: int, variant: Variant) -> None: ...

    def wait(self, timeout: float) -> Iterable[Finished]: ...


class Watcher(Protocol):
    """Is told what workers do."""

    def worker_ready(self, worker: int, description: WorkerDescription) -> None: ...

    def job_started(self, worker: int, job: Job) -> None: ...

    def worker_idle(self, worker: int) -> None: ...


class Turns(Protocol):
    """Says whether accelerators of one node are timed one after the other, or side by side."""

    def side_by_side(self, kind: Kind, workers: int) -> bool:
        """Of so many workers of that kind, on one node."""

    def look(self, scheduler: Scheduler) -> None:
        """Is called again and again while the scheduler works."""


class InTurn:
    """One after the other."""

    def side_by_side(self, kind: Kind, workers: int) -> bool:
        return False

    def look(self, scheduler: Scheduler) -> None:
        pass


class Scheduler:
    def __init__(
        self,
        pool: Pool,
        store: MeasurementStore,
        first: Variant,
        note: Callable[[str], None] = lambda _: None,
        watchers: Sequence[Watcher] = (),
        check: Callable[[int, WorkerDescription], bool] = lambda *_: True,
        turns: Turns | None = None,
    ) -> None:
        """first: as which workers load the model. check: whether a worker that is new may take part; may
        raise. turns: of accelerators; None: one of a node is timed at a time."""
        self._turns = turns or InTurn()
        self._pool = pool
        self._store = store
        self._first = first
        self._note = note
        self._watchers = watchers
        self._check = check
        self._texts: dict[str, TokenStream] = {}
        self._conditions: dict[tuple[str, Variant], Conditions] = {}
        """Of workers that have the same with the model as loaded first."""
        self._nodes: dict[str, Node] = {}
        self._members: dict[int, Member] = {}
        self._hosts: dict[int, str] = {}
        """Of workers, those that are no more included."""
        self._starting: set[int] = set()
        """Workers that died, in whose place others are started."""
        self._waiting = Waiting(self._enqueue)
        self._computing: deque[Wanted] = deque()
        self._timing: deque[Wanted] = deque()
        self._staying: deque[Wanted] = deque()
        """Jobs of plans that one worker measures all of."""
        self._measuring: dict[str, list[Wanted]] = {}
        """Who waits for what is being measured, by its name in the store."""

    @property
    def ready(self) -> int:
        """Workers that can measure."""
        return len(self._members)

    @property
    def is_restarting(self) -> bool:
        """Whether some worker is being started in place of one that died."""
        return bool(self._starting)

    @property
    def has_idle(self) -> bool:
        """Whether some worker has nothing to do, nor waits for what is reserved for it."""
        return any(member.doing is None and not member.holds(worker) for worker, member in self._members.items())

    @property
    def is_working(self) -> bool:
        """Whether anybody waits for results that is not only trying out a worker."""
        return not self._waiting.is_empty

    def members(self) -> dict[Kind, dict[str, list[int]]]:
        """The workers that are ready: by kind, and by machine."""
        found: dict[Kind, dict[str, list[int]]] = {}
        for name, node in self._nodes.items():
            for worker, member in self._members.items():
                if member.node is node:
                    found.setdefault(member.kind, {}).setdefault(name, []).append(worker)
        return found

    def host_of(self, worker: int | None) -> str | None:
        """The machine that the worker is on, or was."""
        return None if worker is None else self._hosts.get(worker)

    @property
    def timed_in_turn(self) -> int:
        """Workers at most that wait for one another's timings."""
        counts = (1 if self._is_side_by_side(node) else node.workers.total() for node in self._nodes.values())
        return max(counts, default=0)

    def accelerators(self) -> dict[str, tuple[Kind, list[int]]]:
        """The machines whose workers are accelerators of one kind: that kind, and the workers."""
        found: dict[str, tuple[Kind, list[int]]] = {}
        for kind, hosts in self.members().items():
            alike = {h: w for h, w in hosts.items() if not self._nodes[h].is_cpu and len(self._nodes[h].workers) == 1}
            found |= {host: (kind, workers) for host, workers in alike.items()}
        return found

    def next_timing(self) -> Assignment | None:
        """One that waits for its turn, and is not to be alone in any case."""
        waiting = (wanted.assignment for wanted in self._timing if wanted.plans and not wanted.job.run)
        return next(waiting, None)

    def keep(self, evaluated: Evaluated) -> None:
        """Keeps a sample's losses as one. Raises SweepError."""
        from streamllm.measuring.plans import keep_sample

        with _storing():
            keep_sample(self._store, evaluated)

    def share(self, text: TokenStream) -> None:
        """Plans may be of this text from now on."""
        if text.digest not in self._texts:
            self._texts[text.digest] = text
            self._pool.share(text)

    def start(
        self,
        plan: Plan[T],
        subject: Subject,
        then: Callable[[T | JobError], None],
        died: Callable[[], int] | None = None,
        on: int | None = None,
        stays: bool = False,
        beside: bool = False,
    ) -> None:
        """Runs a plan; `then` is called with its result, or with why there is none. died: counts the workers that ended
        on a job of it, by default those from now on. on: the worker that measures all of it; where that dies, another
        of its kind, or none if it `stays`. beside: its timings run beside others, whatever these are."""
        if on is not None and stays and on not in self._members:
            then(JobError("its worker has ended"))
            return
        deaths = itertools.count(_DEATHS if stays else 1)
        count = died or (lambda: next(deaths))
        running = Running(plan, subject, then, count, worker=on, stays=stays, beside=beside)
        if on is not None:
            running.kind = self._members[on].kind
        self._waiting.proceed(running, None)

    def step(self, timeout: float = 0.5) -> None:
        """Takes in what was finished within `timeout` seconds, and gives idle workers something to do. Raises
        SweepError, UsageError."""
        for finished in self._pool.wait(timeout):
            self._take_in(finished)
            self.assign()
        self._turns.look(self)
        self.assign()

    def _enqueue(self, wanted: Wanted) -> None:
        queue = self._queue_of(wanted)
        (queue.appendleft if wanted.plans[0].stays else queue.append)(wanted)

    def _queue_of(self, wanted: Wanted) -> deque[Wanted]:
        if wanted.plans and wanted.plans[0].worker is not None:
            return self._staying
        return self._timing if wanted.job.is_timed else self._computing

    # What workers say.

    def _take_in(self, finished: Finished) -> None:
        worker = finished.worker
        if finished.description is not None:
            self._join(worker, finished.description)
        elif (member := self._members.get(worker)) is not None:
            self._ended(worker, member, finished)
        elif not finished.died:  # what one worker cannot load, none can
            raise UsageError(finished.error)
        elif finished.lost:
            self._starting.discard(worker)

    def _join(self, worker: int, description: WorkerDescription) -> None:
        """Raises UsageError for one that is not as the others have to be."""
        conditions = description["conditions"]
        if conditions.code != code_digest(*METHODS):
            raise UsageError(
                f"{description['host']} has other code of streamllm-sweep than this machine: install the same version "
                f"on all nodes"
            )
        self._starting.discard(worker)
        if not self._check(worker, description):
            return
        node = self._nodes.setdefault(description["host"], Node(description["device_type"] == "cpu"))
        kind = kind_of(conditions.kind)
        alike = json.dumps(asdict(conditions), sort_keys=True)
        self._conditions[alike, self._first] = conditions
        self._hosts[worker] = description["host"]
        self._members[worker] = Member(node, kind, alike, {self._first})
        node.workers[kind] += 1
        for watcher in self._watchers:
            watcher.worker_ready(worker, description)
        for warning in description["warnings"]:
            self._note(f"warning: worker {worker}: {warning}")

    def _ended(self, worker: int, member: Member, finished: Finished) -> None:
        """What it was doing, whatever came of it; or the worker itself."""
        wanted, asked, seconds = member.doing, member.asks, time.monotonic() - member.since
        member.doing = member.asks = None
        if wanted is not None:
            member.node.ends(wanted.job.is_timed and asked is None)
        if finished.died:
            self._leave(worker, member, finished.lost)
        for watcher in self._watchers:
            watcher.worker_idle(worker)
        if wanted is None:
            return
        if finished.conditions is not None and asked is not None:
            self._conditions[member.alike, asked] = finished.conditions
            member.models.add(asked)
            self._queue_of(wanted).appendleft(wanted)
            return
        alike = [wanted] if asked is not None else self._measuring.pop(member.entry)
        if finished.died:
            for one in alike:
                self._died_on(one, str(finished.error))
            return
        answer: Done | JobError = JobError(str(finished.error), finished.unavailable)
        if finished.measurement is not None:
            keys = self._keys(member, wanted)
            assert keys is not None
            measurement = finished.measurement
            if wanted.job.is_timed:
                timing = "concurrent" if member.beside else "exclusive"
                measurement = replace(measurement, record=measurement.record | {"timing": timing})
            answer = Done(measurement, keys, member.entry, is_fresh=True, seconds=seconds, worker=worker)
            self._keep(wanted, answer)
            answer = replace(answer, measurement=measurement.without_arrays())
        for one in alike:
            self._waiting.settle(one, answer)

    def _leave(self, worker: int, member: Member, is_lost: bool) -> None:
        del self._members[worker]
        member.node.workers -= Counter([member.kind])
        if not is_lost:
            self._starting.add(worker)
        if (reserved := member.node.reserved) is not None and reserved[0] == worker:
            member.node.reserved = None
            self._queue_of(reserved[1]).appendleft(reserved[1])
        for wanted in [one for one in self._staying if any(p.stays and p.worker == worker for p in one.plans)]:
            self._staying.remove(wanted)
            self._waiting.settle(wanted, JobError("its worker has ended"))

    def _died_on(self, wanted: Wanted, reason: str) -> None:
        """A job that took a worker down is tried once more, by whoever is free first; one that raised would raise
        again."""
        given_up = JobError(f"quarantined: {_DEATHS} workers ended on it: {reason}")
        wanted.deaths += 1
        for running in list(wanted.plans):
            if wanted.job.keeps:  # what all are compared with: no fault of the plan's
                if wanted.deaths >= _DEATHS:
                    self._waiting.proceed(running, given_up)
                continue
            if wanted.deaths > running.deaths:  # or a node that takes several of its jobs along would count as often
                running.deaths, running.deaths_in_all = wanted.deaths, running.died()
            if running.deaths_in_all - running.deaths + wanted.deaths >= _DEATHS:
                self._waiting.proceed(running, given_up)
        if wanted.plans:
            self._queue_of(wanted).append(wanted)

    def _keep(self, wanted: Wanted, done: Done) -> None:
        """Raises SweepError where the store takes nothing more."""
        if wanted.job.kind == "times":
            return
        with _storing():
            self._store.put(done.keys.of(wanted.job), done.measurement)

    # What they are given.

    def assign(self) -> None:
        """Gives idle workers something to do."""
        for worker, member in [(w, member) for w, member in self._members.items() if member.doing is None]:
            while member.doing is None and (wanted := self._next(worker, member)) is not None:
                self._give(worker, member, wanted)
        self._check_staying()

    def _next(self, worker: int, member: Member) -> Wanted | None:
        node = member.node
        if node.is_taken:
            return None
        if node.reserved is not None:
            holder, reserved = node.reserved
            if holder != worker or not node.is_free:
                return None
            node.reserved = None
            return reserved
        wanted = self._staying_for(worker, member)
        if wanted is None and self._may_time(node):
            wanted = _taken(self._timing, member)
        if wanted is not None and (node.is_free or not self._is_alone(node, wanted)):
            return wanted
        if wanted is not None:
            node.reserved = worker, wanted
            return None
        return _taken(self._computing, member)

    def _may_time(self, node: Node) -> bool:
        return not node.timing or self._is_side_by_side(node)

    def _is_side_by_side(self, node: Node) -> bool:
        """Whether workers of the node may be timed at once: never on a CPU, nor accelerators of several kinds."""
        if node.is_cpu or len(node.workers) != 1:
            return False
        ((kind, count),) = node.workers.items()
        return self._turns.side_by_side(kind, count)

    def _is_beside(self, node: Node, wanted: Wanted) -> bool:
        """Whether others of the node may be timed meanwhile; beside what is measured again to be sure, never."""
        if any(running.beside for running in wanted.plans):
            return not node.is_cpu
        return wanted.job.is_timed and not wanted.job.run and self._is_side_by_side(node)

    def _is_alone(self, node: Node, wanted: Wanted) -> bool:
        """Whether nothing may run on the node beside it: on a CPU, where all share caches, memory and clock; and what
        is measured again to be sure."""
        again = wanted.job.run != 0 and not any(running.beside for running in wanted.plans)
        return wanted.job.is_timed and (node.is_cpu or again)

    def _staying_for(self, worker: int, member: Member) -> Wanted | None:
        for wanted in self._staying:
            (running,) = wanted.plans or (None,)
            if running is None:
                continue
            if running.kind != member.kind:
                continue
            before = self._members.get(running.worker) if running.worker is not None else None
            if running.worker == worker or before is None or before.kind != running.kind:
                running.worker = worker
                self._staying.remove(wanted)
                return wanted
        return None

    def _check_staying(self) -> None:
        """Raises SweepError where there is no worker of the kind any more that a plan began on."""
        wanted = {one.plans[0].kind for one in self._staying if one.plans}
        if wanted and not self._starting and not wanted & {member.kind for member in self._members.values()}:
            raise SweepError("no worker is left of the kind that times were taken on")

    def _give(self, worker: int, member: Member, wanted: Wanted) -> None:
        """Or settles it by what the store has."""
        if not wanted.plans:  # nobody waits for it any more
            return
        subject = wanted.assignment.subject
        keys = self._keys(member, wanted)
        if keys is None:
            member.doing, member.asks, member.since = wanted, subject.variant, time.monotonic()
            member.node.begins(timing=False)
            self._pool.ask_conditions(worker, subject.variant)
            return
        try:
            key = keys.of(wanted.job)
        except UsageError as error:  # its method can do nothing with the policy, or not with the dtype
            self._waiting.settle(wanted, JobError(str(error), isinstance(error, UnavailableError)))
            return
        beside = self._is_beside(member.node, wanted)
        found = self._stored(key, wanted.job, beside)
        if found is not None or wanted.job.peek:
            self._waiting.settle(
                wanted, None if found is None else Done(found, keys, entry_name(key), is_fresh=False, worker=worker)
            )
            return
        entry = entry_name(key)
        if (alike := self._measuring.get(entry)) is not None:
            alike.append(wanted)
            return
        if wanted.job.against:
            with _storing():
                self._pool.lend(wanted.job.against, self._store.arrays)
        self._measuring[entry] = [wanted]
        member.doing, member.entry, member.beside, member.since = wanted, entry, beside, time.monotonic()
        member.models |= {subject.variant}
        member.node.begins(wanted.job.is_timed, self._is_alone(member.node, wanted))
        self._pool.submit(worker, wanted.assignment._replace(side_by_side=beside))
        for watcher in self._watchers:
            watcher.job_started(worker, wanted.job)

    def _stored(self, key: Mapping[str, object], job: Job, beside: bool) -> Measurement | None:
        """What was timed beside others counts only where it would be again."""
        found = self._store.get(key, job.is_of_use_with_arrays_only) if job.kind != "times" else None
        return None if found is not None and found.record.get("timing") == "concurrent" and not beside else found

    def _keys(self, member: Member, wanted: Wanted) -> Keys | None:
        """None if it is not known what the worker would measure it under."""
        subject = wanted.assignment.subject
        conditions = self._conditions.get((member.alike, subject.variant))
        if conditions is None:
            return None
        beside = None
        if subject.beside is not None:
            beside = self._conditions[member.alike, subject.beside].model_digest
        return Keys(conditions, self._texts[subject.text], subject.total, beside)


@contextmanager
def _storing() -> Iterator[None]:
    """Raises SweepError where the store takes nothing more."""
    try:
        yield
    except StoreError as error:
        raise SweepError(str(error)) from error


def _taken(queue: deque[Wanted], member: Member) -> Wanted | None:
    """The first that somebody still waits for; of a few, rather one of a model that the worker has."""
    while queue and not queue[0].plans:
        queue.popleft()
    for wanted in islice(queue, _LOOK_AHEAD):
        if wanted.plans and wanted.assignment.subject.variant in member.models:
            queue.remove(wanted)
            return wanted
    return queue.popleft() if queue else None
