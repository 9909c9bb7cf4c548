"""What a method writes after a prompt, until it writes a stop sequence: by its own decoder, or by the evaluator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..configuration import Configuration
from ..engine.decoder import make_decoder
from ..engine.decoding import Decoder
from ..engine.methods import is_evaluated, sampled_losses
from ..engine.model import LoadedModel
from ..engine.rounded_blocks import block_state
from ..errors import UsageError, shown
from ..explain.writing import Sampler, Sampling
from .scoring import feed, forward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DECODERS = ("method", "evaluator")
"""By whom it is written: the method's own decoder, which reads a prompt as it would a stream, token by token once the
cache is full; or the evaluator, which computes the same function and reads a prompt in blocks."""
_LOOKED_BACK = 2
"""Tokens more than a stop sequence has, that it is looked for in: it may be written in other tokens than its own."""
_KNOWN = {"do_sample", *(field.name for field in fields(Sampling))}


class EvaluatingDecoder(Decoder):
    """The evaluator as a decoder: keys are rotated for every token, but several tokens may go past evictions."""

    def __init__(self, loaded: LoadedModel, what: Configuration, most: int) -> None:
        """most: tokens that it will be fed at most."""
        self.loaded = loaded
        self.state = block_state(loaded, what.effective, most, what.keys)
        self.seen = 0

    @property
    def kv_length(self) -> int:
        return len(self.state.held)

    def feed(self, tokens: Tensor, logits_to_keep: int = 1) -> Tensor:
        wanted = self.seen + len(tokens) - (logits_to_keep or len(tokens))
        parts = [logits[0] for _, logits in forward(self.loaded, self.state, tokens[None], self.seen, wanted)]
        self.seen += len(tokens)
        return torch.cat(parts)


def check_decoder(name: str, method: str, dtype: str = "auto") -> None:
    """Raises UsageError for a way that there is not, or that is not the method's. dtype: as `is_evaluated`'s."""
    if name not in DECODERS:
        raise UsageError(f"decoder {shown(name)}: must be {' or '.join(DECODERS)}")
    if name == "evaluator" and not is_evaluated(method, dtype):
        raise UsageError(f"decoder 'evaluator': method {method!r} is not what it computes; use decoder method")


@dataclass(frozen=True)
class Writing:
    """Writes by one configuration."""

    loaded: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    what: Configuration
    decoder: str = "method"
    """One of `DECODERS`."""

    @torch.inference_mode()
    def write(self, prompt: Sequence[int], stops: Sequence[str], most: int, pick: Callable[[Tensor], Tensor]) -> str:
        """At most so many tokens, up to and with the first of the stop sequences. pick: logits (1, vocabulary) -> token
        (1)."""
        total = len(prompt) + most
        found = _Stops(self.tokenizer, stops)
        written: list[int] = []
        with self.what.kernel.active():
            decoder, logits = self._read(torch.tensor(prompt, device=self.loaded.device), total)
            while len(written) < most:
                token = pick(logits)
                written.append(int(token))
                if found.end(written) or len(written) == most:
                    break
                logits = decoder.feed(token)
        return str(self.tokenizer.decode(written, skip_special_tokens=True))

    def _read(self, prompt: Tensor, total: int) -> tuple[Decoder, Tensor]:
        """The decoder after the prompt, and the logits that follow it."""
        policies = self.what.effective.of_layers(len(self.loaded.layers))
        if self.decoder == "evaluator":
            evaluating = EvaluatingDecoder(self.loaded, self.what, total)
            return evaluating, evaluating.feed(prompt)
        decoder = make_decoder(self.loaded, self.what)
        if sampled_losses(self.what.method) is not None:  # takes a prompt at once, whatever it forgets of it
            return decoder, decoder.feed(prompt)
        return decoder, list(feed(decoder, policies, prompt, len(prompt) - 1))[-1]


class _Stops:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.sequences = [sequence for sequence in sequences if sequence]
        lengths = [len(tokenizer.encode(sequence, add_special_tokens=False)) for sequence in self.sequences]
        self.span = max(lengths, default=0) + _LOOKED_BACK

    def end(self, written: Sequence[int]) -> bool:
        """Whether one of them has just been written."""
        if not self.sequences:
            return False
        tail = self.tokenizer.decode(written[-self.span :])
        return any(sequence in tail for sequence in self.sequences)


def sampler(asked: dict[str, Any], device: torch.device, seed: int) -> Sampler:
    """asked: as a task's `generation_kwargs` say, less where it ends. Raises UsageError for what is not known here."""
    for name, value in asked.items():
        if name not in _KNOWN:
            raise UsageError(f"generation_kwargs {name} {shown(value)}: not known; {', '.join(sorted(_KNOWN))} are")
    if not asked.get("do_sample"):
        return Sampler(Sampling(temperature=0), device, seed)
    return Sampler(Sampling(**{name: value for name, value in asked.items() if name != "do_sample"}), device, seed)
