"""Log-likelihoods of answers after their contexts, under any policy and method, without decoding where that is exact.

What a query sees depends on its number in the stream alone. So streams of any lengths go through the evaluator side by
side, padded at their ends, which nobody sees; and answers to one context share its keys and values, evictions included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..configuration import Configuration
from ..engine.block_parallel import default_block
from ..engine.decoder import make_decoder
from ..engine.decoding import Decoder, Progress
from ..engine.device import float64_device
from ..engine.methods import Keys, is_evaluated, method_named, sampled_losses
from ..engine.model import LoadedModel
from ..engine.rounded_blocks import Blocks, block_state
from ..policy import EvictionPolicy, evicted_before

Tokens = tuple[int, ...]
_PIECE = 512
"""Most tokens that a decoder is fed at once: attention among them is quadratic."""


@dataclass(frozen=True, slots=True)
class Request:
    context: Tokens
    """At least one token."""
    answer: Tokens
    """At least one."""

    @property
    def queries(self) -> int:
        return len(self.context) + len(self.answer) - 1


@dataclass(frozen=True, slots=True)
class Score:
    log_likelihood: float
    """Nats; -inf or NaN where the dtype's range is not enough."""
    is_greedy: bool
    """Whether each of the answer's tokens is the likeliest after those before it: what greedy decoding would write."""


def scored(
    loaded: LoadedModel, what: Configuration, requests: Sequence[Request], progress: Progress | None = None
) -> list[Score]:
    """The requests' scores, in their order. Where nothing is evicted every method is the model itself."""
    policy = what.effective
    if is_evaluated(what.method, loaded.dtype_name):
        return evaluated(loaded, policy, requests, progress, what.keys)
    dense = method_named("dense").effective(policy)
    short = [request for request in requests if request.queries <= policy.kept]
    long = [request for request in requests if request.queries > policy.kept]
    done = iter(evaluated(loaded, dense, short, progress))
    decoded = iter([_decoded(loaded, what, request) for request in _counted(long, len(short), progress)])
    return [next(done if request.queries <= policy.kept else decoded) for request in requests]


def _counted(requests: Sequence[Request], before: int, progress: Progress | None) -> Iterator[Request]:
    for number, request in enumerate(requests):
        yield request
        if progress is not None:
            progress(before + number + 1, before + len(requests))


@torch.inference_mode()
def _decoded(loaded: LoadedModel, what: Configuration, request: Request) -> Score:
    decoder = make_decoder(loaded, what)
    stream = request.context + request.answer[:-1]
    with what.kernel.active():
        if sampled_losses(what.method) is not None:  # all at once: a window for each token of the answer
            logits = decoder.feed(torch.tensor(stream), len(request.answer))
        else:
            tokens = torch.tensor(stream, device=loaded.device)
            policies = what.effective.of_layers(len(loaded.layers))
            logits = torch.cat(list(feed(decoder, policies, tokens, len(request.context) - 1)))
    return _score(logits, torch.tensor(request.answer, device=logits.device))


def feed(decoder: Decoder, policies: Sequence[EvictionPolicy], stream: Tensor, wanted: int) -> Iterator[Tensor]:
    """Feeds a decoder that has seen nothing, as many tokens of `stream` (n) at once as the policies of the layers
    allow; yields the logits (kept, vocabulary) that follow the tokens from number `wanted` on."""
    evicted = list(zip(*(evicted_before(own, len(stream)) for own in set(policies)), strict=True))
    start = 0
    while start < len(stream):
        stop = start + 1
        while stop < min(len(stream), start + _PIECE) and evicted[stop] == evicted[start]:
            stop += 1
        kept = stop - max(start, wanted)
        logits = decoder.feed(stream[start:stop], max(kept, 1))
        if kept > 0:
            yield logits
        start = stop


@dataclass(frozen=True, slots=True)
class _Context:
    """Answers to one context. Those that differ in their last token only are one row."""

    tokens: Tokens
    rows: dict[Tokens, list[int]] = field(default_factory=dict)
    """Answer less its last token -> the requests that it is the beginning of."""

    @property
    def longest(self) -> int:
        return len(self.tokens) + max(map(len, self.rows))


def evaluated(
    loaded: LoadedModel,
    policy: EvictionPolicy,
    requests: Sequence[Request],
    progress: Progress | None = None,
    keys: Keys = "raw",
) -> list[Score]:
    """The requests' scores by the block-parallel evaluator. keys: how the method keeps them (`block_logits`)."""
    found: dict[int, Score] = {}
    for batch in _batches(requests, default_block(loaded)):
        found |= _Batch(loaded, policy, requests, batch, keys).scores()
        if progress is not None:
            progress(len(found), len(requests))
    return [found[number] for number in range(len(requests))]


