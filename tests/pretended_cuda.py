"""A CUDA device that the CPU stands in for: the engine takes the ways it takes on a GPU, on tensors of the CPU.

Tensors say that they are on `cuda`; attention is computed by the kernel that CUDA's rules pick, or refused as there,
and in fact by plain arithmetic; CUDA graphs are recorded operator by operator and replayed on the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from streamllm.engine import device
from streamllm.engine.model import LoadedModel

from .dispatched import no_waiting

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)


def kernel_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, grouped: bool) -> str:
    """What CUDA runs of the kernels that are switched on, on a Hopper with torch 2.9 to 2.13: the first in torch's
    order of priority that takes the call. Raises RuntimeError, as torch does, if none does."""
    half, size, held = query.dtype in HALF, query.shape[-1], key.shape[-2]
    sizes = {x.shape[-1] for x in (query, key, value)}
    dense = all(x.stride(-1) == 1 for x in (query, key, value))
    groups = query.shape[1] != key.shape[1]
    assert grouped or not groups, "heads differ, and torch was not told"
    assert key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0
    takes = {
        SDPBackend.FLASH_ATTENTION: (
            half
            and mask is None
            and len(sizes) == 1
            and size <= 256
            and dense
            and not (causal and query.shape[-2] != held)
        ),
        SDPBackend.EFFICIENT_ATTENTION: (
            (half or query.dtype == torch.float32)
            and not groups
            and dense
            and all(size % (8 if half else 4) == 0 for size in sizes)
        ),
        SDPBackend.CUDNN_ATTENTION: (
            half and held > 1 and dense and all(size % 8 == 0 and size <= 256 for size in sizes)
        ),
        SDPBackend.MATH: True,
    }
    enabled = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    order = torch._C._get_sdp_priority_order()
    if order == _DEFAULT_ORDER:  # then a Hopper begins with cuDNN
        order = [SDPBackend.CUDNN_ATTENTION.value, *order]
    for number in order:
        backend = SDPBackend(number) if number != _OVERRIDEABLE else None
        if backend is not None and enabled[backend] and takes[backend]:
            return backend.name.removesuffix("_ATTENTION").lower()
    raise RuntimeError("No available kernel. Aborting execution.")


_DEFAULT_ORDER = torch._C._get_sdp_priority_order()
_OVERRIDEABLE = 4


class PretendedCuda(TorchFunctionMode):
    """What is of `cuda` is done on the CPU. `kernels` are those of the attention calls so far."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return CUDA
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        return func(*tree_map(_here, args), **tree_map(_here, kwargs))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.kernels.append(kernel_of(query, key, value, attn_mask, is_causal, enable_gqa))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        return torch._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]


def _here(x: Any) -> Any:
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


@contextmanager
def pretended_cuda(loaded: LoadedModel) -> Iterator[tuple[LoadedModel, PretendedCuda]]:
    """The model, on a GPU as far as the engine can tell."""
    with pytest.MonkeyPatch.context() as patch, PretendedCuda() as pretended:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph", lambda graph: graph)
        yield replace(loaded, device=CUDA), pretended
    device.float64_device.cache_clear()


class _Stream:
    def wait_stream(self, stream: _Stream) -> None:
        pass


class RecordedGraph(TorchDispatchMode):
    """Entered, it notes each operator with the very tensors it read and made; `replay` runs them again into the same
    memory. What Python decided while it was recorded stays as it was, as in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        no_waiting(func, args, kwargs or {})  # which CUDA refuses while it captures
        result = func(*args, **(kwargs or {}))
        known = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _memory(x) not in known]
        if made or func._schema.is_mutable:  # a view stays one
            self.steps.append((func, args, kwargs or {}, made))
        return result

    def replay(self) -> None:
        for func, args, kwargs, made in self.steps:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            if made:
                for target, source in zip(made, again, strict=True):
                    target.copy_(source)


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata
