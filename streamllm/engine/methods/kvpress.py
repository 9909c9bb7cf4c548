"""`kvpress`: NVIDIA's kvpress library decides what is kept and re-rotates it: KeyRerotationPress(StreamingLLMPress).

An optional extra that pins transformers < 5.3: it wants an environment of its own. It cannot re-rotate keys of which
only a part is rotary, and looks for `model.layers[i].self_attn`: no GPT-NeoX (Pythia), for both reasons. Its
DecodingPress refuses KeyRerotationPress (0.5): the press is called here, between tokens, on the policy's schedule.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import UnavailableError, UnsupportedModelError, UsageError
from ...policy import EvictionPolicy
from ..attention import attention
from ..backends import Backend
from ..decoding import CachedDecoder, KVCache
from ..model import LoadedModel
from . import Method


class PressedCache(KVCache):
    def __init__(self, loaded: LoadedModel, n_sink: int, backend: Backend) -> None:
        super().__init__(loaded, backend)
        self.modules = _attention_layers(loaded)
        try:
            import kvpress
        except ImportError as error:
            raise UnavailableError(
                "method 'kvpress': the library is not installed; `pip install -e '.[kvpress]'` in an environment of "
                "its own (it pins transformers < 5.3)"
            ) from error
        self.press = kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(n_sink=n_sink))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.append(layer, key, value)
        return attention(self.backend, query, keys, values, scaling, causal=True)

    def evict(self, n_sink: int, drop: int) -> None:
        held = self.keys[0].shape[2]
        self.press.compression_ratio = (drop - 0.5) / held  # kvpress keeps int(held * (1 - ratio))
        for i, layer in enumerate(self.modules):
            self.keys[i], self.values[i] = self.press.compress(layer, None, self.keys[i], self.values[i], None, {})


def _attention_layers(loaded: LoadedModel) -> list[Any]:
    modules: Any = getattr(getattr(loaded.model, "model", None), "layers", None)
    if modules is None or not hasattr(modules[0], "self_attn"):
        raise UnsupportedModelError(
            f"method 'kvpress': the library does not know the layers of {type(loaded.model).__name__}; "
            f"use another method"
        )
    first = loaded.layers[0]
    alike = all((x.rotary, x.key_size, x.window) == (first.rotary, first.key_size, None) for x in loaded.layers)
    if not alike or not loaded.has_plain_softmax:
        raise UnsupportedModelError(
            f"method 'kvpress': the layers of {type(loaded.model).__name__} differ in their rotation, or have windows, "
            f"learned sinks or soft caps; use another method"
        )
    if first.rotary.size != first.key_size or first.rotary.interleaved:
        raise UnsupportedModelError(
            f"method 'kvpress': the library re-rotates whole heads in halves only, "
            f"{type(loaded.model).__name__} rotates otherwise; use another method"
        )
    layers = [layer.self_attn for layer in modules]
    embedding = next(module for module in loaded.model.modules() if hasattr(module, "inv_freq"))
    for layer in layers:
        layer.rotary_emb = embedding  # as the press itself does when it is entered
    return layers


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> CachedDecoder:
    return CachedDecoder(loaded, policy, PressedCache(loaded, policy.n_sink, backend), execution)


def effective(policy: EvictionPolicy) -> EvictionPolicy:
    """Left to itself StreamingLLMPress keeps positions, but puts what it keeps in the order of `topk`: a second prune
    would take others for sinks."""
    if policy.canonical.keeps_positions:
        raise UsageError(
            "positions 'keep': method 'kvpress' is the press that re-rotates, the one that does not loses sinks at its "
            "second prune; use --positions compact, or --method ring, ours or mit"
        )
    return policy


METHOD = Method(decoder, effective, protocols=("decode-loop", "chunked"))
