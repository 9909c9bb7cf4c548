"""Plans under way, and the jobs that they wait for: each once, however many wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from streamllm.measuring.done import Done
from streamllm.measuring.jobs import Job, Plan

from .workers.kinds import Kind
from .workers.messages import Assignment, Subject

T = TypeVar("T")


class JobError(RuntimeError):
    """A job that cannot be measured; the message says why."""

    def __init__(self, reason: str, unavailable: bool = False) -> None:
        super().__init__(reason)
        self.unavailable = unavailable
        """It cannot be had here, or with this model: no failure."""


@dataclass(slots=True, eq=False)
class Running(Generic[T]):
    """A plan on its way."""

    plan: Plan[T]
    subject: Subject
    then: Callable[[T | JobError], None]
    died: Callable[[], int]
    """Told of workers that ended on one of its jobs; says how often it was told, in all starts of a sweep."""
    deaths: int = 0
    """Workers at most that ended on one job of it, since it was started."""
    deaths_in_all: int = 0
    worker: int | None = None
    """That measures all of it."""
    kind: Kind = ()
    """Of that worker."""
    stays: bool = False
    """It is of no use on another worker."""
    beside: bool = False
    """Its timings run beside others, whatever these are."""
    asked: Sequence[Assignment] = ()
    results: dict[Assignment, Done | None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Wanted:
    """A job that plans wait for."""

    assignment: Assignment
    plans: list[Running[Any]]
    deaths: int = 0
    """Workers that ended on it."""

    @property
    def job(self) -> Job:
        return self.assignment.job


class Waiting:
    def __init__(self, want: Callable[[Wanted], None]) -> None:
        """want: is given each job that nobody waited for before."""
        self._want = want
        self._wanted: dict[Assignment, Wanted] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits for results, but to try out a worker."""
        return all(wanted.plans and wanted.plans[0].stays for wanted in self._wanted.values())

    def proceed(self, running: Running[T], answer: Sequence[Done | None] | JobError | None) -> None:
        """Sends a plan what it waited for, and asks for what it wants next."""
        if isinstance(answer, JobError):
            self._forget(running)
        running.asked, running.results = (), {}
        try:
            if isinstance(answer, JobError):
                jobs = running.plan.throw(answer)
            else:
                jobs = next(running.plan) if answer is None else running.plan.send(answer)
        except StopIteration as end:
            running.then(end.value)
            return
        except JobError as error:
            running.then(error)
            return
        running.asked = [Assignment.of(running.subject, job) for job in jobs]
        for assignment in dict.fromkeys(running.asked):
            if (wanted := self._wanted.get(assignment)) is not None:
                wanted.plans.append(running)
                continue
            wanted = self._wanted[assignment] = Wanted(assignment, [running])
            self._want(wanted)
        if not running.asked:
            self.proceed(running, [])

    def settle(self, wanted: Wanted, answer: Done | JobError | None) -> None:
        """Tells all who wait for it."""
        if self._wanted.get(wanted.assignment) is wanted:
            del self._wanted[wanted.assignment]
        plans, wanted.plans = wanted.plans, []
        for running in plans:
            if isinstance(answer, JobError):
                self.proceed(running, answer)
                continue
            running.results[wanted.assignment] = answer
            if all(assignment in running.results for assignment in running.asked):
                self.proceed(running, [running.results[assignment] for assignment in running.asked])

    def _forget(self, running: Running[Any]) -> None:
        """What nobody else waits for is not begun any more."""
        for assignment in running.asked:
            wanted = self._wanted.get(assignment)
            if wanted is not None and running in wanted.plans:
                wanted.plans.remove(running)
                if not wanted.plans:
                    del self._wanted[assignment]
