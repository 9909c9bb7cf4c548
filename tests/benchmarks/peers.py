"""Other people's streaming, for the same run: llama.cpp's context shift, and kvpress, each where it is installed.

llama.cpp gets the benchmark's own weights as a GGUF, and again in q8_0; its keys and values stay f16, its default.
kvpress knows no GPT-NeoX: it gets a Llama that reads nearly as many bytes per token, and our methods get it too.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from streamllm.configuration import Configuration
from streamllm.engine.device import default_device, resolve_dtype
from streamllm.engine.loading import prepare
from streamllm.engine.model import LoadedModel
from streamllm.policy import EvictionPolicy

from .reporting import SHAPES, asked_for, steady

N_SINK = 4
CYCLES = (64, 1)
GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def peer_variants(cache: int, dtype: str, threads: int, shape: str = "pythia-70m") -> dict[str, Callable[[], float]]:
    """What is installed, by name; each function times whole prune cycles with a full cache, in ms per token."""
    dtype = str(resolve_dtype(dtype, default_device())).removeprefix("torch.")
    variants: dict[str, Callable[[], float]] = {}
    if find_spec("llama_cpp") and find_spec("gguf") and default_device().type == "cpu":
        variants |= llama_cpp_variants(cache, dtype, threads, shape)
    if find_spec("kvpress"):
        variants |= kvpress_variants(cache, dtype, shape)
    return variants


def llama_cpp_variants(cache: int, dtype: str, threads: int, shape: str) -> dict[str, Callable[[], float]]:
    loaded = asked_for(Namespace(shape=shape, dtype=dtype, threads=threads))
    variants = {}
    with tempfile.TemporaryDirectory() as folder:
        for weights in (GGUF_TYPES[dtype], "Q8_0"):
            path = Path(folder) / f"{weights}.gguf"
            write_gguf(loaded.model, weights, path)
            model = load_gguf(path)
            for every in CYCLES:
                name = f"llama.cpp {weights.lower()}, KV f16, shift every {every}"
                variants[name] = _timed(ContextShift(model, cache, every, threads), every)
    return variants


def write_gguf(model: Any, weights: str, path: Path) -> None:
    """A GPT-NeoX of transformers with its matrices in the GGUF type `weights`, and no vocabulary."""
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
    from gguf.quants import quantize

    config = model.config
    writer = GGUFWriter(path, "gptneox")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * _head_size(config)))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.GPTNEOX, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ".attn_qkv." in target:
            tensor = _queries_keys_values(tensor, config)
        kind = GGMLQuantizationType[weights if tensor.ndim == 2 else "F32"]
        writer.add_tensor(target, quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _queries_keys_values(tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """(heads x 3 x size, ...) as transformers has it -> (3 x heads x size, ...): all queries, all keys, all values."""
    return tensor.unflatten(0, (config.num_attention_heads, 3, _head_size(config))).transpose(0, 1).flatten(0, 2)


def _head_size(config: Any) -> int:
    return int(config.hidden_size // config.num_attention_heads)


def load_gguf(path: Path) -> Any:
    import llama_cpp

    getLogger("llama-cpp-python").setLevel("CRITICAL")  # it takes warnings for errors
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    return model


class ContextShift:
    """llama.cpp's low-level loop: one token at a time; after every `every` tokens, the oldest `every` behind the sinks
    are removed and the rest move down, as `EvictionPolicy(compress_every=every)` has it. llama.cpp re-rotates the keys
    in the next decode."""

    def __init__(self, model: Any, cache: int, every: int, threads: int) -> None:
        import llama_cpp

        self.api, self.cache, self.every = llama_cpp, cache, every
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = cache + every, cache
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # the faster for one token on a CPU
        self.context = llama_cpp.llama_init_from_model(model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(cache, 0, 1)
        self.held = 0

    def feed(self, tokens: np.ndarray) -> None:
        """Appends tokens and computes the logits of the last."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), self.held + i, i == len(tokens) - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        code = self.api.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode: {code} with {self.held} tokens held")
        self.held += len(tokens)
        if self.held == self.cache + self.every:
            self._shift()

    def _shift(self) -> None:
        first_kept = N_SINK + self.every
        if not self.api.llama_memory_seq_rm(self.memory, 0, N_SINK, first_kept):
            raise RuntimeError("llama.cpp removes no part of this memory")
        self.api.llama_memory_seq_add(self.memory, 0, first_kept, -1, -self.every)
        self.held -= self.every

    def logits(self) -> np.ndarray:
        """(vocabulary), of the last token fed."""
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)).copy()

    def decode(self, count: int) -> float:
        """Seconds per token."""
        tokens = np.arange(count).reshape(-1, 1)
        started = time.perf_counter()
        for token in tokens:
            self.feed(token)
        self.api.llama_synchronize(self.context)
        return (time.perf_counter() - started) / count


def _timed(run: ContextShift, every: int) -> Callable[[], float]:
    run.feed(np.arange(run.cache))
    count = max(every, 24)
    run.decode(count)
    return lambda: 1e3 * run.decode(count)


def kvpress_variants(cache: int, dtype: str, shape: str) -> dict[str, Callable[[], float]]:
    loaded = random_llama(dtype, shape)
    ways = [(method, every, "eager") for method in ("kvpress", "ours") for every in CYCLES]
    ways += [("ring", 1, "eager"), ("ring", 1, "compile")]
    return {
        f"{method} R={every} {execution}, Llama": steady(
            loaded,
            Configuration(
                method,
                EvictionPolicy(n_sink=N_SINK, window_size=cache - N_SINK, compress_every=every),
                execution=execution,
            ),
        )
        for method, every, execution in ways
    }


def random_llama(dtype: str, shape: str) -> LoadedModel:
    """As many weights as the GPT-NeoX of that shape: three matrices in its MLP, so two thirds of the width, in 32s."""
    size = SHAPES[shape]
    width = 32 * round(size["intermediate_size"] * 2 / 3 / 32)
    config = transformers.LlamaConfig(
        **{"vocab_size": 50304, "max_position_embeddings": 2048} | size | {"intermediate_size": width}
    )
    torch.manual_seed(0)
    with torch.device(default_device()):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    return prepare(model, f"Llama of {shape}'s shape (random weights)", "random")
