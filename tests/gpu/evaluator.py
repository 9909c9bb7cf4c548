"""The block-parallel evaluator by the size of its blocks, beside the plain causal forward of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from streamllm.engine.block_parallel import block_parallel_losses, default_block
from streamllm.engine.device import empty_cache, seconds_of
from streamllm.engine.model import LoadedModel
from streamllm.policy import EvictionPolicy
from tests.benchmarks.evaluator import plain_losses
from tests.benchmarks.reporting import interleaved, random_model, summary

from .scale import Result, Scale

BLOCKS = (256, 512, 1024, 2048, 4096)


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


@torch.inference_mode()
def many_policies(scale: Scale) -> Result:
    """What policies as the batch of one forward could give: plain causal forwards of as many streams as a batch, beside
    the evaluator, which takes one policy after another in larger blocks."""
    rows: list[dict[str, Any]] = []
    for shape in ("pythia-70m", "pythia-410m", scale.shape) if scale.device.type == "cuda" else (scale.shape,):
        loaded = random_model(shape)
        timed = {name: _per_token(work, scale) for name, work in _one_or_many(loaded, scale)}
        for name, values in interleaved(timed, scale.rounds).items():
            rows.append({"model": shape, "way": name, "us/token of a policy": 1e3 * summary(values)["median"]})
        del loaded, timed
        empty_cache()
    return {"ok": None, "rows": rows, "keys": scale.total}


def _one_or_many(loaded: LoadedModel, scale: Scale) -> Iterator[tuple[str, tuple[int, Callable[[], object]]]]:
    """With the number of policies it is for."""
    tokens = scale.tokens(scale.evaluated_tokens + 1)
    policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4)
    for block in sorted({256, default_block(loaded), scale.evaluated_tokens // 2, scale.evaluated_tokens}):
        yield f"evaluator, blocks of {block}", (1, partial(block_parallel_losses, loaded, tokens, policy, block))
    for streams, block in STREAMS:
        work = partial(plain_losses, loaded, tokens, scale.total, block, streams)
        yield f"plain, {streams} as a batch, blocks of {block}", (streams, work)


def _per_token(counted: tuple[int, Callable[[], object]], scale: Scale) -> Callable[[], float]:
    """Of each policy, in milliseconds; warmed up."""
    streams, work = counted
    work()
    return lambda: 1e3 * seconds_of(work, scale.device) / scale.evaluated_tokens / streams


STREAMS = (1, 2048), (4, 256), (8, 256), (4, 1024)
"""And tokens of each at a time."""

CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    "blocks": (blocks, 300),
    "many policies": (many_policies, 150),
}
