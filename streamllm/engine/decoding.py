"""Token-by-token decoding: the interface of every method, and the loop that runs it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..policy import EvictionPolicy, Schedule, mean_keys
from .attention import causal_mask
from .backends import Backend
from .device import float64_device
from .execution import static_step
from .experts import experts_for
from .model import LoadedModel, changes_at
from .rotary import Angles, Rotary

Progress = Callable[[int, int], None]
"""Called with the steps done so far, and all there are."""


class Decoder(ABC):
    """One method of decoding a stream, at batch 1."""

    @property
    @abstractmethod
    def kv_length(self) -> int:
        """Tokens the next query will find in the cache; the layers' mean, by their bytes."""

    @abstractmethod
    def feed(self, tokens: Tensor, logits_to_keep: int = 1) -> Tensor:
        """Processes the next tokens of the stream (n); returns the logits (kept, vocabulary) that follow the last
        `logits_to_keep` of them, 0 meaning all, as in transformers.

        Several tokens at once are right as long as the policy evicts nothing before the last of them."""


class KVCache(ABC):
    """The keys and values of one stream, a method's way: an `AttentionState` that a schedule evicts from.

    Tensors are (1, KV heads, held tokens, head size), per layer; cache order is sinks first, then oldest to newest.
    """

    def __init__(self, loaded: LoadedModel, backend: Backend, kv_dtype: str = "auto") -> None:
        self.layers = loaded.layers
        self._rotaries = list(dict.fromkeys(layer.rotary for layer in self.layers))
        self._rotary_of = [self._rotaries.index(layer.rotary) for layer in self.layers]
        self.windows = sorted({layer.window for layer in self.layers if layer.window is not None})
        """Of the layers that have one."""
        self.backend = backend
        self.device = loaded.device
        self.length = 0
        """Tokens in the cache when the current forward pass began."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.dtype = loaded.dtype
        """Of everything that is computed."""
        self.stored = stored_dtype(kv_dtype, loaded.dtype)
        """Of what is kept."""

    def angles(self, of: Callable[[Rotary], Angles]) -> list[Angles]:
        """Of each layer; computed once for those that turn alike."""
        found = [of(rotary) for rotary in self._rotaries]
        return [found[place] for place in self._rotary_of]

    def in_windows(self, places_of: Callable[[], Tensor], new: int, reach: int) -> dict[int | None, Tensor]:
        """For each window of a layer that leaves something out, what the last `new` of the tokens at some places (n)
        see of all: (new, n). reach: how far the first is before the last, itself included."""
        windows = [window for window in self.windows if window < reach]
        if not windows:
            return {}
        places = places_of()
        causal = causal_mask(new, len(places), places.device)
        distances = places[-new:, None] - places
        return {window: causal & (distances < window) for window in windows}

    def parts(self, policy: EvictionPolicy) -> list[tuple[KVCache, EvictionPolicy]]:
        """Caches that are evicted from apart, and the schedule of each: itself, if it holds as much of every layer."""
        return [(self, policy.of_layers(len(self.layers))[0])]

    def begin(self, held: int, count: int) -> None:
        """Prepares for a forward pass of `count` tokens, `held` being in the cache."""
        self.length = held

    def position_ids(self, count: int) -> Tensor:
        """Where the model is to rotate the next `count` tokens: at their cache positions, unless a method has other
        ideas."""
        return torch.arange(self.length, self.length + count, device=self.device)

    @property
    def is_static(self) -> bool:
        """Whether a step of one token now has the shapes of the one before, as compiled steps must have."""
        return False

    @property
    def shape(self) -> Hashable:
        """The value that those shapes follow from: caches with the same one share what is compiled."""
        return None

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `AttentionState.attend`; takes the new tokens in."""

    def evict(self, n_sink: int, drop: int) -> None:
        """Forgets the `drop` oldest tokens behind the first `n_sink`."""
        for layer in range(len(self.keys)):
            self.keys[layer] = without(self.keys[layer], n_sink, drop)
            self.values[layer] = without(self.values[layer], n_sink, drop)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the new ones included, as they are kept, to be computed with."""
        key, value = self.kept(key), self.kept(value)
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], key), dim=2)
            self.values[layer] = torch.cat((self.values[layer], value), dim=2)
        return self.keys[layer].to(self.dtype), self.values[layer].to(self.dtype)

    def kept(self, computed: Tensor) -> Tensor:
        """Rounded to what it is kept in; what is too large for a float8 is the largest there is."""
        if self.stored.itemsize == 1:
            most = torch.finfo(self.stored).max
            computed = computed.clamp(-most, most)
        return computed.to(self.stored)


def stored_dtype(kv_dtype: str, computed: torch.dtype) -> torch.dtype:
    """torch's for a policy's `kv_dtype`, of a model that computes in that one."""
    if kv_dtype == "auto":
        return computed
    stored: torch.dtype = getattr(torch, kv_dtype.replace("e4m3", "e4m3fn"))  # finite, and NaN
    return stored


def without(held: Tensor, n_sink: int, drop: int) -> Tensor:
    """A copy of `held` (1, KV heads, tokens, size) less the `drop` tokens behind the sinks."""
    if n_sink == 0:
        return held[:, :, drop:].contiguous()
    return torch.cat((held[:, :, :n_sink], held[:, :, n_sink + drop :]), dim=2)


class CachedDecoder(Decoder):
    """Decodes with a KV cache that follows the policy's schedule."""

    def __init__(self, loaded: LoadedModel, policy: EvictionPolicy, cache: KVCache, execution: str = "eager") -> None:
        loaded.check_length(policy)
        endless = policy.keeps_positions or policy.compress_every == 0
        self._may_change = endless and changes_at(loaded.config) is not None
        self._policy = policy
        self.loaded = loaded
        self.cache = cache
        self._parts = [(part, Schedule(own)) for part, own in cache.parts(policy)]
        self.schedule = self._parts[0][1]
        """Of the first layer."""
        self._sizes = [sum(layer.kv_size for layer in part.layers) for part, _ in self._parts]
        self._static_step = static_step(execution, _step, loaded, cache)

    @property
    def kv_length(self) -> int:
        return mean_keys([schedule.held for _, schedule in self._parts], self._sizes)

    def feed(self, tokens: Tensor, logits_to_keep: int = 1) -> Tensor:
        if self._may_change:
            self.loaded.check_length(self._policy, self.schedule.seen + len(tokens))
        for part, schedule in self._parts:
            part.begin(schedule.held, len(tokens))
        with experts_for(self.loaded, len(tokens)):
            if self._static_step is not None and self.cache.is_static and len(tokens) == 1:
                logits = self._static_step(tokens)
            else:
                logits = _step(self.loaded, self.cache, tokens, logits_to_keep)
        for part, schedule in self._parts:
            drops = [schedule.after_token() for _ in range(len(tokens))]
            assert not any(drops[:-1]), "several tokens at once go past an eviction"
            if drops[-1]:
                part.evict(schedule.policy.n_sink, drops[-1])
        return logits


