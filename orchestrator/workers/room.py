"""How many workers there is room for, and what each gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from streamllm.errors import UsageError

from ..configuration import WorkerSettings

Node = Mapping[str, float]
"""A node's resources by their names: CPU, GPU."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker gets: an accelerator and a share of the cores, or cores alone."""

    on_accelerators: bool
    cores: int

    @classmethod
    def of(cls, nodes: Sequence[Node], settings: WorkerSettings) -> Self:
        """For that many workers, of so many cores, or of a fair share. Raises UsageError where they do not fit."""
        on_accelerators = any(node.get("GPU", 0) >= 1 for node in nodes)
        share = _per_accelerator(nodes) if on_accelerators else _fair(nodes, settings.count)
        room = cls(on_accelerators, settings.cpus or share)
        room._check(nodes, settings.count)
        return room

    @property
    def resource(self) -> str:
        return "GPU" if self.on_accelerators else "CPU"

    @property
    def asks(self) -> str:
        """For one worker."""
        return "1 GPU" if self.on_accelerators else f"{self.cores} CPU"

    def workers(self, nodes: Sequence[Node]) -> int:
        if self.on_accelerators:
            return int(sum(node.get("GPU", 0) for node in nodes))
        return _of_cores(nodes, self.cores)

    def _check(self, nodes: Sequence[Node], count: int) -> None:
        room = self.workers(nodes)
        if not room:
            most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
            raise UsageError(f"cpus per worker {self.cores}: no node has more than {most}; give {most} or fewer")
        if count > room:
            what = "accelerator" if self.on_accelerators else "core" if self.cores == 1 else f"{self.cores} cores"
            raise UsageError(
                f"workers {count}: there is room for {room}, each with its own {what}; give --workers {room} or fewer"
            )


def _of_cores(nodes: Sequence[Node], cores: int) -> int:
    """Workers of so many cores each; a worker is on one node."""
    return sum(int(node.get("CPU", 0) // cores) for node in nodes)


def _fair(nodes: Sequence[Node], count: int) -> int:
    """Cores for each of so many workers, if they are to be alike; 1 where nobody says how many."""
    fair = int(sum(node.get("CPU", 0) for node in nodes)) // count if count else 1
    return next((cores for cores in range(fair, 1, -1) if _of_cores(nodes, cores) >= count), 1)


def _per_accelerator(nodes: Sequence[Node]) -> int:
    """Those of the node with the fewest cores per accelerator."""
    return max(min(int(node.get("CPU", 1) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1), 1)
