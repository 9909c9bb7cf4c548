"""A model in memory, ready for the engine; `models` loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from ..policy import EvictionPolicy, peak_without_end, with_derived_window
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

    def check_length(self, policy: EvictionPolicy, n_tokens: int = 0) -> None:
        """Raises UsageError for a policy under which a query's position is beyond `changes_at`: in an endless stream;
        where positions grow with it, in one of `n_tokens`."""
        changes = changes_at(self.config)
        if changes is None:
            return
        if policy.keeps_positions or policy.compress_every == 0:
            self.check_positions(n_tokens, "use positions compact and a policy that evicts, or a shorter text")
            return
        for own in dict.fromkeys(policy.of_layers(len(self.layers))):
            if (peak := peak_without_end(own) or 0) > changes.length:
                widest = with_derived_window(own, changes.length, "peak")
                fix = f"use a window_size of {widest.window_size} or less, a total of {widest.kept}"
                self.check_positions(peak, fix if policy.is_uniform else f"{fix}, in the layer that holds most")

    def check_positions(self, count: int, fix: str) -> None:
        """Raises UsageError for so many positions if the model is another one at the last of them."""
        changes = changes_at(self.config)
        if changes is not None and count > changes.length:
            raise UsageError(
                f"{count} positions: {type(self.model).__name__} {changes.what} beyond {changes.length}; {fix}"
            )

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

    @property
    def kv_layers(self) -> tuple[tuple[int | None, int], ...]:
        """Of each layer, its sliding window and the bytes of one token's keys and values."""
        return tuple((layer.window, self.dtype.itemsize * layer.kv_size) for layer in self.layers)

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


class Change(NamedTuple):
    """What is different in a longer text."""

    length: int
    what: str
    of_queries: bool = False
    """By where each of them is; else of all tokens alike."""


def changes_at(config: Any) -> Change | None:
    """By a configuration, the longest text whose positions are rotary ones and nothing else, and what a longer one has;
    None: all are."""
    given = getattr(config, "rope_parameters", None) or {}
    for found in [given, *(value for value in given.values() if isinstance(value, dict))]:
        if found.get("rope_type") == "dynamic":
            return Change(config.max_position_embeddings, "turns by other angles (rope_type 'dynamic')")
        if found.get("rope_type") == "longrope":
            return Change(found["original_max_position_embeddings"], "turns by other angles (rope_type 'longrope')")
        if found.get("llama_4_scaling_beta"):
            return Change(found["original_max_position_embeddings"], "scales its queries (llama_4_scaling_beta)", True)
    return None


def trained_length(config: Any) -> int | None:
    """A configuration's `max_position_embeddings`, None where it has none (or -1: no limit), or less where a cache of
    that and the next token's key would be longer than `changes_at`. Raises UsageError for one below 2."""
    longest, changes = _trained_length(config), changes_at(config)
    return longest if changes is None or longest is None else min(longest, changes.length - 1)


def _trained_length(config: Any) -> int | None:
    length = getattr(config, "max_position_embeddings", None)
    if length == -1:
        return None
    if length is not None and (not isinstance(length, int) or length < 2):
        raise UsageError(f"max_position_embeddings {length!r}: must be a whole number >= 2; mend the config.json")
    return length
