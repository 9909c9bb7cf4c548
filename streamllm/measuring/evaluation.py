"""One evaluation: its quality, its speed, and the flat result that tables are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..configuration import Configuration
from ..engine.backends import BACKENDS
from ..engine.block_parallel import block_parallel_losses
from ..engine.decoder import make_decoder
from ..engine.decoding import Progress, decode_loop
from ..engine.device import peak_memory
from ..engine.methods import sampled_losses
from ..engine.model import LoadedModel
from ..policy import EvictionPolicy, longest_kv, peak_kv, steady_state
from .chunked import chunk_losses
from .divergence import Comparing, Distributions, Divergences, Keeping
from .pairing import PairedTimes, between_references, load_average
from .quality import FEW_LOSSES, check_finite, median_interval, perplexity
from .text import TokenStream
from .timing import Reference, Speed, attention_ms, measure_speed, used_backend

_SEGMENTS = 12
"""Segments of a decode loop."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Per-token losses, and where they were taken."""

    losses: np.ndarray
    """float64 nats (n)."""
    positions: np.ndarray
    """Ascending (n): losses[i] is the negative log-likelihood of token positions[i] + 1."""
    peak_kv: int
    seconds: float
    warning: str | None = None
    beside: Sequence[Distributions | Divergences] = ()
    """What the same forward gave besides: distributions, or how far they are from a reference's."""
    chunk: int | None = None
    """Losses of each chunk, of a text in chunks."""

    @property
    def table(self) -> np.ndarray:
        """(n, 2): position, loss."""
        return np.column_stack((self.positions, self.losses))

    def summary(self) -> dict[str, Any]:
        return {
            **perplexity(self.losses, self.chunk).flat("perplexity"),
            "evaluated_tokens": len(self.losses),
            "peak_kv": self.peak_kv,
            "quality_sec": self.seconds,
            **{name: value for one in self.beside for name, value in one.summary(len(self.losses)).items()},
            **({"warning": self.warning} if self.warning else {}),
        }


def measure_quality(
    loaded: LoadedModel,
    what: Configuration,
    stream: TokenStream,
    progress: Progress | None = None,
    positions: np.ndarray | None = None,
    watch: Sequence[Keeping | Comparing] = (),
) -> Quality:
    """Protocol `fast`: every token, block-parallel; of `recompute`, those at ascending `positions`. watch: are
    shown the logits that the losses are taken from.

    Raises NonFiniteLossError."""
    policy = what.effective
    started = time.perf_counter()
    n_losses = len(stream.tokens) - 1
    losses_at = sampled_losses(what.method)
    peak = peak_kv(policy, n_losses, loaded.kv_sizes) if losses_at is None else min(policy.kept, n_losses)

    def see(place: int, logits: Tensor) -> None:
        for one in watch:
            one.see(place, logits)

    if losses_at is not None:
        positions = np.arange(n_losses) if positions is None else positions
        losses = losses_at(loaded, stream.tokens, policy.kept, positions.tolist(), BACKENDS["auto"], progress, see)
    else:
        positions = np.arange(n_losses)
        losses = block_parallel_losses(loaded, stream.tokens, policy, progress=progress, see=see, keys=what.keys)
    check_finite(losses, str(loaded.dtype))
    beside = [one.found(positions, losses) for one in watch]
    seconds = time.perf_counter() - started
    return Quality(losses, positions, peak, seconds, _warning(loaded, policy, peak, n_losses), beside)


def times_summary(times: PairedTimes) -> dict[str, Any]:
    """The timing's results: the ratio to the reference, and the raw milliseconds of both, which hold for that minute
    only."""
    return {
        **times.ratio.flat("time_ratio"),
        **median_interval(np.array(times.ms)).flat("measured_tpot_ms"),
        "reference_tpot_ms": float(np.median(times.reference_ms)),
        "pairs": len(times.ms),
        "timed_at": times.timed_at,
        "load": times.load,
        **({} if times.reference_execution == "eager" else {"reference_execution": times.reference_execution}),
    }