def _step(loaded: LoadedModel, cache: KVCache, tokens: Tensor, logits_to_keep: int = 1) -> Tensor:
    """Runs on the device: tokens (n) -> logits (kept, vocabulary)."""
    output = loaded.forward(tokens[None], cache.position_ids(len(tokens)), cache, logits_to_keep)
    return output.logits[0]


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The measurements of a decode loop over a whole text."""

    losses: np.ndarray
    """float64 nats; element i is the negative log-likelihood of token i + 1."""
    peak_kv: int
    elapsed: dict[int, float]
    """Seconds from the start until so many tokens were processed, for every mark; 0 for 0."""
    runtime_sec: float


@torch.inference_mode()
def decode_loop(
    decoder: Decoder,
    tokens: np.ndarray,
    device: torch.device,
    progress: Progress | None = None,
    marks: Sequence[int] = (),
    pause: Callable[[int], None] = lambda _: None,
) -> DecodeRun:
    """Feeds every token but the last, one by one. tokens (n) -> n - 1 losses, and the clock at `marks`. There, and
    before the first token (0), the clock stands still while `pause` does something else."""
    stream = torch.from_numpy(tokens).to(device)
    losses = torch.empty(len(tokens) - 1, dtype=torch.float64, device=float64_device(device))
    peak, elapsed = 0, {0: 0.0}
    pause(0)
    started = time.perf_counter()
    for i in range(len(losses)):
        peak = max(peak, decoder.kv_length + 1)
        logits = decoder.feed(stream[i : i + 1])
        losses[i] = negative_log_likelihood(logits, stream[i + 1 : i + 2])[0]
        if i + 1 in marks:
            losses[i].item()  # waits for the device
            stopped = time.perf_counter()
            elapsed[i + 1] = stopped - started
            pause(i + 1)
            started += time.perf_counter() - stopped
        if progress is not None:
            progress(i + 1, len(losses))
    values = losses.cpu().numpy()
    return DecodeRun(values, peak, elapsed, time.perf_counter() - started)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (n, vocabulary), targets (n) -> nats (n), in float64, and where there is that (`float64_device`)."""
    logits = logits.to(float64_device(logits.device)).double()
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None].to(logits.device))[:, 0]
