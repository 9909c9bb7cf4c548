"""A model in memory, ready for the engine; `models` loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..policy import EvictionPolicy
from .attention import AttentionState
from .layers import Layer
from .rotary import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, ready for `forward`."""

    name: str
    model: PreTrainedModel
    layers: tuple[Layer, ...]
    device: torch.device
    dtype: torch.dtype
    digest: str
    """Names the weights: the hub's commit, or a hash of the local files."""
    weights: str | None = None
    """How they were quantised before, as Q4_1 of a GGUF file; None: not that we know."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

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
    def head_size(self) -> int:
        """Of the first layer's keys."""
        return self.layers[0].key_size

    @property
    def attention_span(self) -> int | None:
        """Most tokens that any layer lets a query see: the longest of their sliding windows, None if one has none."""
        windows = [layer.window for layer in self.layers]
        return None if None in windows else max(window for window in windows if window is not None)

    @property
    def has_plain_softmax(self) -> bool:
        """Whether no layer has soft caps or learned sinks, which torch's kernels have not."""
        return all(layer.softmax.is_plain for layer in self.layers)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values, in all layers."""
        return self.dtype.itemsize * sum(self.kv_sizes)

    @property
    def kv_sizes(self) -> list[int]:
        """Of each layer, numbers in the keys and values of one token."""
        return [layer.kv_size for layer in self.layers]

    def kept_bytes(self, policy: EvictionPolicy) -> int:
        """Bytes of one token's keys and values, as the policy keeps them."""
        return policy.kept_bytes(self.kv_bytes, self.dtype_name)

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
