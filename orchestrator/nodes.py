"""The machines and the workers on them, as far as the scheduler has to know: what each does just now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .waiting import Wanted
from .workers.kinds import Kind
from .workers.messages import Variant


@dataclass(slots=True)
class Node:
    """What runs on one machine."""

    is_cpu: bool
    workers: Counter[Kind] = field(default_factory=Counter)
    computing: int = 0
    timing: int = 0
    is_taken: bool = False
    """Whether something runs that nothing may run beside."""
    reserved: tuple[int, Wanted] | None = None
    """A worker, and the timing that it begins when all others there have ended."""

    @property
    def is_free(self) -> bool:
        return not self.computing and not self.timing

    def begins(self, timing: bool, alone: bool = False) -> None:
        """One of its workers begins to time, or to compute; alone: beside nothing else."""
        self.timing += timing
        self.computing += not timing
        self.is_taken = alone

    def ends(self, timing: bool) -> None:
        self.timing -= timing
        self.computing -= not timing
        self.is_taken = False


@dataclass(slots=True)
class Member:
    """A worker that is ready."""

    node: Node
    kind: Kind
    alike: str
    """The same for all that would measure under the same conditions."""
    models: set[Variant]
    doing: Wanted | None = None
    entry: str = ""
    """The name in the store of what it is measuring."""
    beside: bool = False
    """It is timing, and others may be timed meanwhile."""
    asks: Variant | None = None
    """It is loading that, to say under which conditions it would measure."""
    since: float = 0.0

    def holds(self, worker: int) -> bool:
        """Whether it waits for what is reserved for it."""
        reserved = self.node.reserved
        return reserved is not None and reserved[0] == worker
