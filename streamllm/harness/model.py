"""The harness' view of a model under a policy: its model `streamllm`.

How text becomes tokens, where a BOS stands, and what conditions the first token are as the harness' own `hf` model has
them. Nothing is cut off: a policy holds a stream of any length. With `max_length` what is longer is treated as `hf`
treats it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    _add_special_kwargs,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from ..configuration import Configuration
from ..engine.probing import runnable
from ..errors import UsageError, shown
from ..evaluating import check_names
from ..measuring.quality import NonFiniteLossError
from ..options import DTYPES
from ..results.schema import KNOBS
from ..terminal.arguments import stream_policy
from ..terminal.progress import working
from .scoring import Request, Score, scored
from .writing import Writing, check_decoder, sampler

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

    from ..engine.decoding import Progress
    from ..engine.model import LoadedModel

_MOST_WRITTEN = 256
"""Tokens, where a task does not say: the harness' own number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """How requests become tokens and text, as far as it is not the tokenizer's own way. Raises UsageError."""

    max_length: int | None = None
    """Tokens: what is longer loses its beginning, or is rolled over in parts, as by `hf`; None: any length is held."""
    add_bos_token: bool | None = None
    """None: as the tokenizer does."""
    prefix_token_id: int | None = None
    """What an empty context is; None: the BOS, else the EOS."""
    decoder: str = "method"
    """By whom text is written: one of `writing.DECODERS`."""
    seed: int = 1234
    """Of sampling."""

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("prefix_token_id", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UsageError(f"{name} {shown(value)}: must be a whole number >= {least}")


@register_model("streamllm")
class StreamingLM(TemplateLM):  # type: ignore[misc]
    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        what: Configuration,
        conventions: Conventions | None = None,
    ) -> None:
        """Raises UsageError for a tokenizer that has neither a BOS nor an EOS."""
        super().__init__()
        self.loaded, self.tokenizer = loaded, tokenizer
        self.what = runnable(what, loaded, strict=False)
        self.conventions = conventions or Conventions()
        check_decoder(self.conventions.decoder, what.method, loaded.dtype_name)
        if self.prefix_token_id is None:
            raise UsageError(f"model {loaded.name!r}: its tokenizer has no BOS and no EOS; give prefix_token_id")
        self._device = loaded.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> StreamingLM:
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> StreamingLM:
        """`pretrained`: as `--model`; `dtype`, `threads`, any knob by its name, and `Conventions`. Of the harness' own
        options, a device; batches are as large as is good. Raises UsageError."""
        import torch

        from ..engine.device import limit_threads
        from ..engine.loading import load_model, load_tokenizer

        asked = _Arguments.of(arg_dict)
        limit_threads(asked.rest["threads"])
        name, tokenizer = asked.rest["pretrained"], load_tokenizer(asked.rest["pretrained"])
        device = (additional_config or {}).get("device") or ""
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = ""  # it is what the harness says where nobody does
        where = torch.device(device) if device else None
        loaded = load_model(name, asked.rest["dtype"], where, asked.knobs.quantization)
        return cls(loaded, tokenizer, asked.configuration(loaded), asked.conventions)

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        given = self.conventions.prefix_token_id
        if given is not None:
            return given
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(self.tokenizer, chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Raises UsageError for tokens that the model does not know."""
        options: dict[str, Any] = _add_special_kwargs(add_special_tokens, self.conventions.add_bos_token)
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options["add_special_tokens"] = False
        ids: list[int] = self.tokenizer.encode(string, **options)
        if ids and max(ids) >= self.loaded.vocabulary:
            raise UsageError(
                f"model {self.loaded.name!r}: its tokenizer gives token id {max(ids)}, the model knows 0 .. "
                f"{self.loaded.vocabulary - 1}; they do not belong together"
            )
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._cut(context, answer) for _, context, answer in requests]
        with working("log-likelihoods") as progress:
            scores = self._scored(asked, progress)
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _cut(self, context: list[int], answer: list[int]) -> Request:
        """Raises UsageError for an answer that is longer than `max_length`, or that has no tokens."""
        most = self.conventions.max_length
        if not answer or (most is not None and len(answer) > most):
            raise UsageError(f"an answer of {len(answer)} tokens: must have one, and at most max_length {most}")
        if most is not None:
            context = (context + answer)[-(most + 1) :][: -len(answer)]
        return Request(tuple(context), tuple(answer))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows = [self._windows(text) for (text,) in (request.args for request in requests)]
        with working("log-likelihoods") as progress:
            scores = iter(self._scored([window for one in windows for window in one], progress))
        answers = [float(sum(next(scores).log_likelihood for _ in one)) for one in windows]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def _windows(self, text: str) -> list[Request]:
        """The whole text after the prefix token, or in parts of `max_length`."""
        tokens, prefix, most = self.tok_encode(text), self.prefix_token_id, self.conventions.max_length
        assert prefix is not None
        if most is None:
            return [Request((prefix,), tuple(tokens))] if tokens else []
        windows = utils.get_rolling_token_windows(
            token_list=tokens, prefix_token=prefix, max_seq_len=most, context_len=1
        )
        return [Request(*map(tuple, utils.make_disjoint_window(window))) for window in windows]

    def _scored(self, requests: Sequence[Request], progress: Progress) -> list[Score]:
        """Raises NonFiniteLossError."""
        scores = scored(self.loaded, self.what, requests, progress)
        if any(math.isnan(score.log_likelihood) for score in scores):
            dtype = str(self.loaded.dtype).removeprefix("torch.")
            raise NonFiniteLossError(f"a log-likelihood is no number in {dtype}; use --dtype bfloat16 or float32")
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        writing = Writing(self.loaded, self.tokenizer, self.what, self.conventions.decoder)
        samplers: dict[str, Any] = {}
        texts = []
        with working("writing") as progress:
            for number, request in enumerate(requests):
                context, asked = request.args
                texts.append(self._write(writing, context, asked, samplers))
                progress(number + 1, len(requests))
        return texts

    def _write(self, writing: Writing, context: str, asked: Mapping[str, Any], samplers: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(dict(asked), _MOST_WRITTEN)
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        stops, most = handle_stop_sequences(options.pop("until", None), eos=end), options.pop("max_gen_toks")
        picking = samplers.setdefault(
            repr(options), sampler(options, self.loaded.device, self.conventions.seed)
        )  # goes on from request to request
        prompt = self.tok_encode(context)
        if self.conventions.max_length is not None:
            if (room := self.conventions.max_length - most) < 1:
                raise UsageError(f"max_length {self.conventions.max_length}: the task has {most} tokens written")
            prompt = prompt[-room:]
        if not prompt:
            raise UsageError("a prompt without a token: there is nothing to go on from")
        text = writing.write(prompt, stops, most, picking.pick)
        text = postprocess_generated_text(generation=text, stop=stops, think_end_token=None)
        self.cache_hook.add_partial("generate_until", (context, asked), text)
        return text


def chat_text(
    tokenizer: PreTrainedTokenizerBase, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """A conversation in the words of the tokenizer's chat template, as `hf` has it: one that knows no system prompt is
    given none."""
    import jinja2

    options = {
        "tokenize": False,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": not add_generation_prompt,
    }
    try:
        return str(tokenizer.apply_chat_template(chat_history, **options))
    except jinja2.exceptions.TemplateError:
        others = [message for message in chat_history if message["role"] != "system"]
        return str(tokenizer.apply_chat_template(others, **options))


@dataclass(frozen=True, slots=True)
class _Arguments:
    """What the harness' `--model_args` say."""

    knobs: argparse.Namespace
    """By the names that command lines have for them."""
    conventions: Conventions
    rest: dict[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> _Arguments:
        """Raises UsageError for a name or a value that means nothing."""
        knobs = {knob.parameter: knob.usual for knob in KNOBS}
        conventions = {field.name for field in fields(Conventions)}
        rest: dict[str, Any] = {"pretrained": "testbed", "dtype": "auto", "threads": None}
        known = {*knobs, *conventions, *rest} - {"total_kv"}
        for name in given:
            if name not in known:
                raise UsageError(f"model_args {name}: not known; {', '.join(sorted(known))} are")
        asked = {name: value for name, value in given.items() if name in conventions}
        rest |= {name: value for name, value in given.items() if name in rest}
        if rest["dtype"] not in DTYPES:
            raise UsageError(f"dtype {shown(rest['dtype'])}: must be one of {', '.join(DTYPES)}")
        knobs |= {name: value for name, value in given.items() if name in knobs}
        return cls(argparse.Namespace(**knobs), Conventions(**asked), rest)

    def configuration(self, loaded: LoadedModel) -> Configuration:
        """Raises UsageError."""
        knobs = self.knobs
        policy = stream_policy(knobs, loaded)
        what = Configuration(knobs.method, policy, knobs.attn_backend, knobs.execution, knobs.quantization)
        check_names(what, self.rest["dtype"])
        return what
