"""Speed of a decoder in the steady state of a full cache: time per output token (TPOT) beside a reference's, the share
of attention, memory."""

from __future__ import annotations

import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from ..configuration import Configuration
from ..engine.attention import AttentionState, fuses, recorded_kernel
from ..engine.decoder import make_decoder
from ..engine.decoding import Decoder
from ..engine.device import copy_bandwidth, peak_memory, synchronize
from ..engine.model import LoadedModel
from ..engine.probing import replayed
from ..policy import EvictionPolicy, steady_state, strict_policy
from .pairing import LONGEST_REFERENCE_SEC, PairedTimes, take_pairs
from .quality import Estimate, median_interval

SEGMENT_TOKENS = 8
"""Least tokens in a segment: fewer would time how the caches of a CPU are filled anew after the other decoder's
turn."""
SEGMENT_SEC = 0.1
LONGEST_SEGMENT_SEC = 0.25
"""Longest segment: where `SEGMENT_TOKENS` take longer, a segment has fewer tokens, down to one."""
WARMUP_TOKENS = 16
_MOST_STRETCHES = 20
_RECORDED_TOKENS = 256
_ATTENTION_SEC = 5.0


@dataclass(frozen=True, slots=True)
class Speed:
    times: PairedTimes
    """Segment by segment, in turn with the reference. A segment's TPOT is its mean: a median over tokens would hide a
    lazily paid prune."""
    tokens_per_segment: int
    warmup_tokens: int
    prefill_sec: float
    """Filling the cache in one forward pass of S + W tokens."""
    first_token_latency_sec: float
    """The same, until the next token is picked."""
    avg_attn_ms: float
    """Per token, of all layers together; from extra tokens, beside the timing."""
    peak_memory_mb: float
    """The reference's cache is not counted."""
    bytes_per_token: int
    bandwidth_utilization: float
    """`bytes_per_token` over the TPOT, as a share of the device's copy bandwidth: 1 is the floor of any decoding."""
    backend_used: str
    seconds: float
    """Time to measure all this."""

    @property
    def tpot_ms(self) -> Estimate:
        """Median over the segments of this timing alone."""
        return median_interval(np.array(self.times.ms))


class TimedDecoder:
    """A decoder that goes through the phases of a measurement; token ids come from a text, over and over."""

    def __init__(self, loaded: LoadedModel, what: Configuration, tokens: np.ndarray) -> None:
        policy = what.effective
        self.backend = what.kernel
        self.device = loaded.device
        self.decoder: Decoder = make_decoder(loaded, what)
        n_layers = len(loaded.layers)
        steady = steady_state(policy, n_layers)
        prefill = min(own.kept for own in policy.of_layers(n_layers)) - 1  # at once, as no layer evicts before
        self.period = steady.cycle if steady else 1
        self.growing = max(steady.start - prefill, 0) if steady else 0
        """Tokens between the prefill and the first whole cycle."""
        stream = torch.from_numpy(tokens).to(loaded.device)
        self.pace = math.nan
        """Seconds per token, once it is warm."""
        self._prompt = stream.repeat(math.ceil(prefill / len(stream)))[:prefill]
        self._stream = cycle(stream.split(1))

    def whole_cycles(self, tokens: float) -> int:
        return self.period * math.ceil(tokens / self.period)

    def prefill(self) -> tuple[float, float]:
        """Seconds until the cache is full, and until the next token is picked."""
        if not len(self._prompt):
            return 0.0, 0.0
        synchronize(self.device)
        started = time.perf_counter()
        logits = self.decoder.feed(self._prompt)
        synchronize(self.device)
        filled = time.perf_counter() - started
        logits[-1].argmax().item()
        return filled, time.perf_counter() - started

    def warm_up(self) -> tuple[int, float]:
        """Decodes until the cache is in its cycle (compiling, capturing on the way) and no stretch is 3% faster than
        all before it. Returns the tokens it took, and the pace in seconds per token."""
        self.decode(self.growing)
        tokens, paces = self.growing, [math.inf]
        for _ in range(_MOST_STRETCHES):
            stretch = self.whole_cycles(min(WARMUP_TOKENS, max(LONGEST_SEGMENT_SEC / min(paces), 1)))
            paces.append(self.decode(stretch))
            tokens += stretch
            if paces[-1] > 0.97 * min(paces[:-1]):
                break
        self.pace = min(paces)
        return tokens, self.pace

    def segment_length(self, seconds: float | None = None) -> int:
        """Tokens of a segment of about that many seconds (`SEGMENT_SEC`), in whole cycles."""
        return segment_tokens(self.pace, self.period, SEGMENT_SEC if seconds is None else seconds)

    def step(self) -> None:
        """Decodes a token, and does not wait for the device."""
        self.decoder.feed(next(self._stream))

    def decode(self, count: int) -> float:
        """Seconds per token."""
        tokens = list(islice(self._stream, count))
        synchronize(self.device)
        started = time.perf_counter()
        for token in tokens:
            self.decoder.feed(token)
        synchronize(self.device)
        return (time.perf_counter() - started) / max(count, 1)


