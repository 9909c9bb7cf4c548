"""What the attention of each layer of a model has: layers need not be of one kind.

Nothing is read from configurations. The model is called with one token, by an attention function and a mask function
of its own kind (`ask_layers`): what it hands to them is what its layers have. How a layer turns its keys,
`architecture` finds out by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .attention import StateDroppedError, for_each_head
from .plain_forward import run
from .rotary import Rotary, text_config
from .softmax import Softmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASKING = "streamllm_asking"
_ALL, _OTHERS = 0, -1
"""In place of a window's size: a mask that shows every token before, and one that shows what is no window."""
_FAR = 2**17
"""A token in a long text."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """What a layer calls its attention with."""

    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    """Of a head."""
    window: int | None
    """The most recent tokens that a query sees, itself included (its sliding window); None: all."""
    softmax: Softmax
    own_mask: bool = False
    """Whether it is given a mask that is neither causal nor such a window."""

    @property
    def kv_size(self) -> int:
        """Numbers in the keys and values of one token."""
        return self.kv_heads * (self.key_size + self.value_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer(LayerAttention):
    """And how its keys and queries are turned."""

    rotary: Rotary

    @property
    def is_plain(self) -> bool:
        """Whether it is a softmax without more, of values as wide as keys whose first dimensions turn."""
        return self.softmax.is_plain and self.key_size == self.value_size and not self.rotary.at_end


def ask_layers(model: PreTrainedModel) -> dict[int, LayerAttention]:
    """By the number of the layer. Leaves the model with an attention function that is good for nothing else. Raises
    UnsupportedModelError if it cannot be called so."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_ASKING, _noted)
    AttentionMaskInterface.register(_ASKING, _size_of_window)
    model.set_attn_implementation(_ASKING)
    found: dict[int, LayerAttention] = {}
    token = torch.full((1, 1), 7 % model.get_input_embeddings().num_embeddings, device=model.device)
    run(model, token, position_ids=torch.zeros_like(token), attention_state=found)
    return found


HANDS_ON = "_streamllm_hands_on"
"""An attribute of models that `hand_on_state` was done to."""


def hand_on_state(model: PreTrainedModel) -> None:
    """Gives the `attention_state` that the model is called with to its attention layers, where those between drop it
    (StableLM, Nemotron)."""
    given: dict[str, Any] = {}

    def take(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "attention_state" in options:
            given["attention_state"] = options["attention_state"]
        return arguments, {name: value for name, value in options.items() if name != "attention_state"}

    def give(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, given | options

    setattr(model, HANDS_ON, True)
    model.register_forward_pre_hook(take, with_kwargs=True)
    model.register_forward_hook(lambda *_: given.clear(), always_call=True)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(give, with_kwargs=True)


def check_windows(model: PreTrainedModel, layers: Mapping[int, LayerAttention]) -> None:
    """Raises UnsupportedModelError for a mask that is no window, and a window that is not seen."""
    name, span = type(model).__name__, span_of(text_config(model))
    for number, layer in layers.items():
        if layer.own_mask:
            raise UnsupportedModelError(f"{name}, layer {number}: its mask is neither causal nor a sliding window")
    if span is not None and layers and all(layer.window is None for layer in layers.values()):
        raise UnsupportedModelError(f"{name} has a sliding window ({span} tokens) that no layer is seen to use")


def span_of(config: Any) -> int | None:
    """A configuration's sliding window, None where no layer has one."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    return getattr(config, "sliding_window", None)


def _size_of_window(
    *_: Any, mask_function: Callable[..., Tensor], local_size: int | None = None, device: Any = None, **__: Any
) -> Tensor:
    """What a model gives to its layers as their mask: the size of the window that the mask's function shows, as a
    tensor (1, 1, 1, 1). It is asked about tokens far into a text, where there is more than a window before them."""
    far = 2 * (local_size or _FAR // 2)
    try:
        sizes = {_shown(mask_function, query, device) for query in (far, far + 1, far + far // 3)}
    except IndexError:  # it looks up which tokens are an image's: it can be taken at its word, and held to it, only
        sizes = {local_size or _ALL}
    size = sizes.pop() if len(sizes) == 1 else _OTHERS
    return torch.full((1, 1, 1, 1), size, dtype=torch.long, device=device)


def _shown(mask_function: Callable[..., Tensor], query: int, device: Any) -> int:
    keys = torch.arange(query + 2, device=device)
    first = torch.zeros((), dtype=torch.long, device=device)
    seen = mask_function(first, first, torch.full((), query, device=device), keys).broadcast_to(keys.shape)
    count = int(seen.sum())
    if seen[-1] or not count or not seen[query + 1 - count : query + 1].all():
        return _OTHERS
    return _ALL if count == query + 1 else count


def _noted(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # which kvpress, once it is imported, hands on by its place
    attention_state: dict[int, LayerAttention] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one token, which sees itself alone."""
    if attention_state is None:
        raise StateDroppedError(
            f"{type(module).__name__} was called without attention_state: the model's layers do not hand on what the "
            f"model is called with"
        )
    size = _ALL
    if attention_mask is not None:  # which may be one of the model's own making
        size = int(attention_mask) if attention_mask.dtype == torch.long else _OTHERS
    attention_state[int(module.layer_idx)] = LayerAttention(  # type: ignore[arg-type]
        heads=query.shape[1],
        kv_heads=key.shape[1],
        key_size=key.shape[3],
        value_size=value.shape[3],
        window=None if size in (_ALL, _OTHERS) else size,
        softmax=Softmax(softcap, s_aux),
        own_mask=size == _OTHERS,
    )
    return for_each_head(value, query.shape[1]).transpose(1, 2).contiguous(), None
