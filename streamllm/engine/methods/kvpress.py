"""`kvpress`: NVIDIA's kvpress library decides what is kept and re-rotates it: KeyRerotationPress(StreamingLLMPress).

An optional extra that pins transformers < 5.3: it wants an environment of its own. It cannot re-rotate keys of which
only a part is rotary, and looks for `model.layers[i].self_attn`: no GPT-NeoX (Pythia), for both reasons, but with what
the source documents change first (`kvpress_shim`). Its DecodingPress refuses KeyRerotationPress (0.5): the press is
called here, between tokens, on the policy's schedule.

Its angles are of float32, whatever the model's dtype, and each prune turns what the one before has turned. That is the
policy's function to the rounding of float32 angles; in half precision every turn rounds keys and sines anew, which is
only near it.
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

_SHIM = "use another method, or --method kvpress_shim: the source documents' changes to model and press, made first"
_WHY = "each prune rounds keys and sines to {dtype} anew, over and over"
APPROXIMATE = {dtype: _WHY.format(dtype=dtype) for dtype in ("float16", "bfloat16")}


class PressedCache(KVCache):
    """Calls a press, a KeyRerotationPress, for each layer; modules: of their attention, which it asks for `head_dim`
    and `rotary_emb`."""

    def __init__(self, loaded: LoadedModel, backend: Backend, press: Any, modules: list[Any]) -> None:
        super().__init__(loaded, backend)
        self.press = press
        self.modules = modules
        # As the press itself does when it is entered; an embedding's angles are the engine's by now, its frequencies
        # are what the press reads.
        embedding = next(module for module in loaded.model.modules() if hasattr(module, "inv_freq"))
        for module in modules:
            module.rotary_emb = embedding

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.append(layer, key, value)
        return attention(self.backend, query, keys, values, scaling, causal=True)

    def evict(self, n_sink: int, drop: int) -> None:
        held = self.keys[0].shape[2]
        self.press.compression_ratio = (drop - 0.5) / held  # kvpress keeps int(held * (1 - ratio))
        for i, module in enumerate(self.modules):
            self.keys[i], self.values[i] = self.press.compress(module, None, self.keys[i], self.values[i], None, {})


def library(method: str) -> Any:
    """Raises UnavailableError where it is not installed."""
    try:
        import kvpress
    except ImportError as error:
        raise UnavailableError(
            f"method {method!r}: the library is not installed; `pip install -e '.[kvpress]'` in an environment of "
            f"its own (it pins transformers < 5.3)"
        ) from error
    return kvpress


def check_layers(loaded: LoadedModel, method: str) -> None:
    """Raises UnsupportedModelError for layers that no press knows how to turn, or to attend with."""
    name, first = type(loaded.model).__name__, loaded.layers[0]
    alike = all((x.rotary, x.key_size, x.window) == (first.rotary, first.key_size, None) for x in loaded.layers)
    if not alike or not loaded.has_plain_softmax:
        raise UnsupportedModelError(
            f"method {method!r}: the layers of {name} differ in their rotation, or have windows, "
            f"learned sinks or soft caps; use another method"
        )
    if first.rotary.interleaved:
        raise UnsupportedModelError(
            f"method {method!r}: the library re-rotates dimensions half a head apart, {name} rotates neighbours; "
            f"use another method"
        )


def _attention_modules(loaded: LoadedModel) -> list[Any]:
    """Those that the library itself finds. Raises UnsupportedModelError where there are none, or it cannot turn their
    keys."""
    name, first = type(loaded.model).__name__, loaded.layers[0]
    layers: Any = getattr(getattr(loaded.model, "model", None), "layers", None)
    if layers is None or not hasattr(layers[0], "self_attn"):
        raise UnsupportedModelError(f"method 'kvpress': the library does not know the layers of {name}; {_SHIM}")
    check_layers(loaded, "kvpress")
    if first.rotary.size != first.key_size:
        raise UnsupportedModelError(
            f"method 'kvpress': the library re-rotates whole heads, {name} rotates {first.rotary.size} of their "
            f"{first.key_size} dimensions; {_SHIM}"
        )
    return [layer.self_attn for layer in layers]


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> CachedDecoder:
    modules, kvpress = _attention_modules(loaded), library("kvpress")
    press = kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(n_sink=policy.n_sink))
    return CachedDecoder(loaded, policy, PressedCache(loaded, backend, press, modules), execution)


def effective(policy: EvictionPolicy) -> EvictionPolicy:
    """Left to itself StreamingLLMPress keeps positions, but puts what it keeps in the order of `topk`: a second prune
    would take others for sinks."""
    if policy.canonical.keeps_positions:
        raise UsageError(
            "positions 'keep': methods 'kvpress' and 'kvpress_shim' are the press that re-rotates, the one that does "
            "not loses sinks at its second prune; use --positions compact, or --method ring, ours or mit"
        )
    return policy


METHOD = Method(decoder, effective, library="kvpress", approximate=APPROXIMATE)
