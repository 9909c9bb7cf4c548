"""Whether a time taken beside busy processes is that taken alone: seven, as the other workers of a node of eight. And
whether another process on the GPU is seen."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.device import foreign_processes
from streamllm.measuring.timing import no_garbage_collection
from streamllm.policy import EvictionPolicy
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
            f"{method} {execution}": segment_of(
                warm(loaded, Configuration(method, policy, execution=execution)), scale.segment_sec
            )
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


def foreign(scale: Scale) -> Result:
    """Another process that computes on the GPU is seen, and gone when it has gone."""
    if scale.device.type != "cuda":
        return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
    torch.ones(1, device=scale.device)
    context = multiprocessing.get_context("spawn")
    ready, over = context.Event(), context.Event()
    other = context.Process(target=_occupy, args=(ready, over))
    alone = foreign_processes(scale.device)
    other.start()
    ready.wait(60)
    beside = foreign_processes(scale.device)
    over.set()
    other.join()
    return {"ok": len(beside) == len(alone) + 1, "rows": [{"alone": alone, "beside another": beside}]}


def _occupy(ready: Any, over: Any) -> None:
    torch.ones(2**20, device="cuda").sum().item()
    ready.set()
    over.wait(60)


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    "busy": (beside_busy_processes, 200),
    "foreign": (foreign, 90),
}
