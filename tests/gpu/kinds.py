"""Layers of several kinds (windows of their own, learned sinks, soft caps, latent attention) and budgets of layers:
losses of every way that a model has, eager, captured and compiled, against float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.loading import prepare
from streamllm.engine.model import LoadedModel
from streamllm.policy import EvictionPolicy
from tests.zoo import KINDS, known, tiny

from .correctness import METHODS, float64_on_cpu, loop, small_model
from .exactness import waits
from .scale import Result, Scale

COMPILED = ("gemma3_text", "gpt_oss", "gemma2", "youtu", "smollm3", "mistral")
BUDGETS = ("pyramid:50", "2+1,45")
TOKENS = np.arange(3, 83) * 7 % 120
POLICIES = EvictionPolicy(n_sink=4, window_size=20), EvictionPolicy(n_sink=2, window_size=9, compress_every=4)
LIMIT = 1e-3
"""Nats, in float32."""


def _ways(execution: str, architecture: str) -> Iterator[tuple[str, str]]:
    if execution == "eager":
        yield from ((method, execution) for method in METHODS)
    elif execution != "compile" or architecture in COMPILED:
        yield "ring", execution


def architectures(execution: str) -> Callable[[Scale], Result]:
    def check(scale: Scale) -> Result:
        if execution == "cudagraph" and scale.device.type != "cuda":
            return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
        rows = []
        for architecture in known(KINDS):
            ways = list(_ways(execution, architecture))
            if not ways:
                continue
            model = tiny(architecture, **KINDS[architecture])
            exact = prepare(copy.deepcopy(model), architecture, "")  # which makes the model its own
            loaded = _in_single(model, architecture, scale.device)
            for policy in POLICIES:
                expected = block_parallel_losses(exact, TOKENS, policy)
                for method, how in ways:
                    what = Configuration(method, policy, execution=how)
                    rows.append({"architecture": architecture} | _held_to(expected, loaded, what))
        return {"ok": all(row["ok"] for row in rows), "rows": rows}

    return check


def _in_single(model: Any, architecture: str, device: torch.device) -> LoadedModel:
    """The same weights, and what else the model has by itself, such as how it computes experts."""
    single = tiny(architecture, torch.float32, **KINDS[architecture])
    single.load_state_dict(model.state_dict())
    return prepare(single.to(device), architecture, "")


def _held_to(expected: np.ndarray, loaded: LoadedModel, what: Configuration) -> dict[str, object]:
    """What raises is told, and takes no other along."""
    row: dict[str, object] = {"way": str(what)}
    try:
        error = abs(loop(loaded, what, TOKENS) - expected)
        evaluated = abs(block_parallel_losses(loaded, TOKENS, what.policy) - expected)
    except Exception as failed:
        return row | {"raised": f"{type(failed).__name__}: {failed}"[:300], "ok": False}
    largest = {"largest": float(error.max()), "evaluator's": float(evaluated.max())}
    waited = waits(loaded, what) if what.execution != "compile" and loaded.device.type == "cuda" else ""
    return row | largest | {"waited": waited, "ok": max(largest.values()) < LIMIT and not waited}


def budgets(scale: Scale) -> Result:
    """Layers that hold different numbers of tokens."""
    rows = []
    loaded = small_model(2, torch.float32, scale.device)
    exact = float64_on_cpu(loaded)
    executions = ("eager", "cudagraph", "compile") if scale.device.type == "cuda" else ("eager", "compile")
    for word in BUDGETS:
        for every in (1, 4):
            policy = EvictionPolicy(n_sink=2, window_size=22, compress_every=every, layer_budgets=word)
            expected = block_parallel_losses(exact, TOKENS, policy)
            ways = [("mit", "eager"), *(("ring", how) for how in executions)]
            for method, how in ways:
                what = Configuration(method, policy, execution=how)
                rows.append({"budgets": word} | _held_to(expected, loaded, what))
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    **{f"architectures {how}": (architectures(how), 240) for how in ("eager", "cudagraph", "compile")},
    "budgets": (budgets, 120),
}
