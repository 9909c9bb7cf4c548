"""Time to first token: from an empty cache and a prompt, as long as the study's total KV, to the logits that the first
token is picked by. The reference's own is taken in turn with it.

A prompt is fed as the policy allows: in one forward pass as long as nothing is evicted before its last token, which is
so under a nominal cap; else in several, each up to the next eviction. The cache is allocated meanwhile; compiling comes
before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..configuration import Configuration
from ..engine.decoder import make_decoder
from ..engine.device import synchronize
from ..engine.model import LoadedModel
from ..policy import EvictionPolicy, Schedule, strict_policy
from .pairing import PairedTimes, take_pairs
from .quality import median_interval
from .timing import no_garbage_collection

WARMUP = 2
"""Prompts before those that count."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Times from an empty cache to the first token's logits, in turn with the reference's."""

    times: PairedTimes
    """Milliseconds for the whole prompt."""
    prompt_tokens: int
    seconds: float
    """Time to measure all this."""

    def summary(self) -> dict[str, float | int]:
        return {
            **self.times.ratio.flat("ttft_ratio"),
            **median_interval(np.array(self.times.ms)).flat("measured_ttft_ms"),
            "reference_ttft_ms": float(np.median(self.times.reference_ms)),
            "ttft_prompt_tokens": self.prompt_tokens,
            "speed_sec": self.seconds,
        }


@torch.inference_mode()
def measure_first_token(
    loaded: LoadedModel, what: Configuration, tokens: np.ndarray, beside: LoadedModel, total: int
) -> FirstToken:
    """A prompt of `total` tokens, from a text over and over. beside: the model of the reference."""
    started = time.perf_counter()
    own = _prompted(loaded, what, tokens, total)
    reference = _prompted(beside, Configuration("ring", strict_policy(total)), tokens, total)
    with no_garbage_collection():
        for _ in range(WARMUP):
            own()
            reference()
        return FirstToken(take_pairs(own, reference), total, time.perf_counter() - started)


def _prompted(loaded: LoadedModel, what: Configuration, tokens: np.ndarray, total: int) -> Callable[[], float]:
    """Takes one prompt in, with a cache of its own; returns the milliseconds that it took."""
    kernel = what.kernel
    sizes = pieces(what.effective, len(loaded.layers), total)
    prompt = torch.from_numpy(tokens).to(loaded.device).repeat(math.ceil(total / len(tokens)))[:total].split(sizes)

    def fill() -> float:
        with kernel.active():
            decoder = make_decoder(loaded, what)
            synchronize(loaded.device)
            started = time.perf_counter()
            for piece in prompt:
                decoder.feed(piece)
            synchronize(loaded.device)
            return 1e3 * (time.perf_counter() - started)

    return fill


def pieces(policy: EvictionPolicy, n_layers: int, count: int) -> list[int]:
    """Lengths of the parts that a prompt of so many tokens is fed in: as few as can be, with no eviction before the
    last token of any."""
    schedules = [Schedule(own) for own in dict.fromkeys(policy.of_layers(n_layers))]
    evicts = [max(schedule.after_token() for schedule in schedules) > 0 for _ in range(count)]
    ends = [n + 1 for n, does in enumerate(evicts[:-1]) if does] + [count]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
