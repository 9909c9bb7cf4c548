"""Attention backends: the kernel that was asked for, and the one that really ran.

Every model is loaded with the attention function registered here, which hands each layer's query, key and value to the
`attention_state` given to the model's call. Caches and the block-parallel evaluator are such states: no forward pass of
any architecture is copied, and no `transformers` cache class is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import reduce
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UnsupportedModelError, UsageError
from .backends import BACKENDS, Backend
from .cpu_kernels import decode_attention
from .softmax import PLAIN, Softmax

ATTENTION_NAME = "streamllm"


class UnseenAttentionError(UnsupportedModelError):
    """The attention that the model's layers compute does not pass through here."""


class StateDroppedError(UnseenAttentionError):
    """The layers above it do not hand on what the model is called with."""


class AttentionState(Protocol):
    """The state that a layer's attention is computed with and from."""

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
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_state: AttentionState | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if attention_state is None:
        raise UnseenAttentionError(
            f"{type(module).__name__} was called without attention_state: the model's layers do not hand on what the "
            f"model is called with, or it was loaded for the engine and called without it"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Angles are exact, in float32 at least: what they turned comes back to the model's dtype here.
    query, key = query.to(value.dtype), key.to(value.dtype)
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
    window: int | None = None,
    softmax: Softmax = PLAIN,
) -> Tensor:
    """softmax(query key^T scaling) value, the backend's way; its kernel is chosen by `Backend.active` around the loop.

    query (batch, heads, new, size), key and value (batch, KV heads, held, size), which may be of another number format,
    -> (batch, heads, new, value size).

    `mask` (new, held) is True where visible; without one, `causal` aligns the last query with the last key, and each
    sees the last `window` keys up to its own. Raises UsageError for a kernel that has not what the layer's softmax has.
    """
    if causal and mask is None and window is not None and key.shape[-2] > window:
        if query.shape[-2] == 1:
            key, value = key[:, :, -window:], value[:, :, -window:]
        else:
            mask = causal_mask(query.shape[-2], key.shape[-2], query.device, window)
    new, held = query.shape[-2], key.shape[-2]
    if new == 1 and backend.library == "cpp":
        return decode_attention(query, key, value, mask, scaling, softmax)
    if new == 1 and torch.compiler.is_compiling() and fuses(backend, query.device):
        return fused_attention(query, key, value, scaling, mask, softmax)
    key, value = key.to(query.dtype), value.to(query.dtype)
    eager = backend.library == "eager" or not softmax.is_plain
    if not softmax.is_plain and backend.name not in ("auto", "eager", "cpp"):
        what = "soft caps on its logits" if softmax.cap is not None else "learned sinks in its softmax"
        raise UsageError(f"attention backend {backend.name!r}: the model has {what}; use auto or eager")
    if key.shape[-1] != value.shape[-1] and not eager:  # fused kernels take them as wide as one another
        width, asked = max(key.shape[-1], value.shape[-1]), value.shape[-1]
        query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
        return attention(backend, query, key, value, scaling, mask, causal)[..., :asked]
    if new == 1 and backend.library == "triton":
        return _triton_attention(backend, query, key, value, scaling, mask)
    if causal and mask is None and new > 1 and backend.library != "flash_attn" and (new != held or eager):
        mask = causal_mask(new, held, query.device)
    if eager:
        return eager_attention(query, key, value, scaling, mask, softmax)
    causal = causal and mask is None and new > 1
    if backend.library == "flash_attn" and mask is None:
        return _flash_attention_2(query, key, value, scaling, causal)
    if query.device.type == "cuda" and (mask is not None or query.dtype.itemsize > 2):
        # Flash takes half precision only and no mask; no other kernel of CUDA's takes grouped queries (torch <= 2.13).
        key, value = (for_each_head(x, query.shape[1]) for x in (key, value))
    grouped = query.shape[1] != key.shape[1]
    # A compiled graph is bound to the kernel that it was traced with, and has to know which: enter it inside.
    with backend.active() if torch.compiler.is_compiling() else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )


def causal_mask(new: int, held: int, device: torch.device, window: int | None = None) -> Tensor:
    """(new, held), True where the last `new` of the tokens see a key: up to their own, the last `window` of those."""
    mask = torch.ones(new, held, dtype=torch.bool, device=device).tril(held - new)
    return mask if window is None else mask.triu(held - new - window + 1)


