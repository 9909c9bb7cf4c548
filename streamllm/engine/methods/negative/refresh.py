"""`refresh`: a prune puts some of what it would evict back; the source documents' idea, to be measured.

What is put back lies behind the window (`tail`, theirs) or between sinks and window (`order`). Keys are stored
un-rotated and rotated on every read, at their cache position or that in the stream, so that either order is one gather.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import UsageError
from ....policy import EvictionPolicy, RefreshPolicy
from ...backends import Backend
from ...decoding import CachedDecoder
from ...model import LoadedModel
from .. import Method
from ..mit import RawKeyCache


class RefreshingCache(RawKeyCache):
    def __init__(self, loaded: LoadedModel, policy: RefreshPolicy, backend: Backend) -> None:
        super().__init__(loaded, policy, backend)
        self.held: list[int] = []
        """Stream positions, in cache order, as the last prune left them."""
        self.window_size = policy.window_size
        self.at_tail = policy.refresh_position == "tail"

    def _in_stream(self, count: int) -> list[int]:
        """Stream positions, in cache order."""
        return self.held + list(range(len(self.held) + self.evicted, count + self.evicted))

    def in_stream(self, count: int) -> Tensor:
        return torch.tensor(self._in_stream(count), device=self.device)

    def evict(self, n_sink: int, drop: int) -> None:
        count = self.keys[0].shape[2]
        stream = self._in_stream(count)
        by_age = sorted(range(n_sink, count), key=stream.__getitem__)
        older, window = by_age[: -self.window_size], by_age[-self.window_size :]
        refreshed = [older[i] for i in thinned([stream[place] for place in older], drop)]
        order = [*range(n_sink), *(window + refreshed if self.at_tail else refreshed + window)]
        # The host need not wait until the list is there; on mps it must (pytorch issue 189690).
        places = torch.tensor(order).to(self.device, non_blocking=self.device.type != "mps")
        self.keys = [keys.index_select(2, places) for keys in self.keys]
        self.values = [values.index_select(2, places) for values in self.values]
        self.held = [stream[place] for place in order]
        self.evicted += drop


def thinned(positions: list[int], drop: int) -> list[int]:
    """Indices into ascending `positions` that are left when, `drop` times, the one goes whose neighbours are closest
    together (of several, the oldest): about evenly spaced. The first stays, and the last while there is another."""
    left = list(range(len(positions)))
    for _ in range(drop):
        gaps = [positions[after] - positions[before] for before, after in zip(left, left[2:], strict=False)]
        del left[1 + gaps.index(min(gaps)) if gaps else -1]
    return left


def effective(policy: EvictionPolicy) -> RefreshPolicy:
    if not isinstance(policy, RefreshPolicy):
        raise UsageError(
            "method 'refresh': needs a budget; python -m streamllm evaluate --refresh-budget B gives it one"
        )
    return policy


def decoder(loaded: LoadedModel, policy: EvictionPolicy, backend: Backend, execution: str) -> CachedDecoder:
    return CachedDecoder(loaded, policy, RefreshingCache(loaded, effective(policy), backend), execution)


METHOD = Method(decoder, effective, protocols=("decode-loop",))
