"""A model in memory, ready for the engine; `models` loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import AttentionState
from .rotary import Rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, ready for `forward`."""

    name: str
    model: PreTrainedModel
    rotary: Rotary
    device: torch.device
    dtype: torch.dtype
    digest: str
    """Names the weights: the hub's commit, or a hash of the local files."""

    @property
    def trained_length(self) -> int | None:
        """Positions the model was trained on (`max_position_embeddings`)."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def attention_span(self) -> int | None:
        """Most keys a query of the model itself attends to: its sliding window, None if it has none."""
        return attention_span(self.model.config)

    @property
    def head_size(self) -> int:
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values, in all layers."""
        config = self.model.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(2 * config.num_hidden_layers * kv_heads * self.head_size * self.dtype.itemsize)

    def forward(self, input_ids: Tensor, position_ids: Tensor, state: AttentionState, logits_to_keep: int = 0) -> Any:
        """input_ids (batch, n), position_ids (n) -> output with `logits` (batch, n or `logits_to_keep`, vocabulary)."""
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids[None],
            use_cache=False,
            logits_to_keep=logits_to_keep,
            attention_state=state,
        )


def attention_span(config: Any) -> int | None:
    """A configuration's sliding window, None where no layer has one."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    return getattr(config, "sliding_window", None)
