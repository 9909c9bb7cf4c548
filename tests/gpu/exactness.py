"""However a step is run, and however long the stream: the same losses; and nothing in a step waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.methods.ours import RerotatedCache
from streamllm.engine.model import LoadedModel
from streamllm.policy import EvictionPolicy
from tests.benchmarks.drift import NaivelyRerotatedCache, key_error, naive_losses

from .correctness import METHODS, VOCABULARY, WITH_POSITIONS, loop, small_model
from .scale import Result, Scale


def executions(scale: Scale) -> Result:
    """Eager, captured and compiled steps over three wraps of the ring."""
    ways = ("cudagraph", "compile") if scale.device.type == "cuda" else ("compile",)
    rows = []
    for kv_heads in (8, 2):
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
            loaded = small_model(kv_heads, dtype, scale.device)
            for every, positions in WITH_POSITIONS:
                policy = EvictionPolicy(n_sink=4, window_size=44, compress_every=every, positions=positions)
                tokens = np.random.default_rng(0).integers(VOCABULARY, size=4 * 60)
                expected = loop(loaded, Configuration("ring", policy), tokens)
                for way in ways:
                    if way == "compile" and dtype == torch.bfloat16 and kv_heads == 8:
                        continue  # a minute of compiling that would show nothing new
                    found = loop(loaded, Configuration("ring", policy, execution=way), tokens)
                    error = abs(found - expected)
                    worst = error.max() if dtype == torch.float32 else error.mean()
                    rows.append(
                        {
                            "heads": f"8/{kv_heads}x64",
                            "dtype": str(dtype).removeprefix("torch."),
                            "R": every,
                            "positions": positions,
                            "execution": way,
                            "largest": float(error.max()),
                            "mean": float(error.mean()),
                            "ok": bool(worst < limit),
                        }
                    )
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def synchronisation(scale: Scale) -> Result:
    """Decode steps and prunes with every wait for the device an error."""
    if scale.device.type != "cuda":
        return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
    rows = []
    for kv_heads in (8, 2):
        loaded = small_model(kv_heads, torch.bfloat16, scale.device)
        for method in METHODS:
            for every, positions in WITH_POSITIONS:
                policy = EvictionPolicy(n_sink=4, window_size=44, compress_every=every, positions=positions)
                for execution in ("eager", "cudagraph") if method == "ring" else ("eager",):
                    row = {"heads": f"8/{kv_heads}x64", "method": method, "R": every, "positions": positions}
                    what = Configuration(method, policy, execution=execution)
                    rows.append(row | {"execution": execution, "raised": waits(loaded, what)})
    return {"ok": not any(row["raised"] for row in rows), "rows": rows}


@torch.inference_mode()
def waits(loaded: LoadedModel, what: Configuration) -> str:
    """The first wait for the device in forty tokens of a full cache, of fewer than seventy; empty if nothing waits."""
    tokens = torch.arange(110, device=loaded.device).split(1)
    with BACKENDS["auto"].active():
        decoder = make_decoder(loaded, what)
        for token in tokens[:70]:
            decoder.feed(token)
        try:
            with _waiting_is_an_error():
                for token in tokens[70:]:
                    decoder.feed(token)
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return ""


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def long_streams(method: str, every: int, execution: str, far: bool = False) -> Callable[[Scale], Result]:
    """At a real model's shape and dtype: a decode loop against the evaluator, after a whole window of moves."""

    def check(scale: Scale) -> Result:
        way = "eager" if scale.device.type == "cpu" else execution
        loaded = peaked(scale.model())
        policy = EvictionPolicy(n_sink=4, window_size=scale.total - 4, compress_every=every)
        tokens = scale.tokens(scale.far_tokens if far else scale.loop_tokens)
        expected = block_parallel_losses(loaded, tokens, policy)
        if method == "naive ours":
            found = naive_losses(loaded, policy, tokens)
        else:
            found = loop(loaded, Configuration(method, policy, execution=way), tokens)
        error = (found - expected)[-scale.total // 2 :]
        row = {
            "method": method,
            "R": every,
            "execution": way,
            "tokens": len(tokens),
            "mean difference": float(error.mean()),
            "mean |difference|": float(abs(error).mean()),
            "largest": float(abs(error).max()),
        }
        if method.endswith("ours") and every == 1:
            cache = RerotatedCache if method == "ours" else NaivelyRerotatedCache
            row["error of the oldest key"] = key_error(loaded, scale.total - 4, cache)
        # What is wrong by design is measured only.
        return {"ok": None if method == "naive ours" else bool(abs(error).mean() < 0.05), "rows": [row]}

    return check


def peaked(loaded: LoadedModel) -> LoadedModel:
    """With queries and keys of twice the size: random weights attend too evenly for a wrong position to show."""
    size = loaded.head_size
    with torch.no_grad():
        for layer in loaded.model.gpt_neox.layers:
            parameter = layer.attention.query_key_value.weight
            parameter.view(-1, 3, size, parameter.shape[1])[:, :2].mul_(2)
    return replace(loaded, name=f"{loaded.name}, peaked")


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    "executions": (executions, 300),
    "synchronisation": (synchronisation, 120),
    "ours R=1": (long_streams("ours", 1, "eager"), 300),
    "ours R=64": (long_streams("ours", 64, "eager"), 300),
    "mit R=1": (long_streams("mit", 1, "eager"), 300),
    "ring R=1": (long_streams("ring", 1, "cudagraph"), 300),
    "naive ours R=1": (long_streams("naive ours", 1, "eager"), 300),
    "ring far into a stream": (long_streams("ring", 1, "cudagraph", far=True), 300),
}
