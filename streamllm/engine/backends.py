"""The attention backends one can ask for. Adding one is adding an entry."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_FALLBACKS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
"""The kernels that CUDA runs where nothing else is asked for: the first that takes the call. Left to itself torch
begins with cuDNN on Hopper, which builds a plan for every new length, in a cache that grows for every token."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute softmax(q k^T) v."""

    name: str
    kernel: str | None = None
    """Name in `torch.nn.attention.SDPBackend`; None for `auto`, and for what is not torch's."""
    library: Literal["sdpa", "eager", "flash_attn", "triton", "cpp"] = "sdpa"
    """torch's scaled_dot_product_attention, plain matrix products and a softmax, the flash-attn package, or our own
    kernels for one new token, on GPUs (`triton_attention`, `triton_ring`) and CPUs (`cpu_kernels`); several are
    torch's."""
    operators: tuple[str, ...] = ()
    """The operators that torch's dispatcher is seen to run when this kernel runs; empty if it is made of ordinary
    operators."""
    heading: str | None = None
    """How torch begins what it says of the kernel, in lower case."""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Holds torch's SDPA to this kernel and, for a call that it does not take (a mask, a single key), to the next
        that does; entered once around a loop, not once per call."""
        from torch import cuda
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if self.kernel is None and not cuda.is_available():  # other devices' own choice is the right one
            yield
            return
        first = self.kernel or _FALLBACKS[0]
        order = [first, *(name for name in _FALLBACKS if name != first and first != "MATH")]  # math takes every call
        with sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True):
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds torch's SDPA to this kernel: a call that it does not take is a RuntimeError, with a warning why."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self.kernel)) if self.kernel else self.active():
            yield


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("auto"),
        Backend("eager", library="eager"),
        Backend("math", "MATH"),
        Backend(
            "efficient",
            "EFFICIENT_ATTENTION",
            operators=("aten::_scaled_dot_product_efficient_attention",),
            heading="memory efficient",
        ),
        Backend(
            "flash",
            "FLASH_ATTENTION",
            operators=(
                "aten::_scaled_dot_product_flash_attention",
                "aten::_scaled_dot_product_flash_attention_for_cpu",
            ),
            heading="flash attention",
        ),
        Backend(
            "cudnn",
            "CUDNN_ATTENTION",
            operators=("aten::_scaled_dot_product_cudnn_attention",),
            heading="cudnn attention",
        ),
        Backend("flash_attention_2", library="flash_attn", operators=("flash_attn::_flash_attn_forward",)),
        Backend("triton", library="triton", operators=("streamllm::flash_decoding",)),
        Backend("ring_triton", library="triton", operators=("streamllm::ring_attention",)),
        Backend("cpp", library="cpp", operators=("streamllm::decode_attention",)),
    )
}


def default_backend() -> str:
    """`FLASH_SDPA=1` in the environment asks for flash and `FLASH_SDPA=0` for math, as in the source documents."""
    return {"1": "flash", "0": "math"}.get(os.environ.get("FLASH_SDPA", ""), "auto")
