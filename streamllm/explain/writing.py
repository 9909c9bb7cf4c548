"""Writing without end: a decoder that is fed its own tokens, and how the next one is picked."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.decoding import Decoder
from ..engine.model import LoadedModel
from ..errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 50
"""Tokens over which the pace is taken."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Raises UsageError for values out of range."""

    temperature: float = 1.0
    """0 picks the likeliest."""
    top_k: int = 0
    """Only the k likeliest; 0: all."""
    top_p: float = 1.0
    """Only the likeliest that together have this probability."""

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf):
            raise UsageError(f"temperature {self.temperature}: must be >= 0 (0 picks the likeliest token)")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k}: must be >= 0 (0 leaves all tokens)")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}: must be above 0 and at most 1 (1 leaves all tokens)")


class Sampler:
    def __init__(self, sampling: Sampling, device: torch.device, seed: int = 0) -> None:
        from transformers.generation import logits_process as processors

        self.generator = torch.Generator(device).manual_seed(seed)
        self.greedy = sampling.temperature == 0
        self.warpers: list[Any] = []
        if not self.greedy:
            self.warpers.append(processors.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.warpers.append(processors.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(processors.TopPLogitsWarper(sampling.top_p))

    def pick(self, logits: Tensor) -> Tensor:
        """logits (1, vocabulary) -> token (1)."""
        if self.greedy:
            return logits.argmax(-1)
        logits = logits.float()
        for warper in self.warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[0]


class Writer:
    """One text being written. The tokenizer must be a fast one: its library decodes piece by piece."""

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoder: Decoder,
        sampler: Sampler,
        kv_bytes: int,
    ) -> None:
        """kv_bytes: of one token, in the decoder's cache."""
        if not tokenizer.is_fast:
            raise UsageError(f"model {loaded.name!r}: its tokenizer is not one of the `tokenizers` library")
        self.loaded, self.tokenizer, self.decoder, self.sampler = loaded, tokenizer, decoder, sampler
        self.kv_bytes = kv_bytes
        self.seen = 0
        """Tokens, the prompt's included."""
        self.clock: deque[float] = deque(maxlen=_REMEMBERED + 1)
        self._new_pieces()

    def _new_pieces(self) -> None:
        from tokenizers.decoders import DecodeStream

        self.pieces = DecodeStream(skip_special_tokens=True)

    @torch.inference_mode()
    def read(self, prompt: str) -> str:
        """Feeds the prompt, as a policy would have it, and returns it. Raises UsageError if it has no tokens."""
        ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise UsageError(f"prompt {prompt!r}: no tokens; give some text")
        if max(ids) >= self.loaded.vocabulary:
            raise UsageError(
                f"model {self.loaded.name!r}: its tokenizer gives token id {max(ids)}, the model knows 0 .. "
                f"{self.loaded.vocabulary - 1}; they do not belong together"
            )
        for token in torch.tensor(ids, device=self.loaded.device).split(1):
            self._feed(token)
        return prompt

    @torch.inference_mode()
    def write(self) -> str:
        """Picks a token and feeds it; returns the text it completes, which may be none."""
        started = time.perf_counter()
        token = self.sampler.pick(self.logits)
        self._feed(token)
        text = self._piece(int(token))
        self.clock.append(time.perf_counter() - started)
        return text

    def _feed(self, token: Tensor) -> None:
        self.logits = self.decoder.feed(token)
        self.seen += 1

    def _piece(self, token: int) -> str:
        try:
            return self.pieces.step(self.tokenizer.backend_tokenizer, token) or ""
        except Exception:  # bytes that are no text, of which a model may write any: the library knows no better
            self._new_pieces()
            return "\N{REPLACEMENT CHARACTER}"

    @property
    def tokens_per_second(self) -> float:
        return len(self.clock) / sum(self.clock) if self.clock else math.nan

    @property
    def kv_megabytes(self) -> float:
        return self.decoder.kv_length * self.kv_bytes / 1e6

    @property
    def overgrown(self) -> bool:
        """Whether it attends to more than the model was trained on."""
        trained = self.loaded.trained_length
        return trained is not None and self.decoder.kv_length > trained

    @property
    def status(self) -> tuple[str, str]:
        """The cache's size, and the tokens seen so far with their speed."""
        trained = self.loaded.trained_length
        times = f" ({self.seen / trained:.1f} × trained)" if trained else ""
        return (
            f"KV cache {self.decoder.kv_length:,} tokens, {self.kv_megabytes:.1f} MB",
            f"{self.seen:,} tokens seen{times}, {self.tokens_per_second:.0f} tokens/s",
        )
