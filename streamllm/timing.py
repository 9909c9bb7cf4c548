"""Speed: time per output token (TPOT) of a decoder in the steady state of a full cache."""

from __future__ import annotations

import gc
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from .attention import recorded_kernel
from .backends import Backend
from .decoding import Decoder
from .loaded import LoadedModel
from .methods import effective_policy, make_decoder
from .policy import EvictionPolicy, steady_state
from .quality import Estimate, median_interval

SEGMENTS = 12
SEGMENT_SEC = 0.1
WARMUP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Speed:
    tpot_ms: Estimate
    """Median over segments. A segment's TPOT is its mean: a median over tokens would hide a lazily paid prune."""
    segment_tpot_ms: list[float]
    tokens_per_segment: int
    warmup_tokens: int
    backend_used: str


@torch.inference_mode()
def measure_speed(
    loaded: LoadedModel, method: str, policy: EvictionPolicy, backend: Backend, tokens: np.ndarray
) -> Speed:
    """Fills the cache, warms up, then times segments of whole prune cycles. Token ids are taken from `tokens`, over and
    over; speed does not depend on them."""
    policy = effective_policy(method, policy)
    steady = steady_state(policy)
    decoder = make_decoder(method, loaded, policy, backend)
    stream = iter(cycle(torch.from_numpy(tokens).to(loaded.device).split(1)))
    with backend.active(), _no_garbage_collection():
        prefill = max(policy.kept - 1, 1)
        decoder.feed(torch.cat(list(islice(stream, prefill))))
        with recorded_kernel(backend) as recorder:
            decoder.feed(next(stream))
        period = steady.cycle if steady else 1
        growing = max(steady.start - prefill - 1, 0) if steady else 0
        warmup = growing + period * math.ceil(WARMUP_TOKENS / period)
        _segment(decoder, stream, growing, loaded.device)
        pace = _segment(decoder, stream, warmup - growing, loaded.device)
        length = period * math.ceil(SEGMENT_SEC / pace / period)
        segments = [_segment(decoder, stream, length, loaded.device) for _ in range(SEGMENTS)]
    tpot = [1e3 * seconds for seconds in segments]
    return Speed(median_interval(np.array(tpot)), tpot, length, warmup, recorder.used)


def _segment(decoder: Decoder, stream: Iterator[torch.Tensor], length: int, device: torch.device) -> float:
    """Decodes `length` tokens; mean seconds per token."""
    tokens = list(islice(stream, length))
    _synchronize(device)
    started = time.perf_counter()
    for token in tokens:
        decoder.feed(token)
    _synchronize(device)
    return (time.perf_counter() - started) / max(length, 1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a segment would be timed with it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@cache
def device_name(device: torch.device) -> str:
    """What the speed was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def limit_threads(count: int | None) -> None:
    """Keeps torch to `count` threads; OpenMP must not spin where processes share cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if count is not None:
        torch.set_num_threads(count)
