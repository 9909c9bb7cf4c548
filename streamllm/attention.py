"""Attention backends: the kernel that was asked for, and the one that really ran.

Every model is loaded with the attention function registered here, which hands each layer's query, key and value to the
`attention_state` given to the model's call. Caches and the block-parallel evaluator are such states: no forward pass of
any architecture is copied, and no `transformers` cache class is needed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .backends import BACKENDS, Backend
from .errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from .loaded import LoadedModel

ATTENTION_NAME = "streamllm"


class BackendError(UsageError):
    """An attention backend that was insisted on does not run here."""


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
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_state: AttentionState | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    if attention_state is None:
        raise TypeError(f"attention {ATTENTION_NAME!r} needs attention_state=... in the call of the model")
    for name in ("softcap", "s_aux"):  # soft-capped logits; learned sinks in the denominator
        if more.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} is more than a softmax: it has {name}")
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
) -> Tensor:
    """softmax(query key^T scaling) value, the backend's way; its kernel is chosen by `Backend.active` around the loop.

    query (batch, heads, new, size), key and value (batch, KV heads, held, size) -> (batch, heads, new, size).

    `mask` (new, held) is True where visible; `causal` aligns the last query with the last key.
    """
    new, held = query.shape[-2], key.shape[-2]
    if causal and new > 1 and backend.library != "flash_attn" and (new != held or backend.library == "eager"):
        mask = torch.ones(new, held, dtype=torch.bool, device=query.device).tril(held - new)
    if backend.library == "eager":
        return _eager_attention(query, key, value, scaling, mask)
    grouped = query.shape[1] != key.shape[1]
    if mask is not None and query.is_cuda and not backend.masks:
        with sdpa_kernel(_MASKED_KERNELS):
            return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=grouped)
    causal = causal and mask is None and new > 1
    if backend.library == "flash_attn":
        return _flash_attention_2(query, key, value, scaling, causal)
    # A compiled graph is bound to the kernel that it was traced with, and has to know which: enter it inside.
    with backend.active() if torch.compiler.is_compiling() else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )


_MASKED_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _flash_attention_2(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Tensor:
    """The flash-attn package (Dao 2023), which aligns the last query with the last key as we do."""
    from flash_attn import flash_attn_func

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(query, key, value, softmax_scale=scaling, causal=causal).transpose(1, 2)


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
    "flash_attn::_flash_attn_forward": "flash_attention_2",
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
        self.requested = requested
        self.kernels: set[str] = set()

    @property
    def used(self) -> str:
        """Several joined by "+": a cache may need another kernel while it is not full."""
        # Eager and math are compositions of ordinary operators: no kernel of their own shows up.
        return "+".join(sorted(self.kernels)) or ("eager" if self.requested.library == "eager" else "math")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = _KERNELS.get(func._schema.name)
        if kernel is not None:
            self.kernels.add(kernel)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class Probe:
    """What became of an attention call with one backend."""

    backend: Backend
    kernel: str | None
    """The kernel that ran; None if none did."""
    error: str | None = None

    @property
    def available(self) -> bool:
        """Whether what was asked for is what ran."""
        return self.kernel is not None and self.backend.name in ("auto", self.kernel)


def probe_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_size: int, heads: int = 1, kv_heads: int = 1
) -> Probe:
    """Runs a decode-shaped call: one query, eight keys. The output must agree with eager attention in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, 1, head_size), (kv_heads, 8, head_size), (kv_heads, 8, head_size)
    query, key, value = (torch.randn(1, *shape, generator=generator).to(device, dtype) for shape in shapes)
    try:
        with warnings.catch_warnings(record=True) as reasons, backend.active(), recorded_kernel(backend) as recorder:
            warnings.simplefilter("always")  # torch says in warnings why a kernel does not fit
            found = attention(backend, query, key, value, 0.1)
        expected = _eager_attention(query.float(), key.float(), value.float(), 0.1, None)
        error = (found.float() - expected).abs().max().item()
        if not error < 0.02:
            return Probe(backend, None, f"wrong by {error:.2g}")
    except (RuntimeError, ImportError) as failure:
        causes = [str(reason.message) for reason in reasons if "not" in str(reason.message)]
        return Probe(backend, None, (causes[-1] if causes else str(failure)).splitlines()[0])
    return Probe(backend, recorder.used)


def resolve_backend(name: str, loaded: LoadedModel, strict: bool = False) -> Backend:
    """The backend of that name, probed on the model's device, dtype and heads; `auto` with a warning where it does not
    run, or, if `strict`, BackendError."""
    config = loaded.model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    probe = probe_backend(BACKENDS[name], loaded.device, loaded.dtype, loaded.head_size, heads, kv_heads)
    if probe.available:
        return probe.backend
    where = f"{loaded.device.type} in {str(loaded.dtype).removeprefix('torch.')}"
    problem = f"attention backend {name!r} does not run on {where} ({probe.error or probe.kernel})"
    if strict:
        raise BackendError(f"{problem}; leave out --strict, or ask for one that `streamllm backends` shows")
    warnings.warn(f"{problem}: using 'auto'", stacklevel=2)
    return BACKENDS["auto"]
