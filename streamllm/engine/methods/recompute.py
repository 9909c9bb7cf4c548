"""`recompute`: the fixed baseline. For each token the model runs again on the last S + W tokens; no cache is reused.

What the source documents call sliding window with re-computation (`run_fixed_baseline.py`): O(W^2) per token, the
quality that streaming is measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...policy import EvictionPolicy
from ..attention import attention
from ..backends import Backend
from ..decoding import Decoder, Progress, negative_log_likelihood
from ..model import LoadedModel
from . import Method

_SHORTER = "use a smaller total"


class WholeWindow:
    """Attention state of a plain causal forward: every query sees the tokens of its own call, up to itself."""

    def __init__(self, loaded: LoadedModel, backend: Backend) -> None:
        self.layers = loaded.layers
        self.backend = backend

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        how = self.layers[layer]
        return attention(self.backend, query, key, value, scaling, causal=True, window=how.window, softmax=how.softmax)


class RecomputingDecoder(Decoder):
    def __init__(self, loaded: LoadedModel, window: int, backend: Backend) -> None:
        loaded.check_positions(window, _SHORTER)
        self.loaded = loaded
        self.window = window
        self.state = WholeWindow(loaded, backend)
        self.recent = torch.empty(0, dtype=torch.long, device=loaded.device)

    @property
    def kv_length(self) -> int:
        return min(len(self.recent), self.window - 1)

    def feed(self, tokens: Tensor, logits_to_keep: int = 1) -> Tensor:
        seen = torch.cat((self.recent, tokens.to(self.loaded.device)))
        ends = range(len(seen) - (logits_to_keep or len(tokens)) + 1, len(seen) + 1)
        windows = (seen[max(end - self.window, 0) : end] for end in ends)
        logits = torch.cat([_last_logits(self.loaded, window[None], self.state) for window in windows])
        self.recent = seen[-self.window :]
        return logits


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> RecomputingDecoder:
    return RecomputingDecoder(loaded, policy.kept, backend)


def effective(policy: EvictionPolicy) -> EvictionPolicy:
    """Only the total matters."""
    return EvictionPolicy(n_sink=0, window_size=policy.kept)


@torch.inference_mode()
def losses_at(
    loaded: LoadedModel,
    tokens: np.ndarray,
    window: int,
    positions: Sequence[int],
    backend: Backend,
    progress: Progress | None = None,
    see: Callable[[int, Tensor], None] = lambda *_: None,
    batch: int = 8,
) -> np.ndarray:
    """Losses (float64 nats) of tokens[p + 1], after the window that ends at p, for each p of ascending `positions`.
    see: is shown each p, and the logits (1, vocabulary) there."""
    loaded.check_positions(window, _SHORTER)
    stream = torch.from_numpy(tokens).to(loaded.device)
    places = torch.tensor(positions, device=loaded.device)
    state = WholeWindow(loaded, backend)
    short, full = places[places < window - 1], places[places >= window - 1]
    losses = []
    with backend.active():
        if len(short):  # one causal forward holds all windows that start at the first token
            head = stream[None, : int(short[-1]) + 1]
            logits = loaded.forward(head, torch.arange(head.shape[1], device=loaded.device), state).logits[0]
            losses.append(negative_log_likelihood(logits[short], stream[short + 1]))
            for place in positions[: len(short)]:
                see(place, logits[place, None])
            if progress is not None:
                progress(len(short), len(positions))
        offsets = torch.arange(1 - window, 1, device=loaded.device)
        for start in range(0, len(full), batch):  # none in a text shorter than a window
            ends = full[start : start + batch]
            logits = _last_logits(loaded, stream[ends[:, None] + offsets], state)
            losses.append(negative_log_likelihood(logits, stream[ends + 1]))
            for place, row in zip(positions[len(short) + start :], logits, strict=False):
                see(place, row[None])
            if progress is not None:
                progress(sum(map(len, losses)), len(positions))
    return torch.cat(losses).cpu().numpy()


def _last_logits(loaded: LoadedModel, windows: Tensor, state: WholeWindow) -> Tensor:
    """windows (batch, length) -> logits (batch, vocabulary) after the last token of each."""
    positions = torch.arange(windows.shape[1], device=windows.device)
    return loaded.forward(windows, positions, state, logits_to_keep=1).logits[:, -1]


METHOD = Method(decoder, effective, losses_at=losses_at)
