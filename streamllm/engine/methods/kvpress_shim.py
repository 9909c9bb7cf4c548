"""`kvpress_shim`: method `kvpress` with what the source documents change first, for GPT-NeoX (Pythia). Opt-in, by name.

It is theirs (hopecommon/CS3602), not NVIDIA's: `eval_kvpress.py` sets `rotary_emb` and `head_dim` on the attention
modules, which the press asks for, and their copy of the press turns those dimensions of a head that are rotated and
leaves the others. Here NVIDIA's own press turns them, shown that part alone. The first change is enough where whole
heads are rotated; without the second NVIDIA's press fails on a part of one (it multiplies 12 sines with 48 dimensions).

What their scripts measured is another matter: they compress a cache that is thrown away (`eval_kvpress.py`), or once,
after which it grows (`run_kvpress_streaming_decode.sh`). The policy's schedule calls the press here, as in `kvpress`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ...policy import EvictionPolicy
from ..backends import Backend
from ..decoding import CachedDecoder
from ..model import LoadedModel
from . import Method
from .kvpress import APPROXIMATE, PressedCache, check_layers, effective, library

_NAMES = ("self_attn", "self_attention", "attn", "attention")
"""Where their copy of the library looks for a layer's attention."""


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> CachedDecoder:
    check_layers(loaded, "kvpress_shim")
    modules, kvpress = _attention_modules(loaded), library("kvpress_shim")
    press = turning_a_part(kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(n_sink=policy.n_sink)))
    return CachedDecoder(loaded, policy, PressedCache(loaded, backend, press, modules), execution)


def turning_a_part(press: Any) -> Any:
    """NVIDIA's KeyRerotationPress, shown the first dimensions of heads only: as many as have frequencies."""
    turn_whole = press.rerotate_keys

    def rerotate_keys(module: Any, indices: Tensor, keys: Tensor) -> Tensor:
        """indices (1, KV heads, kept), keys (1, KV heads, held, head size) -> (1, KV heads, kept, head size)."""
        size = 2 * len(module.rotary_emb.inv_freq)
        rotated, fixed = keys[..., :size], keys[..., size:]
        part = SimpleNamespace(rotary_emb=module.rotary_emb, head_dim=size)
        places = indices[..., None].expand(-1, -1, -1, fixed.shape[-1])
        return torch.cat((turn_whole(part, indices, rotated), fixed.gather(2, places)), -1)

    press.rerotate_keys = rerotate_keys
    return press


def _attention_modules(loaded: LoadedModel) -> list[Any]:
    """With the `head_dim` that the press asks for."""
    layers: Any = getattr(loaded.model.base_model, "layers", [])
    found = [getattr(layer, name) for layer in layers for name in _NAMES if hasattr(layer, name)]
    if len(found) != len(loaded.layers):
        raise UnsupportedModelError(
            f"method 'kvpress_shim': the attention of the layers of {type(loaded.model).__name__} is called none of "
            f"{', '.join(_NAMES)}; use another method"
        )
    for module in found:
        if not hasattr(module, "head_dim"):
            module.head_dim = module.head_size
    return found


METHOD = Method(decoder, effective, library="kvpress", approximate=APPROXIMATE)
