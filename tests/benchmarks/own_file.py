"""A real model's own GGUF file, in llama.cpp and here, in one interleaved run, at equal bits a weight, a cache of 16
bits: time per token, and losses by the same policy (four sinks, 64 tokens pruned at once). Other bits than the file's
are made of it by llama.cpp, and of its numbers here; the timed `ring` prunes a token at a time.

python -m tests.benchmarks.own_file [--model smollm2] [--caches 512,2048] [--threads 1] [--text FILE] [--json FILE]

Needs llama-cpp-python, best built for the machine it runs on.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.device import copy_bandwidth, limit_threads
from streamllm.engine.gguf import gguf_file
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.engine.model import LoadedModel
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.measuring.timing import bytes_per_token, no_garbage_collection
from streamllm.policy import EvictionPolicy, KvDtype

from .peers import ContextShift, load_gguf
from .reporting import interleaved, machine, markdown_table, parser, steady, summary

EVERY = 64
LOSSES = 512
"""The total at which losses are compared."""


class Bits(NamedTuple):
    name: str
    file_type: str | None
    """llama.cpp's, as it makes it of the file; None: the file as it is."""
    dtype: str
    kv_dtype: KvDtype
    quantization: str = "none"


BITS = (
    Bits("32", "ALL_F32", "float32", "float16"),
    Bits("16", "MOSTLY_BF16", "bfloat16", "auto"),
    Bits("8", "MOSTLY_Q8_0", "float32", "float16", "int8_weight_only"),
    Bits("4", None, "float32", "float16", "int4_weight_only"),
)


def converted(file: Path, file_type: str, folder: Path) -> Path:
    import llama_cpp

    out = folder / f"{file_type}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_{file_type}"), True
    if llama_cpp.llama_model_quantize(str(file).encode(), str(out).encode(), options):
        raise RuntimeError(f"llama.cpp makes no {file_type} of {file}")
    return out


def their_losses(model: Any, tokens: np.ndarray, threads: int) -> np.ndarray:
    """tokens (n) -> nats (n - 1)"""
    run = ContextShift(model, LOSSES, EVERY, threads)
    losses = []
    for token, target in pairwise(tokens):
        run.feed(np.array([token]))
        logits = run.logits().astype(np.float64)
        top = logits.max()
        losses.append(top + math.log(np.exp(logits - top).sum()) - logits[target])
    return np.array(losses)


def of_losses(loaded: LoadedModel, model: Any, tokens: np.ndarray, threads: int) -> dict[str, dict[str, float]]:
    """Perplexities, and how far the losses of a token are apart: on average, and at one in a hundred or less."""
    policy = EvictionPolicy(n_sink=4, window_size=LOSSES - 4, compress_every=EVERY)
    losses = {"ring": block_parallel_losses(loaded, tokens, policy), "llama.cpp": their_losses(model, tokens, threads)}
    found = {who: {"perplexity": float(np.exp(x.mean()))} for who, x in losses.items()}
    apart = np.abs(losses["ring"] - losses["llama.cpp"])
    found["ring"] |= {"nats apart": float(apart.mean()), "99%": float(np.quantile(apart, 0.99))}
    return found


def theirs(model: Any, cache: int, threads: int) -> Callable[[], float]:
    run = ContextShift(model, cache, EVERY, threads)
    run.feed(np.arange(cache))
    run.decode(EVERY)
    return lambda: 1e3 * run.decode(EVERY)


@torch.inference_mode()
def main() -> None:
    options = parser(str(__doc__))
    options.add_argument("--model", default="smollm2")
    options.add_argument("--caches", default="512,2048", help="sinks and window (512,2048)")
    options.add_argument("--text", type=Path, help=f"for losses at {LOSSES}; none are taken without")
    options.add_argument("--tokens", type=int, default=1200)
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    file = gguf_file(arguments.model)
    if file is None:
        options.error(f"model {arguments.model}: give a GGUF file, or a folder with one")
    caches = [int(cache) for cache in arguments.caches.split(",")]
    tokens = None
    if arguments.text is not None:
        source = TextSource(text=arguments.text, max_eval_tokens=arguments.tokens)
        tokens = load_tokens(source, load_tokenizer(arguments.model), sys.maxsize).tokens
    variants: dict[str, Callable[[], float]] = {}
    about: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, no_garbage_collection():
        for bits in BITS:
            loaded = load_model(arguments.model, bits.dtype, quantization=bits.quantization)
            model = load_gguf(file if bits.file_type is None else converted(file, bits.file_type, Path(folder)))
            known: dict[str, dict[str, float]] = {"ring": {}, "llama.cpp": {}}
            if tokens is not None:
                known = of_losses(loaded, model, tokens, arguments.threads)
            for cache in caches:
                policy = EvictionPolicy(n_sink=4, window_size=cache - 4, kv_dtype=bits.kv_dtype)
                names = {who: f"{bits.name} bits, {cache}: {who}" for who in known}
                variants[names["ring"]] = steady(loaded, Configuration("ring", policy, execution="compile"))
                variants[names["llama.cpp"]] = theirs(model, cache, arguments.threads)
                about |= {names[who]: {"total": cache, **(known[who] if cache == LOSSES else {})} for who in known}
                about[names["ring"]]["MB"] = bytes_per_token(loaded, policy) / 1e6
                print(f"{names['ring']} is compiled", file=sys.stderr, flush=True)
        times = interleaved(variants, arguments.rounds)
    rows = [{"variant": name, **summary(values), **about[name]} for name, values in times.items()]
    bandwidth = copy_bandwidth(torch.device("cpu")) / 1e9
    load = machine()["load_average"]
    print(f"{arguments.model}, {arguments.threads} threads, copies {bandwidth:.1f} GB/s, load {load:.1f}")
    print(markdown_table(rows))
    if arguments.json is not None:
        facts = {"benchmark": "a model's own file", "model": arguments.model, "every": EVERY}
        facts |= {"threads": arguments.threads, "copy_bandwidth_gb_per_sec": bandwidth}
        arguments.json.write_text(json.dumps(machine() | facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
