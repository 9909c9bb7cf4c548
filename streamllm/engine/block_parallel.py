"""The block-parallel evaluator: a policy's per-token losses from a few block forwards, exactly.

See `block_state` for what a query sees; `rounded_blocks` for caches of another number format than the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..policy import EvictionPolicy
from .decoding import Progress, negative_log_likelihood
from .device import free_memory
from .methods import Keys
from .model import LoadedModel
from .rounded_blocks import block_state


def default_block(loaded: LoadedModel) -> int:
    """Queries per forward pass: few where arithmetic is what takes time, as every block reads the window again and
    masks half of what it computes of itself; on an accelerator, where small blocks wait for their launches, as many as
    leave logits and their float64 copy within an eighth of its free memory."""
    if loaded.device.type == "cpu":
        return 256
    fitting = free_memory(loaded.device) // (8 * _LOGIT_BYTES * loaded.vocabulary)
    return max(128, min(2048, 2 ** int(math.log2(max(fitting, 1)))))


_LOGIT_BYTES = 32
"""Bytes for one logit, as the model gives it, in float64, and in what the loss makes of that on the way."""


@torch.inference_mode()
def block_logits(
    loaded: LoadedModel,
    tokens: np.ndarray,
    policy: EvictionPolicy,
    block: int | None = None,
    progress: Progress | None = None,
    keys: Keys = "raw",
) -> Iterator[tuple[int, Tensor]]:
    """Block after block of queries: the number of its first, and logits (queries, vocabulary) in the model's dtype; row
    i is what the policy's decode loop has after token first + i. `tokens` (n): the last is nobody's query. `block`
    queries at a time (`default_block`), on which logits do not depend."""
    block = block or default_block(loaded)
    stream = torch.from_numpy(tokens).to(loaded.device)
    n_queries = len(tokens) - 1
    state = block_state(loaded, policy, n_queries, keys)
    for start in range(0, n_queries, block):
        stop = min(start + block, n_queries)
        state.begin_block(start, stop)
        raw = torch.zeros(stop - start, dtype=torch.long, device=loaded.device)
        with state.backend.active():
            logits = loaded.forward(stream[None, start:stop], raw, state).logits[0]
        yield start, logits
        if progress is not None:
            progress(stop, n_queries)


def block_parallel_losses(
    loaded: LoadedModel,
    tokens: np.ndarray,
    policy: EvictionPolicy,
    block: int | None = None,
    progress: Progress | None = None,
    see: Callable[[int, Tensor], None] = lambda *_: None,
    keys: Keys = "raw",
) -> np.ndarray:
    """tokens (n) -> losses (n - 1), float64 nats; element i is the negative log-likelihood of token i + 1.

    see: is shown what `block_logits` gives."""
    targets = torch.from_numpy(tokens[1:]).to(loaded.device)
    losses = []
    for start, logits in block_logits(loaded, tokens, policy, block, progress, keys):
        losses.append(negative_log_likelihood(logits, targets[start : start + len(logits)]))
        see(start, logits)
    return torch.cat(losses).cpu().numpy()
