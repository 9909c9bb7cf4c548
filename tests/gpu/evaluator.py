"""The block-parallel evaluator by the size of its blocks, beside the plain causal forward of the same tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from streamllm.engine.block_parallel import block_parallel_losses, default_block
from streamllm.engine.device import seconds_of
from streamllm.policy import EvictionPolicy
from tests.benchmarks.evaluator import plain_losses
from tests.benchmarks.reporting import interleaved, summary

from .scale import Result, Scale

BLOCKS = (256, 512, 1024, 2048)


@torch.inference_mode()
def blocks(scale: Scale) -> Result:
    loaded = scale.model()
    tokens = scale.tokens(scale.evaluated_tokens + 1)
    policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4)
    chosen = default_block(loaded)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: 1e3 * seconds_of(work, scale.device) / scale.evaluated_tokens

    ways: dict[str, Callable[[], object]] = {}
    for block in BLOCKS if scale.device.type != "cpu" else BLOCKS[:2]:
        ways[f"plain {block}"] = lambda block=block: plain_losses(loaded, tokens, scale.total, block)
        ways[f"evaluator {block}"] = lambda block=block: block_parallel_losses(loaded, tokens, policy, block)
    for work in ways.values():
        work()
    times = interleaved({name: timed(work) for name, work in ways.items()}, scale.rounds)
    plain = np.min([np.median(values) for name, values in times.items() if name.startswith("plain")])
    rows = [
        {"way": name, "us/token": 1e3 * summary(values)["median"], "times the best plain": np.median(values) / plain}
        for name, values in times.items()
    ]
    return {"ok": None, "rows": rows, "default_block": chosen}


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {"blocks": (blocks, 300)}
