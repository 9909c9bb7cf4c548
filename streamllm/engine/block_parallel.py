"""The block-parallel evaluator: a policy's per-token losses from a few block forwards, exactly.

Which tokens a query sees depends on the policy alone, and rotary positions are relative. So for query t, with e tokens
evicted before it (`policy.evicted_before`), the logits a decode loop would compute are

    window token j >= S + e:   Rot(t) q . Rot(j) k       true distance, the same as between cache positions
    sink i < S:                Rot(t - e) q . Rot(i) k   distance between cache positions
                               Rot(t) q . Rot(i) k       where survivors keep their positions in the stream

and everything else is masked. Both families of logits come out of one attention call: the sink logits are computed
beforehand and fed through extra head dimensions in which sink keys are one-hot and window keys are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import EvictionPolicy, evicted_before
from .attention import attention
from .backends import BACKENDS
from .decoding import KVCache, Progress, negative_log_likelihood
from .device import free_memory
from .model import LoadedModel


class BlockState(KVCache):
    """The cache of a stream processed in blocks; the model is called with position 0, so keys are kept raw."""

    def __init__(self, loaded: LoadedModel, policy: EvictionPolicy, n_tokens: int) -> None:
        super().__init__(loaded, BACKENDS["auto"])
        self.n_sink = policy.n_sink
        self.keeps_positions = policy.keeps_positions
        self.evicted = torch.tensor(evicted_before(policy, n_tokens), device=loaded.device)
        self.held = torch.empty(0, dtype=torch.long, device=loaded.device)
        """Stream positions of the kept tokens: the sinks, then a contiguous window."""

    def begin_block(self, start: int, stop: int) -> None:
        """Forgets what no query of tokens start .. stop-1 sees, and lays out what is the same in every layer."""
        self._forget(start)
        queries = torch.arange(start, stop, device=self.device)
        self.held = torch.cat((self.held, queries))
        evicted = self.evicted[start:stop, None]
        is_sink = self.held < self.n_sink
        self.sinks = int(is_sink.sum())
        self.visible = (is_sink | (self.held >= self.n_sink + evicted)) & (self.held <= queries[:, None])
        # Only distances count: counting from the oldest window token keeps angles small in a stream of any length.
        window = self.held[self.sinks :]
        origin = window[0] if len(window) else queries[-1]
        window_queries = (queries - origin).clamp(min=0)  # a sink sees no window token
        self.rotary.reserve(int(window_queries.max()) + 1)
        self.query_angles = self.rotary.at(window_queries)
        self.key_angles = self.rotary.at(window - origin)
        # Not from the table, which would grow with a stream in which sinks are ever farther away.
        self.query_angles_to_sinks = self.rotary.turn(queries if self.keeps_positions else queries - evicted[:, 0])
        self.sink_angles = self.rotary.span(0, self.sinks)

    def _forget(self, start: int) -> None:
        if not len(self.held):
            return
        oldest = self.n_sink + int(self.evicted[start])
        drop = int(((self.held >= self.n_sink) & (self.held < oldest)).sum())
        if drop:
            self.held = torch.cat((self.held[: self.n_sink], self.held[self.n_sink + drop :]))
            self.evict(self.n_sink, drop)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.append(layer, key, value)
        groups, size, sinks = query.shape[1] // keys.shape[1], query.shape[-1], self.sinks
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        sink_query = self.rotary.rotate(query, self.query_angles_to_sinks)
        sink_keys = self.rotary.rotate(keys[:, :, :sinks], self.sink_angles)
        window_query = self.rotary.rotate(query, self.query_angles)
        window_keys = self.rotary.rotate(keys[:, :, sinks:], self.key_angles)

        precision = torch.promote_types(query.dtype, torch.float32)
        logits = sink_query.to(precision) @ sink_keys.to(precision).transpose(-1, -2)
        parts = [logits.to(query.dtype)]
        if precision != query.dtype:  # a half-precision logit would be off by some hundredths: carry the rest along
            parts.append((logits - parts[0]).to(query.dtype))
        one_hot = torch.eye(sinks, dtype=query.dtype, device=query.device).repeat(1, len(parts))
        width = -(size + one_hot.shape[-1]) % 8 + size + one_hot.shape[-1]  # fused kernels want multiples of 8
        sink_rows = F.pad(one_hot, (size, width - size - one_hot.shape[-1]))
        output = attention(
            self.backend,
            _widen(torch.cat((window_query, *parts), dim=-1), width),
            torch.cat((sink_rows.expand(*keys.shape[:2], -1, -1), _widen(window_keys, width)), dim=2),
            _widen(values, width),  # CPU kernels leave their fast path where values are narrower than keys
            scaling,
            mask=self.visible,
        )
        return output[..., :size]


def _widen(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))


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
) -> Iterator[tuple[int, Tensor]]:
    """Block after block of queries: the number of its first, and logits (queries, vocabulary) in the model's dtype; row
    i is what the policy's decode loop has after token first + i. `tokens` (n): the last is nobody's query. `block`
    queries at a time (`default_block`), on which logits do not depend."""
    block = block or default_block(loaded)
    stream = torch.from_numpy(tokens).to(loaded.device)
    n_queries = len(tokens) - 1
    state = BlockState(loaded, policy, n_queries)
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
) -> np.ndarray:
    """tokens (n) -> losses (n - 1), float64 nats; element i is the negative log-likelihood of token i + 1.

    see: is shown what `block_logits` gives."""
    targets = torch.from_numpy(tokens[1:]).to(loaded.device)
    losses = []
    for start, logits in block_logits(loaded, tokens, policy, block, progress):
        losses.append(negative_log_likelihood(logits, targets[start : start + len(logits)]))
        see(start, logits)
    return torch.cat(losses).cpu().numpy()
