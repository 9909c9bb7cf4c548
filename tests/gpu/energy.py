"""Joules per token and time to first token by every method, each in turn with strict StreamingLLM by the ring; and how
often the energy counter moves."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from streamllm.engine.device import synchronize
from streamllm.engine.energy import EnergyCounter, energy_counter
from streamllm.errors import UnavailableError
from streamllm.measuring.energy import measure_energy
from streamllm.measuring.first_token import measure_first_token
from streamllm.measuring.timing import Reference, compile_step
from streamllm.policy import EvictionPolicy
from tests.benchmarks.decode import Variant

from .scale import Result, Scale

VARIANTS = (
    Variant("recompute"),
    Variant("mit"),
    Variant("ours"),
    Variant("ours", 64),
    Variant("ring"),
    Variant("ring", execution="cudagraph"),
    Variant("ring", 64, "cudagraph"),
)
_WATCHED_SEC = 2.0


def energy_of(variant: Variant) -> Callable[[Scale], Result]:
    def check(scale: Scale) -> Result:
        try:
            counter = energy_counter(scale.device)
        except UnavailableError as error:
            return {"ok": None, "rows": [], "skipped": str(error)}
        loaded = scale.model()
        policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4, compress_every=variant.compress_every)
        tokens, what = scale.tokens(4096) % loaded.vocabulary, variant.on(policy)
        reference = Reference.start(loaded, scale.total, tokens)
        compile_step(loaded, what, tokens)
        found = measure_energy(loaded, what, tokens, reference, counter)
        joules = found.summary()
        ms = reference.segment(1.0)
        row = {
            "variant": variant.name,
            "J/token": joules["measured_joules_per_token"],
            "low": joules["measured_joules_per_token_low"],
            "high": joules["measured_joules_per_token_high"],
            "ratio to ring": found.ratio.value,
            "ratio low": found.ratio.low,
            "ratio high": found.ratio.high,
            "watts of ring": found.summary()["reference_joules_per_token"] / ms * 1e3,
            "shortest segment s": found.segment_sec,
        }
        return {"ok": None, "rows": [row], "counter": found.covers}

    return check


def first_token_of(variant: Variant) -> Callable[[Scale], Result]:
    def check(scale: Scale) -> Result:
        loaded = scale.model()
        policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4, compress_every=variant.compress_every)
        what = variant.on(policy)
        found = measure_first_token(loaded, what, scale.tokens(4096) % loaded.vocabulary, loaded, scale.total)
        summary = found.summary()
        row = {
            "variant": variant.name,
            "prompt": found.prompt_tokens,
            "TTFT ms": summary["measured_ttft_ms"],
            "ratio to ring": found.times.ratio.value,
            "ratio low": found.times.ratio.low,
            "ratio high": found.times.ratio.high,
            "pairs": len(found.times.ms),
        }
        return {"ok": None, "rows": [row]}

    return check


def steps(scale: Scale) -> Result:
    """How often the counter moves, how long a reading takes, while the device copies and while it is idle."""
    try:
        counter = energy_counter(scale.device)
    except UnavailableError as error:
        return {"ok": None, "rows": [], "skipped": str(error)}
    source = torch.ones(2**26, device=scale.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        synchronize(scale.device)

    rows = [{"while": "copying", **_watched(counter, copy)}, {"while": "idle", **_watched(counter, lambda: None)}]
    return {"ok": None, "rows": rows, "counter": counter.covers}


def _watched(counter: EnergyCounter, work: Callable[[], object]) -> dict[str, float]:
    """Reads it for some seconds, with `work` before each reading."""
    seen: list[tuple[float, float]] = []
    reads: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < _WATCHED_SEC:
        work()
        now = time.perf_counter()
        joules = counter.joules()
        reads.append(1e3 * (time.perf_counter() - now))
        if not seen or joules != seen[-1][1]:
            seen.append((now, joules))
    gaps = 1e3 * np.diff([at for at, _ in seen[1:]])
    return {
        "steps": len(seen) - 1,
        "median ms between": float(np.median(gaps)) if len(gaps) else float("nan"),
        "longest ms": float(gaps.max()) if len(gaps) else float("nan"),
        "a reading ms": float(np.median(reads)),
        "watts": (seen[-1][1] - seen[1][1]) / (seen[-1][0] - seen[1][0]) if len(seen) > 2 else float("nan"),
    }


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    "energy counter": (steps, 60),
    **{f"energy {v.name}": (energy_of(v), 180) for v in VARIANTS},
    **{f"first token {v.name}": (first_token_of(v), 120) for v in VARIANTS[:5]},
}
