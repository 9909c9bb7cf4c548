"""Whether each token of a text was the likeliest one: what a model would have said, without decoding.

An answer that is forced, that is to say fed to the model as a part of its text, is what greedy decoding would have said
if, and only if, every token of it was the likeliest: as long as each was, the decoder has fed itself just these tokens,
and so has the same text behind it, the same cache and the same logits. So one evaluation of a long text, block by
block, tells of all answers in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..engine.block_parallel import block_logits
from ..engine.decoding import negative_log_likelihood
from .quality import check_finite

if TYPE_CHECKING:
    from ..engine.decoding import Progress
    from ..engine.methods import Keys
    from ..engine.model import LoadedModel
    from ..policy import EvictionPolicy


def losses_and_hits(
    loaded: LoadedModel,
    tokens: np.ndarray,
    policy: EvictionPolicy,
    progress: Progress | None = None,
    keys: Keys = "raw",
) -> np.ndarray:
    """tokens (n) -> (n - 1, 3): position, float64 nats of the token after it, and 1 where that is the likeliest, else
    0. Of several that are, the first counts, as for a decoder. Raises NonFiniteLossError."""
    targets = torch.from_numpy(tokens[1:]).to(loaded.device)
    losses, hits = [], []
    for start, logits in block_logits(loaded, tokens, policy, progress=progress, keys=keys):
        wanted = targets[start : start + len(logits)]
        losses.append(negative_log_likelihood(logits, wanted))
        hits.append(logits.argmax(-1) == wanted)
    nats = torch.cat(losses).cpu().numpy()
    check_finite(nats, str(loaded.dtype))
    return np.column_stack((np.arange(len(nats)), nats, torch.cat(hits).cpu().numpy()))
