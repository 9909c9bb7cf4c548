"""The cache of the block-parallel evaluator: which keys a block of queries sees, and at what distances.

Which tokens a query sees depends on the policy alone, and rotary positions are relative. So for query t, with e tokens
evicted before it (`policy.evicted_before`), the logits a decode loop would compute are

    window token j >= S + e:   Rot(t) q . Rot(j) k       true distance, the same as between cache positions
    sink i < S:                Rot(t - e) q . Rot(i) k   distance between cache positions
                               Rot(t) q . Rot(i) k       where survivors keep their positions in the stream

and everything else is masked; in a layer with a window of its own, what these distances put outside of it as well. Both
of logits come out of one attention call: the sink logits are computed beforehand and fed through extra head dimensions
in which sink keys are one-hot and window keys are zero. A layer's learned sinks are one more such key, without a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policy import EvictionPolicy, evicted_before
from .attention import attention, for_each_head
from .backends import BACKENDS
from .decoding import KVCache
from .model import LoadedModel
from .softmax import PLAIN


class BlockState(KVCache):
    """The cache of a stream processed in blocks; the model is called with position 0, so keys are kept raw."""

    def __init__(self, loaded: LoadedModel, policy: EvictionPolicy, n_tokens: int) -> None:
        super().__init__(loaded, BACKENDS["auto"], policy.kv_dtype)
        self.n_sink = policy.n_sink
        self.keeps_positions = policy.keeps_positions
        evicted = evicted_before(policy, n_tokens)
        self.evicted = torch.tensor(evicted, device=loaded.device)
        held = n_tokens if self.keeps_positions else max((t + 1 - gone for t, gone in enumerate(evicted)), default=0)
        self.windows = [window for window in self.windows if window < held]
        """Of the layers that have one which leaves something out."""
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
        visible = (is_sink | (self.held >= self.n_sink + evicted)) & (self.held <= queries[:, None])
        self.visible: dict[int | None, Tensor] = {None: visible}
        """By the window of a layer: (queries, held)."""
        if self.windows:
            distances = queries[:, None] - self.held - (0 if self.keeps_positions else evicted * is_sink)
            self.visible |= {window: visible & (distances < window) for window in self.windows}
        # Only distances count: counting from the oldest window token keeps angles small in a stream of any length.
        window = self.held[self.sinks :]
        origin = window[0] if len(window) else queries[-1]
        window_queries = (queries - origin).clamp(min=0)  # a sink sees no window token
        longest = int(window_queries.max()) + 1
        self.query_angles = self.angles(lambda rotary: rotary.reserve(longest).at(window_queries))
        self.key_angles = self.angles(lambda rotary: rotary.at(window - origin))
        # Not from the table, which would grow with a stream in which sinks are ever farther away.
        to_sinks = queries if self.keeps_positions else queries - evicted[:, 0]
        self.query_angles_to_sinks = self.angles(lambda rotary: rotary.turn(to_sinks))
        self.sink_angles = self.angles(lambda rotary: rotary.span(0, self.sinks))

    def visible_to(self, layer: int) -> Tensor:
        return self.visible.get(self.layers[layer].window, self.visible[None])

    def _forget(self, start: int) -> None:
        if not len(self.held):
            return
        oldest = self.n_sink + int(self.evicted[start])
        drop = int(((self.held >= self.n_sink) & (self.held < oldest)).sum())
        if drop:
            self.held = torch.cat((self.held[: self.n_sink], self.held[self.n_sink + drop :]))
            self.evict(self.n_sink, drop)

    def repeat(self, counts: Tensor) -> None:
        """Each stream of the batch as often as it says (batch), from here on."""
        for held in (self.keys, self.values):
            held[:] = [x.repeat_interleave(counts, dim=0) for x in held]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = (for_each_head(x, query.shape[1]) for x in self.append(layer, key, value))
        rotary, sinks = self.layers[layer].rotary, self.sinks
        window_query = rotary.rotate(query, self.query_angles[layer])
        window_keys = rotary.rotate(keys[:, :, sinks:], self.key_angles[layer])
        logits = self.sink_logits(layer, query, keys[:, :, :sinks])
        return self.attention(layer, window_query, window_keys, values, logits, scaling)

    def sink_logits(self, layer: int, query: Tensor, keys: Tensor) -> Tensor:
        """Raw queries (1, heads, new, size) and sinks (1, heads, S, size) -> (1, heads, new, S), float32 at least."""
        precision = torch.promote_types(query.dtype, torch.float32)
        rotary = self.layers[layer].rotary
        query = rotary.rotate(query, self.query_angles_to_sinks[layer])
        keys = rotary.rotate(keys, self.sink_angles[layer])
        return query.to(precision) @ keys.to(precision).transpose(-1, -2)

    def attention(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, logits: Tensor, scaling: float
    ) -> Tensor:
        """Over the sinks by their logits, unscaled, and over the window's keys; values of both."""
        mask, softmax = self.visible_to(layer), self.layers[layer].softmax
        value_size = values.shape[-1]
        if softmax.sinks is not None and softmax.cap is None:
            learned = softmax.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1) / scaling
            logits, softmax = torch.cat((learned, logits), dim=-1), PLAIN
            values = F.pad(values, (0, 0, 1, 0))
            mask = F.pad(mask, (1, 0), value=True)
        size, sinks = query.shape[-1], logits.shape[-1]
        parts = [logits.to(query.dtype)]
        if logits.dtype != query.dtype:  # a half-precision logit would be off by some hundredths: carry the rest along
            parts.append((logits - parts[0]).to(query.dtype))
        one_hot = torch.eye(sinks, dtype=query.dtype, device=query.device).repeat(1, len(parts))
        width = -(size + one_hot.shape[-1]) % 8 + size + one_hot.shape[-1]  # fused kernels want multiples of 8
        sink_rows = F.pad(one_hot, (size, width - size - one_hot.shape[-1]))
        output = attention(
            self.backend,
            _widen(torch.cat((query, *parts), dim=-1), width),
            torch.cat((sink_rows.expand(*keys.shape[:2], -1, -1), _widen(keys, width)), dim=2),
            _widen(values, width),  # CPU kernels leave their fast path where values are narrower than keys
            scaling,
            mask=mask,
            softmax=softmax,
        )
        return output[..., :value_size]


def _widen(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, max(width - x.shape[-1], 0)))