def segment_tokens(pace: float, cycle: int, seconds: float = SEGMENT_SEC) -> int:
    """The tokens in a segment of about that many seconds, in whole cycles. pace: seconds per token."""
    most = LONGEST_SEGMENT_SEC / pace
    return cycle * math.ceil(max(min(max(SEGMENT_TOKENS, seconds / pace), most), 1) / cycle)


@dataclass(frozen=True)
class Reference:
    """The reference that everything is timed beside: strict StreamingLLM by the ring, kept warm; one per device and
    total. On a CUDA device its step is captured: an eager one waits for Python, and takes half as long again from one
    process to the next, where a captured one's ratio to another differs by a thousandth."""

    decoder: TimedDecoder
    execution: str
    cache_bytes: int

    @classmethod
    def start(cls, loaded: LoadedModel, total: int, tokens: np.ndarray) -> Reference:
        """Holds S + W = `total` tokens; eager too where the model's step cannot be captured, with a warning."""
        if loaded.device.type == "cuda":
            try:
                return cls.by(loaded, total, tokens, "cudagraph")
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as failure:
                reason = (str(failure).splitlines() or [type(failure).__name__])[0]
                warnings.warn(f"timed beside an eager reference: steps cannot be captured ({reason})", stacklevel=2)
        return cls.by(loaded, total, tokens, "eager")

    @classmethod
    @torch.inference_mode()
    def by(cls, loaded: LoadedModel, total: int, tokens: np.ndarray, execution: str) -> Reference:
        policy = strict_policy(total)
        decoder = TimedDecoder(loaded, Configuration("ring", policy, execution=execution), tokens)
        with no_garbage_collection(), decoder.backend.active():
            decoder.prefill()
            decoder.warm_up()
        return cls(decoder, execution, loaded.kv_bytes * (policy.kept + 1))

    @torch.inference_mode()
    def segment(self, seconds: float = SEGMENT_SEC) -> float:
        """Milliseconds per token, over a segment of about that many seconds."""
        with self.decoder.backend.active():
            return 1e3 * self.decoder.decode(self.decoder.segment_length(seconds))


@torch.inference_mode()
def measure_speed(loaded: LoadedModel, what: Configuration, tokens: np.ndarray, reference: Reference) -> Speed:
    """Fills the cache, warms up (compiles, captures), then times segments of whole prune cycles in turn with segments
    of the reference. Speed does not depend on the tokens. Attention's share is taken from eager steps, whatever the
    execution."""
    begun = time.perf_counter()
    with what.kernel.active():
        used = used_backend(loaded, what, tokens)  # initialises libraries too
        with peak_memory(loaded.device) as memory:
            run, filled, first_token, warm_up = start_decoder(loaded, what, tokens)
    times = time_beside(run, reference)
    with what.kernel.active():
        attn_ms = attention_ms(loaded, what, tokens)
    needed = bytes_per_token(loaded, what.effective)
    return Speed(
        times=times,
        tokens_per_segment=run.segment_length(),
        warmup_tokens=warm_up,
        prefill_sec=filled,
        first_token_latency_sec=first_token,
        avg_attn_ms=attn_ms,
        peak_memory_mb=memory.megabytes - reference.cache_bytes / 2**20,
        bytes_per_token=needed,
        bandwidth_utilization=needed / (float(np.median(times.ms)) / 1e3) / copy_bandwidth(loaded.device),
        backend_used=used,
        seconds=time.perf_counter() - begun,
    )


@torch.inference_mode()
def compile_step(loaded: LoadedModel, what: Configuration, tokens: np.ndarray) -> None:
    """Compiles what a decoder would otherwise compile while it is timed, and others may not be; it takes a minute or
    two for a model of 32 layers, seconds once the compiler's cache on disk has it."""
    if what.execution != "eager" or what.kernel.library == "triton":
        with what.kernel.active():
            run = TimedDecoder(loaded, what, tokens)
            run.prefill()
            run.decode(run.growing + 1)


@torch.inference_mode()
def measure_times(loaded: LoadedModel, what: Configuration, tokens: np.ndarray, reference: Reference) -> PairedTimes:
    """The times alone, of a decoder of their own: what a round of confirming wants."""
    with what.kernel.active():
        run, *_ = start_decoder(loaded, what, tokens)
    return time_beside(run, reference)


@torch.inference_mode()
def time_beside(run: TimedDecoder, reference: Reference) -> PairedTimes:
    """Segments of a warm decoder in turn with as long ones of the reference."""
    length = run.segment_length()

    def segment() -> float:
        with run.backend.active():
            return 1e3 * run.decode(length)

    with no_garbage_collection():
        most = min(length * run.pace, LONGEST_REFERENCE_SEC)
        return take_pairs(segment, lambda: reference.segment(most), reference.execution)


