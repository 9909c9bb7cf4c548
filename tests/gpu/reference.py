"""Which reference: a captured step, or an eager one, which waits for Python. The same is timed beside both in several
processes: the better reference is the one whose ratios differ less from process to process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.measuring.timing import Reference, compile_step, no_garbage_collection, time_beside
from streamllm.policy import EvictionPolicy
from tests.benchmarks.reporting import warm

from .correctness import VOCABULARY, small_model
from .scale import Result, Scale

PROCESSES = 3
TIMED = ("ours", "eager"), ("ring", "cudagraph"), ("ring", "compile")


@torch.inference_mode()
def beside_both(scale: Scale) -> Result:
    if scale.device.type != "cuda":
        return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
    loaded, tokens = scale.model(), scale.tokens(4096)
    policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4)
    references = {way: Reference.by(loaded, scale.total, tokens, way) for way in ("eager", "cudagraph")}
    rows: list[dict[str, Any]] = []
    for method, execution in TIMED:
        what = Configuration(method, policy, execution=execution)
        compile_step(loaded, what, tokens)
        with no_garbage_collection():
            decoder = warm(loaded, what)
        for way, reference in references.items():
            times = time_beside(decoder, reference)
            rows.append(
                {
                    "variant": f"{method} {execution}",
                    "reference": way,
                    "ratio": times.ratio.value,
                    "low": times.ratio.low,
                    "high": times.ratio.high,
                    "pairs": len(times.ms),
                    "reference ms": float(np.median(times.reference_ms)),
                }
            )
    return {"ok": None, "rows": rows}


@torch.inference_mode()
def not_captured(scale: Scale) -> Result:
    """A model whose step waits for the device cannot be captured: its reference is eager, and all goes on."""
    if scale.device.type != "cuda":
        return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
    loaded, tokens = small_model(2, torch.bfloat16, scale.device), scale.tokens(200) % VOCABULARY
    policy = EvictionPolicy(n_sink=4, window_size=44)
    handle = loaded.model.lm_head.register_forward_pre_hook(lambda _, inputs: inputs[0].sum().item() and None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reference = Reference.start(loaded, policy.kept, tokens)
    handle.remove()
    times = time_beside(warm(loaded, Configuration("ring", policy, execution="cudagraph")), reference)
    captured = Reference.start(loaded, policy.kept, tokens)
    row = {
        "reference": reference.execution,
        "said": "; ".join(str(warning.message) for warning in said)[:200],
        "captured beside it": times.ratio.value,
        "next reference": captured.execution,
    }
    return {"ok": reference.execution == "eager" and captured.execution == "cudagraph", "rows": [row]}


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    "not captured": (not_captured, 90),
    **{f"process {number}": (beside_both, 150) for number in range(1, PROCESSES + 1)},
}
