"""Quantized weights: time per token, and a token's products, one row times the matrices of a layer, by every way to
compute them. Each of those is a graph over copies of the weights, more than the L2 cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamllm.engine.device import copy_bandwidth, seconds_of
from streamllm.engine.quantization import GROUP
from tests.benchmarks.decode import Variant

from .scale import Result, Scale
from .speed import timed

SHAPES = ((7680, 2560), (10240, 2560), (2560, 10240), (50304, 2560))
"""(out, in) of Pythia-2.8B: queries, keys and values; MLP up and down; the head."""
FLUSHED = 250e6
REPLAYS = 15
TUNED = {"coordinate_descent_tuning": True}


def _linear(weight: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    return torch.nn.functional.linear(row, weight)


def _sum(weight: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    return (weight * row.reshape(-1)).sum(-1)


def _int8_sum(weight: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    return (weight.to(row.dtype) * row.reshape(-1)).sum(-1) * scale


def _int8_kernel(weight: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(row, weight, scale)


def _int4_kernel(weight: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(row, weight, GROUP, scale)


Way = Callable[[Tensor, Tensor, Tensor], Tensor]
WAYS: dict[str, tuple[Way, str, dict[str, Any] | None]] = {
    "linear": (_linear, "bfloat16", None),
    "sum, compiled": (_sum, "bfloat16", {}),
    "sum, compiled, tuned": (_sum, "bfloat16", TUNED),
    "int8 sum, compiled": (_int8_sum, "int8", {}),
    "int8 sum, compiled, tuned": (_int8_sum, "int8", TUNED),
    "int8 kernel": (_int8_kernel, "int8", None),
    "int4 kernel": (_int4_kernel, "int4", None),
}
"""What computes it, the weights' type, and inductor's options, None for what is not compiled."""


@torch.inference_mode()
def products(scale: Scale) -> Result:
    if scale.device.type != "cuda":
        return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
    bandwidth = copy_bandwidth(scale.device)
    rows = []
    for out, size in SHAPES:
        for name, (way, kind, options) in WAYS.items():
            row: dict[str, Any] = {"out": out, "in": size, "way": name}
            try:
                seconds, weight = _seconds(way, kind, options, out, size, scale.device)
                row |= {"us": 1e6 * seconds, "share of copy bandwidth": weight / seconds / bandwidth}
            except Exception as error:  # what does not run must not take the others along
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
    return {"ok": None, "rows": rows, "copy_gb_per_sec": bandwidth / 1e9}


def _seconds(
    way: Way, kind: str, options: dict[str, Any] | None, out: int, size: int, device: torch.device
) -> tuple[float, int]:
    """Of one product, and the bytes of its weights."""
    weight, scale = _weights(kind, out, size, device)
    copies = [weight.clone() for _ in range(math.ceil(FLUSHED / weight.nbytes))]
    row = torch.randn(1, size, device=device, dtype=torch.bfloat16)
    if options is not None:
        torch._dynamo.reset()
        way = torch.compile(way, fullgraph=True, dynamic=False, options=options)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            way(weight, scale, row)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            way(copy, scale, row)
    graph.replay()
    times = [seconds_of(graph.replay, device) for _ in range(REPLAYS)]
    return float(np.median(times)) / len(copies), weight.nbytes


def _weights(kind: str, out: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """And their scales, as the kernel of that type wants them."""
    bfloat16 = torch.bfloat16
    if kind == "bfloat16":
        return torch.randn(out, size, device=device, dtype=bfloat16), torch.ones(1, device=device)
    if kind == "int8":
        whole = torch.randint(-127, 128, (out, size), device=device, dtype=torch.int8)
        return whole, torch.rand(out, device=device, dtype=bfloat16)
    halves = torch.randint(0, 256, (out, size // 2), device=device, dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(halves, 2)
    return packed, torch.rand(size // GROUP, out, 2, device=device, dtype=bfloat16)


VARIANTS = [
    Variant("ring", execution=execution, quantization=quantization)
    for execution in ("cudagraph", "compile")
    for quantization in ("int8_weight_only", "int4_weight_only")
]

CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    "products": (products, 180),
    **{variant.name: (timed(variant), 300) for variant in VARIANTS},
}