def for_each_head(x: Tensor, heads: int) -> Tensor:
    """x (batch, KV heads, ...) -> (batch, heads, ...)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _flash_attention_2(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Tensor:
    """The flash-attn package (Dao 2023), which aligns the last query with the last key as we do."""
    from flash_attn import flash_attn_func

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(query, key, value, softmax_scale=scaling, causal=causal).transpose(1, 2)


def _triton_attention(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    if backend.name == "ring_triton" and mask is None and len(query) == 1:
        from .triton_ring import attention_over

        return attention_over(query, key, value, scaling)
    from .triton_attention import decode_attention

    return decode_attention(query, key, value, mask, scaling)


def fuses(backend: Backend, device: torch.device) -> bool:
    """Whether compiled steps use `fused_attention`: on a CPU, unless there is a kernel (`probing.replayed`)."""
    return backend.name == "auto" and device.type == "cpu"


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, softmax: Softmax = PLAIN
) -> Tensor:
    """One query's attention as a product with the keys and a sum of the values, for a compiler: faster than torch's
    kernel for CPUs, and than inductor's own loop over keys, whose rows are short. The logits, the softmax and the sums
    are in float32 at least."""
    precision = torch.promote_types(query.dtype, torch.float32)
    query_of_group = query.squeeze(2).unflatten(1, (key.shape[1], -1)).to(precision)  # (batch, KV heads, group, size)
    logits = softmax.capped(query_of_group @ key.to(precision).transpose(-1, -2) * scaling)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if softmax.sinks is None:
        weights = logits.softmax(-1)[..., None]
    else:
        each_head = logits.flatten(1, 2)[:, :, None]
        weights = softmax.weights(each_head).squeeze(2).unflatten(1, logits.shape[1:3])[..., None]
    return _summed(weights, value[:, :, None]).flatten(1, 2)[:, :, None].to(query.dtype)


def _summed(weights: Tensor, values: Tensor, parts: int = 16) -> Tensor:
    """(weights * values).sum(-2) by adding up `parts` slices first: inductor's own loop reads columns in strides."""
    length = weights.shape[-2] // parts

    def product(start: int, count: int) -> Tensor:
        return weights.narrow(-2, start, count) * values.narrow(-2, start, count).to(weights.dtype)

    total = reduce(torch.add, [product(part * length, length) for part in range(parts)]).sum(-2)
    rest = weights.shape[-2] - parts * length
    return total + product(parts * length, rest).sum(-2) if rest else total


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, softmax: Softmax = PLAIN
) -> Tensor:
    """As written in transformers' modelling files: the logits in the model's dtype, the softmax in float32 at least."""
    key, value = (for_each_head(x, query.shape[1]) for x in (key, value))
    logits = softmax.capped(query @ key.transpose(-1, -2) * scaling)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return softmax.weights(logits).to(query.dtype) @ value


_KERNELS = {operator: backend.name for backend in BACKENDS.values() for operator in backend.operators} | {
    # Which run for `auto`, and cannot be asked for:
    "aten::_scaled_dot_product_fused_attention_overrideable": "overrideable",  # xpu's
    "aten::_scaled_dot_product_attention_math_for_mps": "mps",
}


@contextlib.contextmanager
def recorded_kernel(requested: Backend, plain: bool = True) -> Iterator[KernelRecorder]:
    """Notes in `.used` which attention kernel torch dispatches to inside the block. plain: whether the softmax of all
    layers is; what no kernel has is computed eagerly."""
    # In inference mode torch shows a dispatch mode the composite operator only, not the kernel it chooses.
    with torch.inference_mode(False), torch.no_grad(), KernelRecorder(requested, plain) as recorder:
        yield recorder


class KernelRecorder(TorchDispatchMode):
    """`recorded_kernel` enters it."""

    def __init__(self, requested: Backend, plain: bool = True) -> None:
        super().__init__()
        self.requested = requested
        self.plain = plain
        self.kernels: set[str] = set()

    @property
    def used(self) -> str:
        """Several joined by "+": a cache may need another kernel while it is not full."""
        # Eager and math are compositions of ordinary operators: no kernel of their own shows up.
        eager = self.requested.library == "eager" or not (self.plain or "cpp" in self.kernels)
        return "+".join(sorted(self.kernels | ({"eager"} if eager else set()))) or "math"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = _KERNELS.get(func._schema.name)
        if kernel is not None:
            self.kernels.add(kernel)
        return func(*args, **(kwargs or {}))
