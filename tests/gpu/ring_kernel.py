"""A ring's step as one launch a layer (`ring_triton`): is it right, what does a layer take, and what a whole step,
beside the same with `triton`, which leaves turning the sinks and writing the slots to torch or its compiler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.device import copy_bandwidth, seconds_of
from streamllm.explain.profiling import profile_decoding
from streamllm.measuring.timing import Reference, compile_step, no_garbage_collection, time_beside
from streamllm.policy import EvictionPolicy, KvDtype
from tests.benchmarks.reporting import warm

from .correctness import VOCABULARY, WITH_POSITIONS, float64_on_cpu, loop, small_model
from .scale import Result, Scale

FLUSHED = 250e6
REPLAYS = 15


def right(scale: Scale) -> Result:
    """Eager and captured loops over several wraps of the ring against the evaluator in float64 on the CPU; without
    sinks too."""
    ways = ("eager", "cudagraph") if scale.device.type == "cuda" else ("eager",)
    rows = []
    for kv_heads in (8, 2):
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
            loaded = small_model(kv_heads, dtype, scale.device)
            exact = float64_on_cpu(loaded)
            tokens = np.random.default_rng(0).integers(VOCABULARY, size=4 * 60)
            policies = [
                EvictionPolicy(n_sink=4, window_size=44, compress_every=r, positions=p) for r, p in WITH_POSITIONS
            ]
            for policy in (*policies, EvictionPolicy(n_sink=0, window_size=48)):
                expected = block_parallel_losses(exact, tokens, policy)
                for way in ways:
                    found = loop(loaded, Configuration("ring", policy, "ring_triton", way), tokens)
                    error = abs(found - expected)
                    worst = error.max() if dtype == torch.float32 else error.mean()
                    rows.append(
                        {
                            "heads": f"8/{kv_heads}x64",
                            "dtype": str(dtype).removeprefix("torch."),
                            "policy": str(policy),
                            "execution": way,
                            "largest": float(error.max()),
                            "mean": float(error.mean()),
                            "ok": bool(worst < limit),
                        }
                    )
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    size: int
    turned: int
    held: int

    @property
    def bytes(self) -> int:
        return 2 * self.kv_heads * self.held * self.size * 2


SHAPES = [Shape(*heads, held) for heads in ((32, 32, 80, 20), (32, 8, 128, 128)) for held in (2048, 8192)]
N_SINK = 4


class Ring:
    """A layer's ring and a new token, in bfloat16; the window is full."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        def some(*dims: int) -> Tensor:
            return torch.randn(1, *dims, device=device, dtype=torch.bfloat16)

        heads, kv_heads, size, turned, held = shape
        self.new = some(heads, 1, size), some(kv_heads, 1, size), some(kv_heads, 1, size)
        self.held = some(kv_heads, held, size), some(kv_heads, held, size)
        self.sinks = some(kv_heads, N_SINK, size)
        self.angles = torch.rand(1, turned, device=device), torch.rand(1, turned, device=device)
        self.position = torch.full((1,), 3 * held + 7, device=device)
        self.evicted = self.position + 1 - held
        self.finished = torch.zeros(kv_heads, dtype=torch.int32, device=device)
        slot = (self.position - N_SINK) % (held - N_SINK) + N_SINK
        self.slots = torch.cat((torch.arange(N_SINK, device=device), slot))

    def by_torch(self, mask: Tensor | None) -> Tensor:
        from streamllm.engine.triton_attention import flash_decoding

        query, key, value = self.new
        cos, sin = self.angles
        turned = cos.shape[-1]
        turning, fixed = self.sinks[..., :turned], self.sinks[..., turned:]
        first, second = turning.chunk(2, -1)
        sinks = (turning * cos + torch.cat((-second, first), -1) * sin).to(key.dtype)
        sinks = torch.cat((sinks, fixed), -1) if fixed.shape[-1] else sinks
        keys = self.held[0].index_copy_(2, self.slots, torch.cat((sinks, key), 2))
        values = self.held[1].index_copy_(2, self.slots[N_SINK:], value)
        return flash_decoding(query, keys, values, mask, 0.1)

    def in_one_launch(self, config: Any = None) -> Tensor:
        from streamllm.engine.triton_ring import attend_in_ring

        state = self.position, self.evicted, self.finished
        return attend_in_ring(*self.new, *self.held, self.sinks, *self.angles, *state, 0.1, N_SINK, False, config)