def start_decoder(
    loaded: LoadedModel, what: Configuration, tokens: np.ndarray
) -> tuple[TimedDecoder, float, float, int]:
    """A warm decoder; its seconds until filled and until the first token, the tokens it warmed up with."""
    with no_garbage_collection():
        run = TimedDecoder(loaded, what, tokens)
        filled, first_token = run.prefill()
        warm_up, _ = run.warm_up()
    return run, filled, first_token, warm_up


def bytes_per_token(loaded: LoadedModel, policy: EvictionPolicy) -> int:
    """The bytes that must be read to decode a token with a full cache: every weight (of an embedding that is not also
    the output layer, one row), and the keys and values of S + W + 1 tokens."""
    model = loaded.model
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if output is None or output.weight is not embedding:
        weights -= embedding.nbytes
    return int(weights + loaded.kept_bytes(policy) * (policy.kept + 1))


def used_backend(loaded: LoadedModel, what: Configuration, tokens: np.ndarray) -> str:
    """The attention kernels seen in a cycle of the steady state, or in its first `_RECORDED_TOKENS` tokens, run
    eagerly; or `fused`, if the compiler makes one."""
    if what.execution == "compile" and fuses(replayed(what.kernel, loaded, what.policy.kept), loaded.device):
        return "fused"
    what = _by_eager_steps(what, loaded)
    with recorded_kernel(what.kernel, loaded.has_plain_softmax) as recorder:
        run = TimedDecoder(loaded, what, tokens)
        run.prefill()
        run.decode(run.growing)
        recorder.kernels.clear()
        run.decode(min(run.period, _RECORDED_TOKENS))
    return recorder.used


@torch.inference_mode()
def attention_ms(loaded: LoadedModel, what: Configuration, tokens: np.ndarray) -> float:
    """Milliseconds per token, in the steady state, in the attention of all layers: taking the new key in, rotation on
    read, the kernel. Prunes are not in it. By eager steps, with the kernel that the execution has."""
    what = _by_eager_steps(what, loaded)
    count = 0

    def decode(timed: LoadedModel, begin: Callable[[], object]) -> None:
        nonlocal count
        run = TimedDecoder(timed, what, tokens)
        run.prefill()
        pace = run.decode(run.growing + run.period)
        count = run.whole_cycles(min(WARMUP_TOKENS, max(_ATTENTION_SEC / pace, 1)))
        begin()
        run.decode(count)

    return sum(attention_spans(loaded, decode)) / count


def _by_eager_steps(what: Configuration, loaded: LoadedModel) -> Configuration:
    """With the kernel that its execution has."""
    if what.execution == "eager":
        return what
    return replace(what, execution="eager", backend=replayed(what.kernel, loaded, what.policy.kept).name)


def attention_spans(loaded: LoadedModel, work: Callable[[LoadedModel, Callable[[], object]], object]) -> list[float]:
    """Milliseconds in attention of what `work` does with the model that it is given, from when it calls the function
    that it is given too; a span per layer and forward pass.

    Of a device whose kernels torch's profiler sees, their own time: between events there would be the gaps in which the
    device waits for Python as well, more than the whole step takes as a graph."""
    spans = _Spans(loaded.device, sees_kernels(loaded.device))
    timed = _TimedModel(**vars(loaded), spans=spans)
    if not spans.profiled:
        work(timed, spans.ends.clear)
        return spans.milliseconds()
    profiler = kernel_profiler(loaded.device)
    with ExitStack() as stack:
        work(timed, lambda: stack.enter_context(profiler))
    events = (event for event in profiler.events() if event.name == _SPAN and event.device_type == DeviceType.CPU)
    return [event.device_time_total / 1e3 for event in events]


def sees_kernels(device: torch.device) -> bool:
    """Whether torch's profiler does, of an accelerator."""
    return device.type != "cpu" and supported_activities() != {ProfilerActivity.CPU}


def kernel_profiler(device: torch.device) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or its library writes its own news to stderr
    return profile(activities=supported_activities() if device.type != "cpu" else {ProfilerActivity.CPU})


_SPAN = "streamllm: attend"


@dataclass
class _Spans:
    device: torch.device
    profiled: bool
    ends: list[tuple[Any, Any]] = field(default_factory=list)

    @contextmanager
    def span(self) -> Iterator[None]:
        if self.profiled:
            with record_function(_SPAN):
                yield
            return
        start = self._now()
        yield
        self.ends.append((start, self._now()))

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> list[float]:
        if self.device.type == "cpu":
            return [1e3 * (stop - start) for start, stop in self.ends]
        return [start.elapsed_time(stop) for start, stop in self.ends]


@dataclass(frozen=True)
class _TimedState:
    state: AttentionState
    spans: _Spans

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        with self.spans.span():
            return self.state.attend(layer, query, key, value, scaling)


@dataclass(frozen=True, kw_only=True)
class _TimedModel(LoadedModel):
    spans: _Spans

    def forward(self, input_ids: Tensor, position_ids: Tensor, state: AttentionState, logits_to_keep: int = 0) -> Any:
        return super().forward(input_ids, position_ids, _TimedState(state, self.spans), logits_to_keep)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a segment would be timed with it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
