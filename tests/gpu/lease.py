"""Whether a time taken beside busy processes is that taken alone: seven, as the other workers of a node of eight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from streamllm.policy import EvictionPolicy
from streamllm.timing import no_garbage_collection
from tests.benchmarks.reporting import busy_processes, interleaved, segment_of, warm

from .scale import Result, Scale

BUSY = 7


@torch.inference_mode()
def beside_busy_processes(scale: Scale) -> Result:
    loaded = scale.model()
    policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4)
    names = ("ring", "eager"), ("ours", "eager"), ("ring", "cudagraph")
    chosen = names if scale.device.type == "cuda" else names[:2]
    with no_garbage_collection():
        ways = {
            f"{method} {execution}": segment_of(warm(loaded, method, policy, "auto", execution), scale.segment_sec)
            for method, execution in chosen
        }
        alone = interleaved(ways, scale.rounds)
        with busy_processes(BUSY):
            busy = interleaved(ways, scale.rounds)
        again = interleaved(ways, scale.rounds)
    rows = [
        {
            "way": name,
            "alone ms": float(np.median(alone[name])),
            "busy ms": float(np.median(busy[name])),
            "alone again ms": float(np.median(again[name])),
            "busy / alone": float(2 * np.median(busy[name]) / (np.median(alone[name]) + np.median(again[name]))),
        }
        for name in ways
    ]
    return {"ok": None, "rows": rows}


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {"busy": (beside_busy_processes, 200)}