def _batches(requests: Sequence[Request], most: int) -> Iterator[list[_Context]]:
    """Contexts of about one length together, the longest first, at most so many tokens unless it is one row."""
    contexts: dict[Tokens, _Context] = {}
    for number, request in enumerate(requests):
        context = contexts.setdefault(request.context, _Context(request.context))
        context.rows.setdefault(request.answer[:-1], []).append(number)
    batch: list[_Context] = []
    tokens = 0
    for context in sorted(contexts.values(), key=lambda context: -context.longest):
        for tail, numbers in context.rows.items():
            new = len(tail) + 1 if batch and batch[-1].tokens is context.tokens else len(context.tokens) + len(tail)
            if batch and tokens + new > most:
                yield batch
                batch, tokens = [], 0
            if not batch or batch[-1].tokens is not context.tokens:
                batch.append(_Context(context.tokens))
                new = len(context.tokens) + len(tail)
            batch[-1].rows[tail] = numbers
            tokens += new
    if batch:
        yield batch


class _Batch:
    """Streams side by side, padded at the end."""

    def __init__(
        self,
        loaded: LoadedModel,
        policy: EvictionPolicy,
        requests: Sequence[Request],
        contexts: Sequence[_Context],
        keys: Keys,
    ) -> None:
        self.loaded, self.requests, self.contexts = loaded, requests, contexts
        self.rows = [(context.tokens + tail, numbers) for context in contexts for tail, numbers in context.rows.items()]
        self.longest = max(len(tokens) for tokens, _ in self.rows)
        self.state = block_state(loaded, policy, self.longest, keys)

    @torch.inference_mode()
    def scores(self) -> dict[int, Score]:
        """By the numbers of the requests."""
        shared = min(len(context.tokens) for context in self.contexts) - 1
        contexts = [context.tokens[:shared] for context in self.contexts]
        for _ in forward(self.loaded, self.state, self._padded(contexts, shared), 0, shared):
            pass
        counts = torch.tensor([len(context.rows) for context in self.contexts], device=self.loaded.device)
        self.state.repeat(counts)
        rest = self._padded([tokens[shared:] for tokens, _ in self.rows], self.longest - shared)
        parts: dict[int, list[tuple[float, bool]]] = {}
        for start, logits in forward(self.loaded, self.state, rest, shared, shared):
            for row, (_, numbers) in zip(logits, self.rows, strict=True):
                for number in numbers:
                    self._add(parts.setdefault(number, []), self.requests[number], start, row)
        return {
            number: Score(sum(likelihood for likelihood, _ in found), all(greedy for _, greedy in found))
            for number, found in parts.items()
        }

    def _padded(self, streams: Sequence[Sequence[int]], length: int) -> Tensor:
        padded = torch.zeros(len(streams), length, dtype=torch.long)
        for row, tokens in zip(padded, streams, strict=True):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        return padded.to(self.loaded.device)

    def _add(self, parts: list[tuple[float, bool]], request: Request, start: int, logits: Tensor) -> None:
        """The part of the answer after queries start ...; logits (queries, vocabulary)."""
        first = len(request.context) - 1
        low, high = max(start, first), min(start + len(logits), request.queries)
        if low < high:
            targets = torch.tensor(request.answer[low - first : high - first], device=logits.device)
            score = _score(logits[low - start : high - start], targets)
            parts.append((score.log_likelihood, score.is_greedy))


def forward(
    loaded: LoadedModel, state: Blocks, streams: Tensor, first: int, wanted: int
) -> Iterator[tuple[int, Tensor]]:
    """streams (batch, n): the tokens from number `first` on, which the state goes on with. Block after block, the
    number of the first query that has logits, and logits (batch, queries, vocabulary); of blocks that end before query
    `wanted`, none."""
    batch, end = streams.shape[0], first + streams.shape[1]
    block = max(default_block(loaded) // batch, 1)
    for start in range(first, end, block):
        stop = min(start + block, end)
        state.begin_block(start, stop)
        raw = torch.zeros(stop - start, dtype=torch.long, device=loaded.device)
        low = max(start, wanted)
        with state.backend.active():
            logits = loaded.forward(
                streams[:, start - first : stop - first], raw, state, logits_to_keep=max(stop - low, 1)
            ).logits
        if low < stop:
            yield low, logits


def _score(logits: Tensor, targets: Tensor) -> Score:
    """logits (n, vocabulary), targets (n)."""
    is_greedy = bool((logits.argmax(-1) == targets).all())
    logits = logits.to(float64_device(logits.device)).double()
    chosen = logits.gather(-1, targets[:, None].to(logits.device))[:, 0]
    return Score(float((chosen - logits.logsumexp(-1)).sum()), is_greedy)
