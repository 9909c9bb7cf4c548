"""The attention backends one can ask for. Adding one is adding an entry."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute softmax(q k^T) v."""

    name: str
    kernel: str | None = None
    """Name in `torch.nn.attention.SDPBackend`; None leaves the choice to torch."""
    eager: bool = False
    """Plain matrix products and a softmax instead of torch's SDPA."""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Holds torch's SDPA to this kernel; entered once around a loop, not once per call."""
        if self.kernel is None:
            yield
            return
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self.kernel)):
            yield


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("auto"),
        Backend("eager", eager=True),
        Backend("math", "MATH"),
        Backend("flash", "FLASH_ATTENTION"),
    )
}
