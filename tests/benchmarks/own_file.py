"""A real model's own GGUF file, in llama.cpp and here, in one interleaved run: time per token and losses, at equal bits
a weight, the same policy (four sinks, 64 tokens pruned at once) and a float16 cache. Other bits than the file's are
made of it by llama.cpp, and of its numbers here.

python -m tests.benchmarks.own_file [--model smollm2] [--cache 512] [--text FILE] [--json FILE]

Needs llama-cpp-python. `ring` with R = 1 is beside them: it prunes every token for nothing.
"""

from __future__ import annotations

import json
import math
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
from streamllm.policy import EvictionPolicy

from .peers import ContextShift, load_gguf
from .reporting import interleaved, machine, parser, steady, summary

EVERY = 64


class Bits(NamedTuple):
    name: str
    file_type: str | None
    """llama.cpp's, as it makes it of the file; None: the file as it is."""
    dtype: str
    quantization: str = "none"


BITS = (
    Bits("32", "ALL_F32", "float32"),
    Bits("16", "MOSTLY_BF16", "bfloat16"),
    Bits("8", "MOSTLY_Q8_0", "float32", "int8_weight_only"),
    Bits("8, bfloat16", None, "bfloat16", "int8_weight_only"),
    Bits("4", None, "float32", "int4_weight_only"),
)


def converted(file: Path, file_type: str, folder: Path) -> Path:
    import llama_cpp

    out = folder / f"{file_type}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_{file_type}"), True
    if llama_cpp.llama_model_quantize(str(file).encode(), str(out).encode(), options):
        raise RuntimeError(f"llama.cpp makes no {file_type} of {file}")
    return out


def their_losses(run: ContextShift, tokens: np.ndarray) -> np.ndarray:
    losses = []
    for token, target in pairwise(tokens):
        run.feed(np.array([token]))
        logits = run.logits().astype(np.float64)
        top = logits.max()
        losses.append(top + math.log(np.exp(logits - top).sum()) - logits[target])
    return np.array(losses)


def theirs(model: Any, cache: int, threads: int) -> Callable[[], float]:
    run = ContextShift(model, cache, EVERY, threads)
    run.feed(np.arange(cache))
    run.decode(EVERY)
    return lambda: 1e3 * run.decode(EVERY)


def ours(loaded: LoadedModel, cache: int) -> dict[str, Callable[[], float]]:
    policies = {every: EvictionPolicy(n_sink=4, window_size=cache - 4, compress_every=every) for every in (1, EVERY)}
    half = EvictionPolicy(n_sink=4, window_size=cache - 4, kv_dtype="float16")
    named = {"ring R=1": policies[1], "ring R=1, KV float16": half}
    return {name: steady(loaded, Configuration("ring", policy, execution="compile")) for name, policy in named.items()}


@torch.inference_mode()
def main() -> None:
    options = parser(str(__doc__))
    options.add_argument("--model", default="smollm2")
    options.add_argument("--cache", type=int, default=512, help="sinks and window (512)")
    options.add_argument("--text", type=Path, help="for the losses; none are taken without")
    options.add_argument("--tokens", type=int, default=1200)
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    file = gguf_file(arguments.model)
    assert file is not None, "a GGUF file, or a folder with one"
    policy = EvictionPolicy(n_sink=4, window_size=arguments.cache - 4, compress_every=EVERY)
    tokens = None
    if arguments.text is not None:
        source = TextSource(text=arguments.text, max_eval_tokens=arguments.tokens)
        tokens = load_tokens(source, load_tokenizer(arguments.model), 10**9).tokens
    variants: dict[str, Callable[[], float]] = {}
    perplexities: dict[str, float] = {}
    needed: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, no_garbage_collection():
        for bits in BITS:
            loaded = load_model(arguments.model, bits.dtype, quantization=bits.quantization)
            for name, run in ours(loaded, arguments.cache).items():
                variants[f"{bits.name} bits: {name}"] = run
                needed[f"{bits.name} bits: {name}"] = bytes_per_token(loaded, policy)
            if tokens is not None:
                perplexities[f"{bits.name} bits: ring R=1"] = _perplexity(block_parallel_losses(loaded, tokens, policy))
            if bits.file_type is None and bits.quantization == "int8_weight_only":
                continue
            model = load_gguf(file if bits.file_type is None else converted(file, bits.file_type, Path(folder)))
            name = f"{bits.name} bits: llama.cpp, KV float16"
            variants[name] = theirs(model, arguments.cache, arguments.threads)
            if tokens is not None:
                run = ContextShift(model, arguments.cache, EVERY, arguments.threads)
                perplexities[name] = _perplexity(their_losses(run, tokens))
        times = interleaved(variants, arguments.rounds)
    bandwidth = copy_bandwidth(torch.device("cpu"))
    rows = [
        {"variant": name, **summary(values), "perplexity": perplexities.get(name), "bytes": needed.get(name)}
        for name, values in times.items()
    ]
    for row in rows:
        print(row)
    if arguments.json is not None:
        about = {"benchmark": f"own file, cache {arguments.cache}", "model": arguments.model, "every": EVERY}
        about |= {"threads": arguments.threads, "copy bytes/s": bandwidth}
        arguments.json.write_text(json.dumps(machine() | about | {"rows": rows}, indent=1) + "\n")


def _perplexity(losses: np.ndarray) -> float:
    return float(np.exp(losses.mean()))


if __name__ == "__main__":
    main()
