"""A model in memory, ready for the engine; `models` loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError, UsageError
from ..policy import EvictionPolicy
from .attention import AttentionState
from .rotary import Rotary, text_config

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
    weights: str | None = None
    """How they were quantised before, as Q4_1 of a GGUF file; None: not that we know."""

    @property
    def config(self) -> Any:
        """Configuration of the part that reads and writes text."""
        return text_config(self.model)

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def trained_length(self) -> int | None:
        """Positions the model was trained on (`max_position_embeddings`)."""
        return trained_length(self.config)

    @property
    def attention_span(self) -> int | None:
        """Most keys a query of the model itself attends to: its sliding window, None if it has none."""
        return attention_span(self.config)

    @property
    def head_size(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values, in all layers."""
        config = self.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(2 * config.num_hidden_layers * kv_heads * self.head_size * self.dtype.itemsize)

    def kept_bytes(self, policy: EvictionPolicy) -> int:
        """Bytes of one token's keys and values, as the policy keeps them."""
        return policy.kept_bytes(self.kv_bytes, str(self.dtype).removeprefix("torch."))

    def check_span(self, peak: int | None) -> None:
        """Raises UnsupportedModelError if a query is to attend to more keys than the model itself does: `peak`, or None
        for a cache that grows without end."""
        span = self.attention_span
        if span is not None and (peak is None or peak > span):
            holds = "grows without end" if peak is None else f"holds up to {peak}"
            raise UnsupportedModelError(
                f"{self.name}: attends to its last {span} tokens only (sliding window), the policy {holds}; "
                f"keep the cache within {span}"
            )

    def forward(self, input_ids: Tensor, position_ids: Tensor, state: AttentionState, logits_to_keep: int = 0) -> Any:
        """input_ids (batch, n), position_ids (n) -> output with `logits` (batch, n or `logits_to_keep`, vocabulary)."""
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids[None],
            use_cache=False,
            logits_to_keep=logits_to_keep,
            attention_state=state,
        )


def trained_length(config: Any) -> int | None:
    """A configuration's `max_position_embeddings`, None where it has none (or -1: no limit). Raises UsageError for one
    below 2."""
    length = getattr(config, "max_position_embeddings", None)
    if length == -1:
        return None
    if length is not None and (not isinstance(length, int) or length < 2):
        raise UsageError(f"max_position_embeddings {length!r}: must be a whole number >= 2; mend the config.json")
    return length


def attention_span(config: Any) -> int | None:
    """A configuration's sliding window, None where no layer has one."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return None
    return getattr(config, "sliding_window", None)
