"""Where a ring keeps which token: what it decides once, for every cache that is a ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Position = TypeVar("Position", int, Tensor)


@dataclass(frozen=True)
class RingSlots:
    """Slots 0 .. S-1 hold the sinks, the others the window: the token at position t of the stream, counted from 0, is
    in slot S + (t - S) % window."""

    n_sink: int
    """S"""
    count: int
    """Number of all slots."""

    @property
    def window(self) -> int:
        return self.count - self.n_sink

    def of(self, position: int) -> int:
        return position if position < self.n_sink else self.n_sink + self._in_window(position)

    def of_each(self, positions: Tensor) -> Tensor:
        """positions (n) -> slots (n)."""
        in_window = self._in_window(positions)
        return torch.where(positions < self.n_sink, positions, self.n_sink + in_window)

    def _in_window(self, position: Position) -> Position:
        """Counted from the window's first slot."""
        return (position - self.n_sink) % self.window

    def newest(self, last: Tensor) -> Tensor:
        """The newest position that belongs in each slot of the window (window), position `last` being the newest of
        all; below S where there is none yet."""
        slots = torch.arange(self.window, device=last.device)
        return last - (last - self.n_sink - slots) % self.window

    def held(self, seen: int) -> list[int]:
        """The positions in a ring that `seen` tokens have gone through, ascending."""
        window = range(max(self.n_sink, seen - self.window), seen)
        return [*range(min(self.n_sink, seen)), *window]
