"""The attention backends one can ask for. Adding one is adding an entry."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute softmax(q k^T) v."""

    name: str
    kernel: str | None = None
    """Name in `torch.nn.attention.SDPBackend`; None leaves the choice to torch."""
    library: Literal["sdpa", "eager", "flash_attn", "triton"] = "sdpa"
    """torch's scaled_dot_product_attention, plain matrix products and a softmax, the flash-attn package, or our own
    kernel for one new token (`triton_attention`; several are torch's)."""
    masks: bool = True
    """Whether its GPU kernel takes a mask. Masked calls (a ring that is not full) go to another kernel if not."""

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
        Backend("eager", library="eager"),
        Backend("math", "MATH"),
        Backend("efficient", "EFFICIENT_ATTENTION"),
        Backend("flash", "FLASH_ATTENTION", masks=False),
        Backend("cudnn", "CUDNN_ATTENTION"),
        Backend("flash_attention_2", library="flash_attn", masks=False),
        Backend("triton", library="triton"),
    )
}


def default_backend() -> str:
    """`FLASH_SDPA=1` in the environment asks for flash and `FLASH_SDPA=0` for math, as in the source documents."""
    return {"1": "flash", "0": "math"}.get(os.environ.get("FLASH_SDPA", ""), "auto")
