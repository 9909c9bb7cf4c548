"""A plain forward pass of a model, to ask it something."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    """Logits (1, n, vocabulary). Raises UnsupportedModelError if the model has none."""
    try:
        logits: Tensor = model(input_ids=tokens, **{"use_cache": False} | options).logits
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's code raises anything
        reason = " ".join(str(error).split())
        dtype = str(model.dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{type(model).__name__}: its forward pass fails on {tokens.shape[1]} tokens of text in {dtype} "
            f"({type(error).__name__}: {reason[:200]})"
        ) from error
    return logits
