"""Time per token of every method, execution and quantization in turn, beside the floor: bytes at copy bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

from streamllm.backends import BACKENDS
from streamllm.device import copy_bandwidth
from streamllm.loaded import LoadedModel
from streamllm.policy import EvictionPolicy
from streamllm.profiling import profile_decoding
from streamllm.timing import bytes_per_token, compile_step, no_garbage_collection
from tests.benchmarks.decode import Variant
from tests.benchmarks.reporting import interleaved, segment_of, summary, warm

from .scale import Result, Scale

EAGER = (
    Variant("recompute"),
    Variant("mit"),
    Variant("ours"),
    Variant("ours", 64),
    Variant("ring"),
    Variant("ring", 64),
)
GRAPHED = (
    Variant("ring", execution="cudagraph"),
    Variant("ring", 64, "cudagraph"),
    Variant("ring", execution="cudagraph", backend="flash"),
    Variant("ring", 64, "cudagraph", backend="efficient"),
)
COMPILED = (
    Variant("ring", execution="compile"),
    Variant("ring", 64, "compile"),
    Variant("ring", execution="compile", backend="flash"),
)
QUANTIZED = (
    Variant("ring", execution="cudagraph", quantization="int8_weight_only"),
    Variant("ring", execution="compile", quantization="int8_weight_only"),
    Variant("ring", execution="cudagraph", quantization="int4_weight_only"),
    Variant("ring", execution="compile", quantization="int4_weight_only"),
)
REFERENCE = "ring R=1"


def variants(scale: Scale) -> list[Variant]:
    chosen = [*EAGER]
    if scale.device.type == "cuda":
        chosen += [*GRAPHED, *COMPILED]
    if find_spec("torchao") and scale.device.type == "cuda":
        chosen += QUANTIZED
    return chosen


def policy_of(variant: Variant, scale: Scale) -> EvictionPolicy:
    return EvictionPolicy(n_sink=4, window_size=scale.total - 4, compress_every=variant.compress_every)


def compiling(variant: Variant) -> Callable[[Scale], Result]:
    """Seconds until a step is compiled, in a process of its own; of a cold cache only the first time."""

    def check(scale: Scale) -> Result:
        if variant not in variants(scale):
            return {"ok": None, "rows": [], "skipped": "needs a CUDA device, and torchao for what is quantized"}
        loaded = scale.model(variant.quantization)
        started = time.perf_counter()
        policy = policy_of(variant, scale)
        backend = BACKENDS[variant.backend]
        compile_step(loaded, variant.method, policy, backend, scale.tokens(100), variant.execution)
        row = {"variant": variant.name, "compile seconds": time.perf_counter() - started}
        return {"ok": None, "rows": [row]}

    return check


@torch.inference_mode()
def decode(scale: Scale) -> Result:
    models: dict[str, LoadedModel] = {}
    decoders, failed, seconds = {}, [], {}
    with no_garbage_collection():
        for variant in variants(scale):
            started = time.perf_counter()
            try:
                if variant.quantization not in models:
                    models[variant.quantization] = scale.model(variant.quantization)
                what = models[variant.quantization], variant.method, policy_of(variant, scale)
                decoders[variant.name] = warm(*what, variant.backend, variant.execution)
            except Exception as error:  # what does not run must not take the others along
                failed.append({"variant": variant.name, "failed": f"{type(error).__name__}: {error}"[:300]})
            seconds[variant.name] = time.perf_counter() - started
        times = interleaved({name: segment_of(d, scale.segment_sec) for name, d in decoders.items()}, scale.rounds)
    bandwidth = copy_bandwidth(scale.device)
    rows = []
    for variant in variants(scale):
        if variant.name not in times:
            continue
        needed = bytes_per_token(models[variant.quantization], policy_of(variant, scale))
        floor = 1e3 * needed / bandwidth
        own = times[variant.name]
        found = summary(own)
        ratios = {
            other: summary([theirs / ours for theirs, ours in zip(times[other], own, strict=True)])["median"]
            for other in (REFERENCE, "recompute")
        }
        rows.append(
            {
                "variant": variant.name,
                "ms/token": found["median"],
                "low": found["low"],
                "high": found["high"],
                **{f"times as fast as {other}": ratio for other, ratio in ratios.items()},
                "MB/token": needed / 1e6,
                "share of copy bandwidth": None if variant.method == "recompute" else floor / found["median"],
                "seconds to warm up": seconds[variant.name],
            }
        )
    del decoders
    profiles = [
        {"variant": variant.name, **_profiled(models[variant.quantization], variant, scale)}
        for variant in variants(scale)
        if variant.name in times and variant.method != "recompute"
    ]
    return {"ok": not failed, "rows": rows + failed, "copy_gb_per_sec": bandwidth / 1e9, "profiles": profiles}


def _profiled(loaded: LoadedModel, variant: Variant, scale: Scale) -> Result:
    """Launches and kernel time per token, and where the time goes."""
    what = loaded, variant.method, policy_of(variant, scale), BACKENDS[variant.backend], scale.tokens(4096)
    try:
        found = profile_decoding(*what, variant.execution)
    except Exception as error:
        return {"profile failed": f"{type(error).__name__}: {error}"[:200]}
    return {
        "launches": found.launches,
        "kernel ms": sum(found.parts_ms.values()),
        **{f"{part} ms": ms for part, ms in found.parts_ms.items()},
        "largest": [(k.name[:60], round(k.calls_per_token, 1), round(k.ms_per_token, 4)) for k in found.kernels[:8]],
    }


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    **{f"compile {v.name}": (compiling(v), 400) for v in (*COMPILED, *QUANTIZED) if v.execution == "compile"},
    "decode": (decode, 560),
}