def speed_summary(speed: Speed, requested: str) -> dict[str, Any]:
    return {
        **times_summary(speed.times),
        "prefill_sec": speed.prefill_sec,
        "first_token_latency_sec": speed.first_token_latency_sec,
        "avg_attn_ms": speed.avg_attn_ms,
        "peak_memory_mb": speed.peak_memory_mb,
        "bytes_per_token": speed.bytes_per_token,
        "bandwidth_utilization": speed.bandwidth_utilization,
        "tokens_per_segment": speed.tokens_per_segment,
        "warmup_tokens": speed.warmup_tokens,
        "speed_sec": speed.seconds,
        "backend": speed.backend_used,
        "backend_requested": requested,
    }


Evaluator = Callable[
    [LoadedModel, Configuration, TokenStream, Reference, Progress | None],
    tuple[Quality, dict[str, Any]],
]
"""The type of function that an entry of `options.PROTOCOLS` names: (model, configuration, text, reference, progress)
-> the quality, and the record of quality and speed."""


def evaluate_fast(
    loaded: LoadedModel,
    what: Configuration,
    stream: TokenStream,
    reference: Reference,
    progress: Progress | None = None,
    watch: Callable[[], Sequence[Comparing]] = tuple,
) -> tuple[Quality, dict[str, Any]]:
    """Quality block-parallel, speed from a steady-state sample. watch: as `measure_quality`'s, which do not stay
    in memory while it is timed. Raises as `measure_quality`."""
    quality = measure_quality(loaded, what, stream, progress, None, watch())
    speed = measure_speed(loaded, what, stream.tokens, reference)
    return quality, fast_record(quality.summary(), speed_summary(speed, what.backend))


def fast_record(quality: dict[str, Any], speed: dict[str, Any]) -> dict[str, Any]:
    """The two halves of a result by protocol `fast`, which may have been measured at different times."""
    return quality | speed | {"measuring_sec": quality["quality_sec"] + speed["speed_sec"]}


def evaluate_decode_loop(
    loaded: LoadedModel,
    what: Configuration,
    stream: TokenStream,
    reference: Reference,
    progress: Progress | None = None,
) -> tuple[Quality, dict[str, Any]]:
    """Quality and speed from decoding every token one by one; `prefill_sec` is until the cache is full, the TPOT that
    of the rest, in turn with segments of the reference. Raises as `measure_quality`."""
    policy = what.effective
    n_losses = len(stream.tokens) - 1
    marks = _segment_ends(policy, n_losses, len(loaded.layers))
    at, load = time.time(), load_average()
    reference_ms: list[float] = []

    def pause(done: int) -> None:
        if done in marks:
            reference_ms.append(reference.segment())

    with what.kernel.active(), peak_memory(loaded.device) as memory:
        decoder = make_decoder(loaded, what)
        run = decode_loop(decoder, stream.tokens, loaded.device, progress, [1, *marks], pause)
    with what.kernel.active():
        attn_ms = attention_ms(loaded, what, stream.tokens)
        used = used_backend(loaded, what, stream.tokens)
    check_finite(run.losses, str(loaded.dtype))
    warning = _warning(loaded, policy, run.peak_kv, n_losses)
    quality = Quality(run.losses, np.arange(n_losses), run.peak_kv, run.runtime_sec, warning)
    ms = 1e3 * np.diff([run.elapsed[mark] for mark in marks]) / np.diff(marks)
    return quality, quality.summary() | {
        **times_summary(between_references(ms.tolist(), reference_ms, at, load, reference.execution)),
        "prefill_sec": run.elapsed[marks[0]],
        "first_token_latency_sec": run.elapsed[1],
        "avg_attn_ms": attn_ms,
        "peak_memory_mb": memory.megabytes - reference.cache_bytes / 2**20,
        "runtime_sec": run.runtime_sec,
        "backend": used,
        "backend_requested": what.backend,
    }


