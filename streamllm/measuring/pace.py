"""How long a model will take, before its weights are loaded: a few layers of its shape, with random weights, are run
for a second or two, and the rest is layers and tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..engine.architecture import engine_layers, probe_tokens
from ..engine.attention import ATTENTION_NAME, register_attention
from ..engine.block_parallel import block_parallel_losses
from ..engine.device import default_device
from ..engine.model import LoadedModel
from ..engine.rotary import rotary_embeddings
from ..policy import strict_policy
from .timing import Reference

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BLOCK = 256
_BLOCKS = 5
_RUNS, _ENOUGH_SEC = 5, 0.5
_FEW, _MORE = 1, 3
"""Layers of the two models that are run: their difference is what a layer takes."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that a model takes with its cache full, on one worker."""

    block_sec: float
    """Seconds to evaluate 256 tokens that see nothing before them but each other."""
    key_sec: float
    """The extra seconds that these 256 take for each token that they see."""
    token_sec: float
    """Seconds to decode one token by strict StreamingLLM, the ring."""
    total: int
    """Tokens in that cache."""

    def losses(self, n_tokens: int) -> float:
        """All of a text, by the block-parallel evaluator."""
        return n_tokens / _BLOCK * (self.block_sec + self.total * self.key_sec)

    def window(self) -> float:
        """One token by re-computation: a window of `total` tokens."""
        return self.total / _BLOCK * (self.block_sec + self.total / 2 * self.key_sec)


def measure_pace(config: PretrainedConfig, dtype: torch.dtype, total: int) -> Pace:
    """The pace of a model of that configuration, by the fastest of a few runs: what else the machine does is not the
    model's."""
    models = [_random_model(config, layers, dtype) for layers in (_FEW, _MORE)]
    few, more = (_fastest(loaded, total) for loaded in models)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    block, key, token = few + np.maximum(more - few, 0) / (_MORE - _FEW) * (layers - _FEW)
    return Pace(float(block), float(key), float(token), total)


def _fastest(loaded: LoadedModel, total: int) -> np.ndarray:
    """(3): `block_sec`, `key_sec` and `token_sec`."""
    tokens = np.random.default_rng(0).integers(loaded.vocabulary, size=_BLOCKS * _BLOCK + 1)
    runs: list[np.ndarray] = []
    started = time.perf_counter()
    while len(runs) < 2 or (len(runs) < _RUNS and time.perf_counter() - started < _ENOUGH_SEC):
        runs.append(_block_times(loaded, tokens))
    key_sec, block_sec = np.polyfit(_BLOCK * np.arange(_BLOCKS), np.min(runs, axis=0), 1)
    reference = Reference.by(loaded, total, tokens, "eager")
    token_sec = min(reference.segment() for _ in range(_RUNS)) / 1e3
    return np.array([block_sec, max(key_sec, 0.0), token_sec])


def _block_times(loaded: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    """Seconds of each block, which sees all before it."""
    marks = [time.perf_counter()]
    policy = strict_policy(len(tokens))
    block_parallel_losses(loaded, tokens, policy, _BLOCK, progress=lambda *_: marks.append(time.perf_counter()))
    return np.diff(marks)


def _random_model(config: PretrainedConfig, layers: int, dtype: torch.dtype) -> LoadedModel:
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    shape = deepcopy(config)
    text = shape.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    device = default_device()
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="eager").to(device)
    model.eval().requires_grad_(False)
    register_attention()
    embeddings = rotary_embeddings(model)
    for embedding in embeddings:
        embedding.take_over()
    found = engine_layers(model, embeddings, probe_tokens(model), ATTENTION_NAME)
    return LoadedModel("random", model, tuple(found.values()), device, model.dtype, "random")
