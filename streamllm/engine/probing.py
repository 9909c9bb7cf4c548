"""Which attention backends run here: found out by running them on the actual device, dtype and heads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch

from ..configuration import Configuration
from ..errors import UsageError
from .attention import attention, eager_attention, recorded_kernel
from .backends import BACKENDS, Backend
from .model import LoadedModel
from .softmax import PLAIN, Softmax


class BackendError(UsageError):
    """An attention backend that was insisted on does not run here."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The outcome of an attention call with one backend."""

    backend: Backend
    kernel: str | None
    """The kernel that ran; None if none did."""
    error: str | None = None

    @property
    def available(self) -> bool:
        """Whether what was asked for is what ran."""
        return self.kernel is not None and self.backend.name in ("auto", self.kernel)


def probe_backend(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    heads: int = 1,
    kv_heads: int = 1,
    held: int = 8,
    softmax: Softmax = PLAIN,
) -> Probe:
    """Runs a decode-shaped call: one query, `held` keys, and what a layer's softmax has. The output must agree with
    eager attention in float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, 1, head_size), (kv_heads, held, head_size), (kv_heads, held, head_size)
    query, key, value = (torch.randn(1, *shape, generator=generator).to(device, dtype) for shape in shapes)
    try:
        with (
            warnings.catch_warnings(record=True) as reasons,
            backend.alone(),
            recorded_kernel(backend, softmax.is_plain) as recorder,
        ):
            warnings.simplefilter("always")  # torch says in warnings why a kernel does not fit
            found = attention(backend, query, key, value, 0.1, softmax=softmax)
        expected = eager_attention(query.float(), key.float(), value.float(), 0.1, None, softmax)
        error = (found.float() - expected).abs().max().item()
        if not error < 0.02:
            return Probe(backend, None, f"wrong by {error:.2g}")
    except (RuntimeError, ImportError, UsageError) as failure:
        said = why_not(backend.name, [str(reason.message) for reason in reasons])
        return Probe(backend, None, (said or str(failure)).splitlines()[0])
    return Probe(backend, recorder.used)


def probe_layers(backend: Backend, loaded: LoadedModel, held: int, head_size: int | None = None) -> Probe:
    """The first of the model's layers that it does not run for; that of the last kind, if it runs for all. A head size
    may be asked for in place of theirs."""
    kinds = {
        (head_size or x.key_size, x.heads, x.kv_heads, x.softmax.cap, x.softmax.sinks is None): x.softmax
        for x in loaded.layers
    }
    for (size, heads, kv_heads, *_), softmax in kinds.items():
        probe = probe_backend(backend, loaded.device, loaded.dtype, size, heads, kv_heads, held, softmax)
        if not probe.available:
            break
    return probe


def replayed(backend: Backend, loaded: LoadedModel, held: int) -> Backend:
    """The backend that `auto` stands for in a ring's step that is compiled, or captured as a graph: our own kernel,
    where it runs. On a GPU its launches cost nothing there (from Python, 150 us each): on an H100 a captured step takes
    14% less time with it than with `triton`, a compiled one 4%."""
    own = {"cuda": "ring_triton", "cpu": "cpp"}.get(loaded.device.type)
    if backend.name != "auto" or own is None:
        return backend
    if own == "ring_triton" and (find_spec("triton") is None or not loaded.has_plain_softmax):
        return backend
    ours, shapes = BACKENDS[own], {(x.key_size, x.heads, x.kv_heads) for x in loaded.layers}
    return ours if all(_probed(ours, loaded.device, loaded.dtype, *shape, held) for shape in shapes) else backend


@cache
def _probed(backend: Backend, *what: Any) -> bool:
    return probe_backend(backend, *what).available


def why_not(name: str, warned: Sequence[str]) -> str | None:
    """Torch's reason for not taking that kernel, among all it says of all kernels: the warning after its heading."""
    beginning = BACKENDS[name].heading or name
    texts = [text.split(" (Triggered internally")[0] for text in warned]
    for heading, reason in pairwise(texts):
        if heading.lower().startswith(beginning) and heading.rstrip().endswith("because:"):
            return reason
    return next((text for text in reversed(texts) if "not" in text and not text.rstrip().endswith("because:")), None)


def runnable(what: Configuration, loaded: LoadedModel, strict: bool = False) -> Configuration:
    """Its backend probed on the model's device, dtype and heads for one query and the keys held: `auto` instead, with a
    warning, where it does not run, or, if `strict`, BackendError."""
    name, probe = what.backend, probe_layers(what.kernel, loaded, what.policy.kept)
    if probe.available:
        return what
    where = f"{loaded.device.type} in {str(loaded.dtype).removeprefix('torch.')}"
    problem = f"attention backend {name!r} does not run on {where} ({probe.error or probe.kernel})"
    if strict:
        raise BackendError(f"{problem}; leave out --strict, or ask for one that `streamllm backends` shows")
    warnings.warn(f"{problem}: using 'auto'", stacklevel=2)
    return replace(what, backend="auto")