def evaluate_chunked(
    loaded: LoadedModel,
    what: Configuration,
    stream: TokenStream,
    reference: Reference,
    progress: Progress | None = None,
) -> tuple[Quality, dict[str, Any]]:
    """Quality and speed from chunks of the text, each with a cache of its own: a prefill of `compress_every` tokens in
    one forward pass, one compression to S + W, and `CONTINUATION_TOKENS` in one forward pass, whose losses count.
    kvpress' and MIT's own pipeline; its times are not those of a decode loop. Times are medians over chunks, which take
    turns with segments of the reference.

    Raises NonFiniteLossError; UsageError for a text shorter than a chunk."""
    policy = replace(what.policy, cache_slack=0, max_drop=0)
    started, at, load = time.perf_counter(), time.time(), load_average()
    reference_ms: list[float] = []
    with what.kernel.active(), peak_memory(loaded.device) as memory:
        run = chunk_losses(
            loaded,
            replace(what, policy=policy),
            stream.tokens,
            progress,
            pause=lambda: reference_ms.append(reference.segment()),
        )
    check_finite(run.losses, str(loaded.dtype))
    seconds = time.perf_counter() - started
    longest = policy.compress_every + run.continuation_tokens
    warning = _warning(loaded, what.effective, run.peak_kv, len(run.losses), len(run.prefill_sec), longest)
    quality = Quality(run.losses, run.positions, run.peak_kv, seconds, warning, chunk=run.continuation_tokens)
    ms = 1e3 * run.continuation_sec / run.continuation_tokens
    return quality, quality.summary() | {
        **times_summary(between_references(ms.tolist(), reference_ms, at, load, reference.execution)),
        "prefill_sec": float(np.median(run.prefill_sec)),
        "first_token_latency_sec": float(np.median(run.prefill_sec)),
        "avg_attn_ms": run.avg_attn_ms,
        "peak_memory_mb": memory.megabytes - reference.cache_bytes / 2**20,
        "runtime_sec": float(np.median(run.prefill_sec + run.continuation_sec)),
        "chunks": len(run.prefill_sec),
        "prefill_tokens": policy.compress_every,
        "continuation_tokens": run.continuation_tokens,
        "backend": run.backend_used,
        "backend_requested": what.backend,
    }


def _segment_ends(policy: EvictionPolicy, n_tokens: int, n_layers: int) -> list[int]:
    """Counts of tokens between which a loop's steady state is timed: whole prune cycles, about a dozen segments, from
    when the cache is full; in too short a text, all of it or what there is."""
    steady = steady_state(policy, n_layers)
    start, cycle = (steady.start, steady.cycle) if steady is not None else (policy.kept, 1)
    if start + cycle > n_tokens:
        return [0, n_tokens]
    length = max((n_tokens - start) // _SEGMENTS // cycle, 1) * cycle
    return list(range(start, n_tokens + 1, length))


def _warning(
    loaded: LoadedModel,
    policy: EvictionPolicy,
    peak: int,
    n_losses: int,
    chunks: int | None = None,
    longest: int | None = None,
) -> str | None:
    """What makes a result say less than it seems to. policy: as the method means it; chunks: whose losses they are, of
    a text in chunks; longest: tokens of a stream, if it is not all of the text."""
    trained, longest, of_trained, said = loaded.trained_length, longest or n_losses, [], []
    most = peak if policy.is_uniform else max(peak, longest_kv(policy, longest, len(loaded.layers)))
    if trained is not None and most > trained + 1:  # a full cache and the query's own key are meant
        of_trained.append(f"queries attend to up to {most} keys")
    if trained is not None and policy.keeps_positions and longest > max(trained, most):
        of_trained.append(f"kept positions put the sinks up to {longest - 1} tokens away")
    if (span := loaded.attention_span) is not None and most > span:
        said.append(
            f"every layer attends to its last {span} tokens only (sliding window), the cache holds up to {most}"
        )
    if of_trained:
        said.append(f"{' and '.join(of_trained)}, the model was trained on {trained}: perplexity may suffer")
    elif chunks is None and policy.compress_every > 0 and peak >= n_losses:
        said.append(f"the text's {n_losses} tokens all fit in the cache: nothing was evicted")
    if n_losses < FEW_LOSSES:
        of_chunks = f" of {chunks} chunk{'s' * (chunks > 1)}" if chunks is not None else ""
        said.append(f"it rests on {n_losses} losses{of_chunks}: too few to tell policies apart; give a longer text")
    return "; ".join(said) or None
