"""The softmax of a layer's attention: plain, with a soft cap, with learned sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Softmax(NamedTuple):
    """What the softmax of a layer has besides products of queries and keys."""

    cap: float | None = None
    """A logit x becomes cap tanh(x / cap) (Gemma 2)."""
    sinks: Tensor | None = None
    """(heads): one more logit for each head, learned, without a value (gpt-oss)."""

    @property
    def is_plain(self) -> bool:
        return self.cap is None and self.sinks is None

    def weights(self, logits: Tensor) -> Tensor:
        """Scaled logits (batch, heads, new, held), masked ones -inf -> weights, in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat((logits, sinks), -1).softmax(-1)[..., :-1]

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


PLAIN = Softmax()
