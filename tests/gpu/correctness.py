"""Which kernels run, and whether every method computes with each what it should: against float64 on the CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.device import empty_cache
from streamllm.engine.loading import prepare
from streamllm.engine.model import LoadedModel
from streamllm.engine.probing import probe_backend
from streamllm.policy import KV_DTYPES, EvictionPolicy, Positions

from .scale import Result, Scale

HEADS = {"32/32x80": (32, 32, 80), "32/8x128": (32, 8, 128)}
VOCABULARY = 512


def kernels(scale: Scale) -> Result:
    """Backend by backend: what runs for one query, by heads, dtype and keys held."""
    rows = []
    for shape, (heads, kv_heads, size) in HEADS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for held in (1, 8, 2048):
                row: dict[str, Any] = {"heads": shape, "dtype": _name(dtype), "keys": held}
                for name, backend in BACKENDS.items():
                    probe = probe_backend(backend, scale.device, dtype, size, heads, kv_heads, held)
                    row[name] = probe.kernel or f"- ({(probe.error or '')[:100]})"
                rows.append(row)
    # auto never fails, and never takes cuDNN
    ok = all(row["auto"][0] != "-" and "cudnn" not in row["auto"] for row in rows)
    return {"ok": ok, "rows": rows}


def losses(scale: Scale) -> Result:
    """Decode loops by every method and backend, and the evaluator, against the evaluator in float64 on the CPU.

    In bfloat16 the mean difference counts: it is compared with that of plain re-computation by eager attention."""
    rows = []
    for kv_heads in (8, 2):
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
            loaded = small_model(kv_heads, dtype, scale.device)
            exact = float64_on_cpu(loaded)
            tokens = np.random.default_rng(0).integers(VOCABULARY, size=128)
            for every, positions in WITH_POSITIONS:
                policy = EvictionPolicy(n_sink=4, window_size=44, compress_every=every, positions=positions)
                expected = block_parallel_losses(exact, tokens, policy)
                for name, found in _all_ways(loaded, policy, tokens):
                    error = abs(found - expected)
                    worst = error.max() if dtype == torch.float32 else error.mean()
                    rows.append(
                        {
                            "heads": f"8/{kv_heads}x64",
                            "dtype": _name(dtype),
                            "R": every,
                            "positions": positions,
                            "way": name,
                            "largest": float(error.max()),
                            "mean": float(error.mean()),
                            "ok": bool(worst < limit),
                        }
                    )
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def _all_ways(loaded: LoadedModel, policy: EvictionPolicy, tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    found = [("evaluator", block_parallel_losses(loaded, tokens, policy))]
    config = loaded.config
    for name, backend in BACKENDS.items():
        heads = config.num_attention_heads, config.num_key_value_heads
        if not probe_backend(backend, loaded.device, loaded.dtype, loaded.head_size, *heads, policy.kept).available:
            continue
        found += [(f"{method} {name}", loop(loaded, Configuration(method, policy, name), tokens)) for method in METHODS]
    return found


METHODS = ("mit", "ours", "ring")
WITH_POSITIONS: tuple[tuple[int, Positions], ...] = ((1, "compact"), (8, "compact"), (8, "keep"))
"""R, and where survivors of a prune stand."""


def formats(scale: Scale) -> Result:
    """Caches of another number format than the model, in float32: loops by every method, the ring's by its own kernel
    and as a graph too, against the evaluator in float64 on the CPU, which rounds what the method rounds.

    Where what is computed lies between two numbers of the format, a rounding of the computation decides: so the middle
    difference counts, beside what rounding does at all."""
    rows = []
    for kv_heads in (8, 2):
        loaded = small_model(kv_heads, torch.float32, scale.device)
        exact = float64_on_cpu(loaded)
        tokens = np.random.default_rng(0).integers(VOCABULARY, size=128)
        for kv_dtype in KV_DTYPES[1:]:
            policy = EvictionPolicy(n_sink=4, window_size=44, compress_every=8, kv_dtype=kv_dtype)
            rounded = block_parallel_losses(exact, tokens, policy)
            effect = float(np.median(abs(rounded - _unrounded(exact, tokens, policy))))
            for what in _kept(loaded, policy):
                expected = block_parallel_losses(exact, tokens, policy, keys=what.keys)
                error = abs(loop(loaded, what, tokens) - expected)
                middle = float(np.median(error))
                row = {"heads": f"8/{kv_heads}x64", "format": kv_dtype, "way": str(what), "largest": float(error.max())}
                rows.append(row | {"middle": middle, "of rounding": effect, "ok": middle < 0.2 * effect})
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def _unrounded(loaded: LoadedModel, tokens: np.ndarray, policy: EvictionPolicy) -> np.ndarray:
    return block_parallel_losses(loaded, tokens, replace(policy, kv_dtype="auto"))


def _kept(loaded: LoadedModel, policy: EvictionPolicy) -> list[Configuration]:
    ways = [Configuration(method, policy) for method in METHODS]
    config = loaded.config
    heads = config.num_attention_heads, config.num_key_value_heads
    ring = BACKENDS["ring_triton"]
    if probe_backend(ring, loaded.device, loaded.dtype, loaded.head_size, *heads, policy.kept).available:
        ways.append(Configuration("ring", policy, "ring_triton"))
    if loaded.device.type == "cuda":
        ways.append(Configuration("ring", policy, execution="cudagraph"))
    return ways


def loop(loaded: LoadedModel, what: Configuration, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode(), what.kernel.active():
        decoder = make_decoder(loaded, what)
        return decode_loop(decoder, tokens, loaded.device).losses


def small_model(kv_heads: int, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Two layers of random weights, large enough that attention is not uniform."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.06)
    return prepare(model.to(device, dtype), "small", "random")


def float64_on_cpu(loaded: LoadedModel) -> LoadedModel:
    """The same weights."""
    model = type(loaded.model)._from_config(copy.deepcopy(loaded.model.config), dtype=torch.float64)
    model.load_state_dict({name: tensor.cpu().double() for name, tensor in loaded.model.state_dict().items()})
    return prepare(model, loaded.name, loaded.digest)


def out_of_memory(scale: Scale) -> Result:
    """More than there is raises torch.OutOfMemoryError, after which everything goes on."""
    if scale.device.type == "cpu":
        return {"ok": None, "rows": [], "skipped": "needs an accelerator"}
    loaded = small_model(2, torch.bfloat16, scale.device)
    tokens, policy = np.random.default_rng(0).integers(VOCABULARY, size=100), EvictionPolicy(window_size=60)
    before = block_parallel_losses(loaded, tokens, policy)
    raised = ""
    try:
        _ = [torch.empty(2**40, dtype=torch.uint8, device=scale.device)]
    except torch.OutOfMemoryError as error:
        raised = str(error).splitlines()[0][:120]
    empty_cache()
    after = block_parallel_losses(loaded, tokens, policy)
    return {"ok": bool(raised) and bool((before == after).all()), "rows": [{"raised": raised}]}


def device_assert(scale: Scale) -> Result:
    """A wrong index on the device raises torch.AcceleratorError, after which the process is of no use any more."""
    if scale.device.type != "cuda":
        return {"ok": None, "rows": [], "skipped": "needs a CUDA device"}
    outcome = []
    for step in (_read_past_the_end, _compute):
        try:
            step(scale.device)
            outcome.append("nothing")
        except torch.AcceleratorError as error:
            outcome.append(f"AcceleratorError: {str(error).splitlines()[0][:100]}")
    return {"ok": all(o.startswith("AcceleratorError") for o in outcome), "rows": [{"raised": o} for o in outcome]}


def _read_past_the_end(device: torch.device) -> None:
    torch.arange(4, device=device)[torch.full((1,), 10, device=device)].cpu()


def _compute(device: torch.device) -> None:
    torch.ones(4, device=device).sum().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS: dict[str, tuple[Callable[[Scale], Result], float]] = {
    "kernels": (kernels, 120),
    "losses": (losses, 300),
    "formats": (formats, 120),
    "out_of_memory": (out_of_memory, 90),
    "device_assert": (device_assert, 90),
}
"""Each with its deadline in seconds."""

warnings.filterwarnings("ignore", message=".*torch_dtype.*")