@torch.inference_mode()
def layer(scale: Scale) -> Result:
    """Microseconds a layer, of graphs over more rings than the L2 cache holds; the split's sizes varied one by one."""
    if scale.device.type != "cuda":
        return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
    from streamllm.engine.triton_ring import ring_cut

    bandwidth, rows = copy_bandwidth(scale.device), []
    for shape in SHAPES:
        rings = [Ring(shape, scale.device) for _ in range(math.ceil(FLUSHED / shape.bytes))]
        config = ring_cut(shape.heads // shape.kv_heads, torch.bfloat16)
        configs = [config, *(_others(config) if shape.held == 2048 else ())]
        difference = (rings[0].by_torch(None).float() - rings[0].in_one_launch().float()).abs().max().item()
        ways: dict[str, Callable[[Ring], Tensor]] = {"torch, triton": lambda ring: ring.by_torch(None)}
        for one in configs:
            ways[f"one launch {tuple(one)}"] = lambda ring, one=one: ring.in_one_launch(one)
        with ThreadPoolExecutor(12) as compiling:
            failed = dict(zip(ways, compiling.map(_error, ways.values(), repeat(rings[0])), strict=True))
        for name, way in ways.items():
            row: dict[str, Any] = {
                "shape": f"{shape.heads}/{shape.kv_heads} x {shape.size}",
                "keys": shape.held,
                "way": name,
            }
            if failed[name]:
                rows.append(row | {"failed": failed[name]})
                continue
            us = 1e6 * _replayed(way, rings) / len(rings)
            rows.append(row | {"us": us, "share of copy bandwidth": shape.bytes / us * 1e6 / bandwidth})
        rows[-1]["difference"] = difference
    return {"ok": None, "rows": rows, "copy_gb_per_sec": bandwidth / 1e9}


def _others(config: Any) -> Iterator[Any]:
    """The cut with one of its sizes changed."""
    for name, values in {
        "block": (16, 32, 64, 128),
        "warps": (1, 2, 4),
        "stages": (2, 3, 4),
        "programs": (1, 2, 3, 6),
    }.items():
        yield from (config._replace(**{name: value}) for value in values if value != getattr(config, name))


def _error(way: Callable[[Ring], Tensor], ring: Ring) -> str:
    try:
        with torch.inference_mode():
            way(ring)
    except Exception as error:  # what does not run must not take the others along
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def _replayed(way: Callable[[Ring], Tensor], rings: list[Ring]) -> float:
    """Seconds of all rings, one after the other."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for ring in rings:
            way(ring)
    graph.replay()
    return float(np.median([seconds_of(graph.replay, rings[0].position.device) for _ in range(REPLAYS)]))


def steps(execution: str, *variants: tuple[int, KvDtype]) -> Callable[[Scale], Result]:
    """Whole steps with both kernels, beside the same reference: R, and the number format of keys and values."""

    @torch.inference_mode()
    def check(scale: Scale) -> Result:
        if scale.device.type != "cuda":
            return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
        loaded, tokens, rows = scale.model(), scale.tokens(4096), []
        reference = Reference.start(loaded, scale.total, tokens)
        policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4)
        for every, kv_dtype in variants:
            for backend in ("triton", "ring_triton"):
                kept = replace(policy, compress_every=every, kv_dtype=kv_dtype)
                what = Configuration("ring", kept, backend, execution)
                compile_step(loaded, what, tokens)
                with no_garbage_collection():
                    decoder = warm(loaded, what)
                times = time_beside(decoder, reference)
                found = profile_decoding(loaded, what, tokens)
                rows.append(
                    {
                        "step": str(what),
                        "ms": float(np.median(times.ms)),
                        "ratio to a captured ring": times.ratio.value,
                        "low": times.ratio.low,
                        "high": times.ratio.high,
                        "launches": found.launches,
                        "kernel ms": sum(found.parts_ms.values()),
                        "largest": [
                            (k.name[:60], round(k.calls_per_token, 1), round(k.ms_per_token, 4))
                            for k in found.kernels[:8]
                        ],
                    }
                )
        return {"ok": None, "rows": rows}

    return check


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    "right": (right, 120),
    "layer": (layer, 120),
    "captured": (steps("cudagraph", (1, "auto"), (64, "auto")), 120),
    "compiled": (steps("compile", (1, "auto")), 240),
    "float8 captured": (steps("cudagraph", (1, "float8_e4m3"), (64, "float8_e4m3")), 120),
    "float8 compiled": (steps("compile", (1, "float8_e4m3")), 240),
}
