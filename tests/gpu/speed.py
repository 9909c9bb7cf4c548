"""Time per token by every method and execution, beside the floor: the bytes that must be read, at copy bandwidth.

Each in a process of its own, in turn with strict StreamingLLM by the ring, eager, as all times of the engine are: by
their ratios to it two of them compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.device import copy_bandwidth
from streamllm.engine.model import LoadedModel
from streamllm.explain.profiling import profile_decoding
from streamllm.measuring.timing import (
    Reference,
    bytes_per_token,
    compile_step,
    no_garbage_collection,
    time_beside,
    used_backend,
)
from streamllm.policy import EvictionPolicy
from tests.benchmarks.decode import Variant
from tests.benchmarks.reporting import summary, warm

from .scale import Result, Scale

VARIANTS = (
    Variant("recompute"),
    Variant("mit"),
    Variant("ours"),
    Variant("ours", 64),
    Variant("ring"),
    Variant("ring", 64),
    Variant("ring", execution="cudagraph"),
    Variant("ring", 64, "cudagraph"),
    Variant("ring", execution="compile"),
    Variant("ring", 64, "compile"),
)


def timed(variant: Variant) -> Callable[[Scale], Result]:
    @torch.inference_mode()
    def check(scale: Scale) -> Result:
        if variant.execution != "eager" and scale.device.type != "cuda":
            return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
        if variant.quantization != "none" and find_spec("torchao") is None:
            return {"ok": None, "rows": [], "skipped": "needs torchao"}
        plain = scale.model()
        loaded = plain if variant.quantization == "none" else scale.model(variant.quantization)
        policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4, compress_every=variant.compress_every)
        tokens, what = scale.tokens(4096) % loaded.vocabulary, variant.on(policy)
        reference = Reference.start(plain, scale.total, tokens)
        started = time.perf_counter()
        compile_step(loaded, what, tokens)
        compiled = time.perf_counter() - started
        with no_garbage_collection():
            decoder = warm(loaded, what)
        times = time_beside(decoder, reference)
        with what.kernel.active():
            kernel = used_backend(loaded, what, tokens)
        del decoder
        milliseconds, bandwidth = summary(list(times.ms)), copy_bandwidth(scale.device)
        needed = bytes_per_token(loaded, policy)
        row: dict[str, Any] = {
            "variant": variant.name,
            "ms/token": milliseconds["median"],
            "low": milliseconds["low"],
            "high": milliseconds["high"],
            "ratio to ring eager": times.ratio.value,
            "ratio low": times.ratio.low,
            "ratio high": times.ratio.high,
            "kernel": kernel,
        }
        if variant.execution != "eager":
            row["compile or capture s"] = compiled
        if variant.method != "recompute":
            row["share of copy bandwidth"] = 1e3 * needed / bandwidth / milliseconds["median"]
            row |= _profiled(loaded, what, tokens)
        return {"ok": None, "rows": [row], "copy_gb_per_sec": bandwidth / 1e9, "mb_per_token": needed / 1e6}

    return check


def _profiled(loaded: LoadedModel, what: Configuration, tokens: np.ndarray) -> dict[str, Any]:
    """Launches and kernel time per token, and where the time goes."""
    found = profile_decoding(loaded, what, tokens)
    return {
        "launches": found.launches,
        "kernel ms": sum(found.parts_ms.values()),
        "parts": {part: round(ms, 4) for part, ms in found.parts_ms.items()},
        "largest": [(k.name[:60], round(k.calls_per_token, 1), round(k.ms_per_token, 4)) for k in found.kernels[:8]],
    }


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {v.name: (timed(v), 240) for v in VARIANTS}
