"""Attention backends: the kernel that was asked for, and the one that really ran.

Every model is loaded with the attention function registered here, which hands each layer's query, key and value to the
`attention_state` given to the model's call. Caches and the block-parallel evaluator are such states: no forward pass of
any architecture is copied, and no `transformers` cache class is needed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .backends import BACKENDS, Backend

ATTENTION_NAME = "streamllm"


class AttentionState(Protocol):
    """What a layer's attention is computed with and from."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query (batch, heads, new, head size), key and value (batch, KV heads, new, head size), as the model rotated
        them at the `position_ids` of the call -> (batch, heads, new, head size)."""
        ...


def register_attention() -> None:
    """Makes `ATTENTION_NAME` known to transformers. Without a mask function of that name, models build no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_state: AttentionState | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if attention_state is None:
        raise TypeError(f"attention {ATTENTION_NAME!r} needs attention_state=... in the call of the model")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = attention_state.attend(int(module.layer_idx), query, key, value, scaling)  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


def attention(
    backend: Backend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(query key^T scaling) value, the backend's way; its kernel is chosen by `Backend.active` around the loop.

    query (batch, heads, new, size), key and value (batch, KV heads, held, size) -> (batch, heads, new, size).

    `mask` (new, held) is True where visible; `causal` aligns the last query with the last key.
    """
    new, held = query.shape[-2], key.shape[-2]
    grouped = query.shape[1] != key.shape[1]
    if causal and new > 1 and (new != held or backend.eager):
        mask = torch.ones(new, held, dtype=torch.bool, device=query.device).tril(held - new)
    if backend.eager:
        return _eager_attention(query, key, value, scaling, mask)
    causal = causal and mask is None and new > 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


def _eager_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """As written in transformers' modelling files: the logits in the model's dtype, the softmax in float32 at least."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    logits = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    precision = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=precision).to(query.dtype) @ value


_KERNELS = {
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
}


@contextlib.contextmanager
def recorded_kernel(requested: Backend) -> Iterator[KernelRecorder]:
    """Notes in `.used` which attention kernel torch dispatches to inside the block."""
    # In inference mode torch shows a dispatch mode the composite operator only, not the kernel it chooses.
    with torch.inference_mode(False), torch.no_grad(), KernelRecorder(requested) as recorder:
        yield recorder


class KernelRecorder(TorchDispatchMode):
    """`recorded_kernel` enters it."""

    def __init__(self, requested: Backend) -> None:
        super().__init__()
        # Both are compositions of ordinary operators: no kernel of their own shows up.
        self.used = "eager" if requested.eager else "math"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.used = _KERNELS.get(func._schema.name, self.used)
        return func(*args, **(kwargs or {}))


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> Backend:
    """The backend of that name, or `auto` with a warning where it does not run: tried with a decode-shaped call."""
    backend = BACKENDS[name]
    query = torch.zeros(1, 1, 1, head_size, device=device, dtype=dtype)
    key = torch.zeros(1, 1, 8, head_size, device=device, dtype=dtype)
    try:
        with backend.active():
            attention(backend, query, key, key, 1.0)
    except RuntimeError:
        warnings.warn(
            f"attention backend {name!r} does not run on {device.type} in {dtype}: using 'auto'", stacklevel=2
        )
        return BACKENDS["auto"]
    return backend
