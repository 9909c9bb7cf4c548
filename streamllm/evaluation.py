"""One evaluation: its quality, its speed, and the flat result that tables are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from . import __version__
from .attention import recorded_kernel
from .backends import BACKENDS, Backend
from .block_parallel import block_parallel_losses
from .decoding import decode_loop
from .loaded import LoadedModel
from .methods import effective_policy, make_decoder, sampled_losses
from .policy import EvictionPolicy, peak_kv
from .quality import Estimate, baseline_positions, check_finite, perplexity
from .text import TokenStream
from .timing import Speed, device_name, measure_speed

Progress = Callable[[int], None]
"""Called with the number of tokens done so far."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Per-token losses, and where they were taken."""

    losses: np.ndarray
    """float64 nats (n)."""
    positions: np.ndarray
    """Ascending (n): losses[i] is the negative log-likelihood of token positions[i] + 1."""
    peak_kv: int
    seconds: float

    def summary(self) -> dict[str, Any]:
        return {
            **_flat("perplexity", perplexity(self.losses)),
            "evaluated_tokens": len(self.losses),
            "peak_kv": self.peak_kv,
            "quality_sec": self.seconds,
        }


def measure_quality(
    loaded: LoadedModel, stream: TokenStream, method: str, policy: EvictionPolicy, progress: Progress | None = None
) -> Quality:
    """Protocol `fast`: every token, block-parallel; of `recompute`, a sample of tokens spread over the text.

    Raises NonFiniteLossError."""
    policy = effective_policy(method, policy)
    started = time.perf_counter()
    n_losses = len(stream.tokens) - 1
    losses_at = sampled_losses(method)
    if losses_at is not None:
        positions = baseline_positions(len(stream.tokens))
        losses = losses_at(loaded, stream.tokens, policy.kept, positions.tolist(), BACKENDS["auto"])
        peak = min(policy.kept, n_losses)
    else:
        positions = np.arange(n_losses)
        losses = block_parallel_losses(loaded, stream.tokens, policy, progress=progress)
        peak = peak_kv(policy, n_losses)
    check_finite(losses, str(loaded.dtype))
    return Quality(losses, positions, peak, time.perf_counter() - started)


def speed_summary(speed: Speed, requested: str) -> dict[str, Any]:
    return {
        **_flat("tpot_ms", speed.tpot_ms),
        "decode_toks_per_sec": 1e3 / speed.tpot_ms.value,
        "tokens_per_segment": speed.tokens_per_segment,
        "segments": len(speed.segment_tpot_ms),
        "warmup_tokens": speed.warmup_tokens,
        "backend": speed.backend_used,
        "backend_requested": requested,
    }


def evaluate_fast(
    loaded: LoadedModel,
    stream: TokenStream,
    method: str,
    policy: EvictionPolicy,
    backend: Backend,
    progress: Progress | None = None,
) -> tuple[Quality, dict[str, Any]]:
    """Quality block-parallel, speed from a steady-state sample. Raises NonFiniteLossError."""
    started = time.perf_counter()
    quality = measure_quality(loaded, stream, method, policy, progress)
    speed = measure_speed(loaded, method, policy, backend, stream.tokens)
    runtime = {"runtime_sec": time.perf_counter() - started}
    return quality, quality.summary() | speed_summary(speed, backend.name) | runtime


def evaluate_decode_loop(
    loaded: LoadedModel,
    stream: TokenStream,
    method: str,
    policy: EvictionPolicy,
    backend: Backend,
    progress: Progress | None = None,
) -> tuple[Quality, dict[str, Any]]:
    """Quality and speed from decoding every token one by one. Raises NonFiniteLossError."""
    first_token = torch.from_numpy(stream.tokens[:1])
    with backend.active(), recorded_kernel(backend) as recorder:
        make_decoder(method, loaded, policy, backend).feed(first_token)
    with backend.active():
        run = decode_loop(make_decoder(method, loaded, policy, backend), stream.tokens, loaded.device, progress)
    check_finite(run.losses, str(loaded.dtype))
    quality = Quality(run.losses, np.arange(len(run.losses)), run.peak_kv, run.runtime_sec)
    rest = max(len(run.losses) - 1, 1)
    tpot_ms = 1e3 * (run.runtime_sec - run.first_token_sec) / rest
    return quality, quality.summary() | {
        "tpot_ms": tpot_ms,
        "decode_toks_per_sec": 1e3 / tpot_ms,
        "first_token_latency_sec": run.first_token_sec,
        "runtime_sec": run.runtime_sec,
        "backend": recorder.used,
        "backend_requested": backend.name,
    }


EVALUATORS = {"fast": evaluate_fast, "decode-loop": evaluate_decode_loop}
"""By protocol."""


def identity(
    loaded: LoadedModel, stream: TokenStream, method: str, policy: EvictionPolicy, protocol: str
) -> dict[str, Any]:
    """What is evaluated on what: the part of a flat result that is known beforehand."""
    return {
        "model": loaded.name,
        "model_digest": loaded.digest,
        "dataset": stream.label,
        "text_digest": stream.digest,
        "n_tokens": len(stream.tokens),
        "method": method,
        "protocol": protocol,
        **asdict(effective_policy(method, policy)),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": device_name(loaded.device),
        "threads": torch.get_num_threads() if loaded.device.type == "cpu" else None,
        "version": __version__,
    }


def _flat(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
