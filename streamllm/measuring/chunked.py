"""Protocol `chunked`: the text in pieces, each a prefill, one compression and a short continuation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ..configuration import Configuration
from ..engine.attention import fuses, recorded_kernel
from ..engine.decoder import make_decoder
from ..engine.decoding import Progress, negative_log_likelihood
from ..engine.device import synchronize
from ..engine.model import LoadedModel
from ..engine.probing import replayed
from ..errors import UsageError
from ..policy import mean_keys
from .timing import attention_spans

CONTINUATION_TOKENS = 32


@dataclass(frozen=True, slots=True)
class ChunkRun:
    losses: np.ndarray
    """float64 nats (chunks * continuation_tokens)."""
    positions: np.ndarray
    """losses[i] is the negative log-likelihood of token positions[i] + 1."""
    prefill_sec: np.ndarray
    """(chunks): prefill and compression."""
    continuation_sec: np.ndarray
    """(chunks)"""
    continuation_tokens: int
    avg_attn_ms: float
    """Per token of a continuation, of all layers together; from an extra chunk."""
    peak_kv: int
    backend_used: str


@torch.inference_mode()
def chunk_losses(
    loaded: LoadedModel,
    what: Configuration,
    tokens: np.ndarray,
    progress: Progress | None = None,
    pause: Callable[[], None] = lambda: None,
) -> ChunkRun:
    """tokens (n), cut into chunks of compress_every + CONTINUATION_TOKENS; each is decoded afresh. Before the first,
    between two and after the last `pause` may do something else.

    "A prefill of R tokens, then one compression" is a policy: one that prunes every R tokens, without slack and limit.
    Raises UsageError for a text shorter than a chunk."""
    prefill, kept = what.policy.compress_every, [own.kept for own in what.policy.of_layers(len(loaded.layers))]
    if prefill <= max(kept):
        raise UsageError(
            f"prefill_tokens {prefill}: must exceed n_sink + window_size = {max(kept)}, or there is nothing to "
            f"compress; raise --prefill-tokens or lower --window-size"
        )
    if prefill < CONTINUATION_TOKENS:
        raise UsageError(
            f"prefill_tokens {prefill}: must be at least {CONTINUATION_TOKENS}, as many as continue it at once, or "
            f"those are compressed too; raise --prefill-tokens"
        )
    starts = range(0, len(tokens) - prefill - CONTINUATION_TOKENS, prefill + CONTINUATION_TOKENS)
    if not starts:
        raise UsageError(
            f"text of {len(tokens)} tokens: shorter than one chunk of {prefill} + {CONTINUATION_TOKENS} + 1; "
            f"lower --prefill-tokens or give a longer text"
        )
    stream = torch.from_numpy(tokens).to(loaded.device)
    first = stream[: prefill + CONTINUATION_TOKENS + 1]
    # A first chunk that warms up and does not count.
    with recorded_kernel(what.kernel, loaded.has_plain_softmax) as recorder:
        _chunk(loaded, what, first)
    if what.execution == "compile" and fuses(replayed(what.kernel, loaded, what.policy.kept), loaded.device):
        recorder.kernels.add("fused")

    def timed_chunk(timed: LoadedModel, begin: Callable[[], object]) -> None:
        begin()
        _chunk(timed, what, first)

    attn_ms = sum(attention_spans(loaded, timed_chunk)[loaded.config.num_hidden_layers :])  # but for the prefill's
    losses, clocks = [], []
    pause()
    for start in starts:
        piece = stream[start : start + prefill + CONTINUATION_TOKENS + 1]
        chunk_loss, readings = _chunk(loaded, what, piece)
        losses.append(chunk_loss.cpu().numpy())
        clocks.append(readings)
        pause()
        if progress is not None:
            progress(len(clocks), len(starts))
    seconds = np.array([[after - before for before, after in pairwise(readings)] for readings in clocks])
    offsets = np.arange(prefill, prefill + CONTINUATION_TOKENS)
    positions = np.concatenate([start + offsets for start in starts])
    return ChunkRun(
        losses=np.concatenate(losses),
        positions=positions,
        prefill_sec=seconds[:, 0],
        continuation_sec=seconds[:, 1],
        continuation_tokens=CONTINUATION_TOKENS,
        avg_attn_ms=attn_ms / CONTINUATION_TOKENS,
        peak_kv=max(prefill, mean_keys(kept, loaded.kv_sizes) + CONTINUATION_TOKENS),
        backend_used=recorder.used,
    )


def _chunk(loaded: LoadedModel, what: Configuration, piece: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """piece (R + continuation + 1) -> the continuation's losses, and the clock before, between and after."""
    prefill = what.policy.compress_every
    decoder = make_decoder(loaded, what)
    synchronize(loaded.device)
    clock = [time.perf_counter()]
    decoder.feed(piece[:prefill])
    synchronize(loaded.device)
    clock.append(time.perf_counter())
    logits = decoder.feed(piece[prefill:-1], logits_to_keep=0)
    synchronize(loaded.device)
    clock.append(time.perf_counter())
    return negative_log_likelihood(logits, piece[prefill + 1 :]), clock
