"""Command-line arguments that several commands share, the source documents' spellings included."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.backends import BACKENDS, default_backend
from ..engine.methods import METHODS, OFFERED
from ..environment import default_dataset, default_knob, default_model
from ..errors import UsageError, shown
from ..evaluating import STORE, Measuring
from ..measuring.jobs import MORE
from ..measuring.tables import JOINS
from ..measuring.text import TextSource
from ..options import DTYPES, PROTOCOLS, QUANTIZATIONS
from ..policy import FORMS, TOTAL_KV_CAP, WORDS, EvictionPolicy, for_chunks, with_derived_window
from ..results.schema import POLICY_KNOBS, POLICY_WORDS
from .parser import not_among

if TYPE_CHECKING:
    from ..engine.model import LoadedModel
    from ..measuring.text import TokenStream


def add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        "--model-name",
        default=default_model(),
        metavar="MODEL",
        help="testbed, smollm2, a folder, a .gguf file or a hub id (STREAMLLM_MODEL or testbed)",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="number format (auto: what the device does well)"
    )
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="none",
        help="quantize the weights of linear layers, by torchao (none)",
    )


def add_text_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="plain UTF-8, or .json, .jsonl or .parquet with a column `text` (the embedded text)",
    )
    group.add_argument("--token-ids", type=Path, metavar="FILE.json", help="a JSON list of token ids instead of text")
    group.add_argument(
        "--dataset-name",
        metavar="NAME",
        help="wikitext, pg19, a hub id or a folder in the hub's layout (STREAMLLM_DATASET)",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set")
    group.add_argument("--split", default="test", metavar="NAME", help="split of the data set (test)")
    group.add_argument(
        "--book",
        metavar="TITLE|N",
        help="one row of a data set or table: its title, words of it, or its number from 0 (pg19: 0, others: all)",
    )
    group.add_argument(
        "--join",
        choices=JOINS,
        default="lines",
        help="rows one per line, or those not blank as paragraphs, as the source documents join WikiText (lines)",
    )
    group.add_argument(
        "--offset", type=int, default=0, metavar="N", help="tokens of the text to skip; a BOS stays the first token (0)"
    )
    group.add_argument("--max-eval-tokens", type=int, metavar="N", help="only N tokens, a BOS included (all)")


_SPELLINGS = {"baseline": "recompute"}
"""The source documents' words for methods."""


def add_method_argument(group: argparse._ArgumentGroup, *spellings: str, default: str | None) -> None:
    """default: None: the command finds one, ours as a rule."""
    group.add_argument(
        "--method",
        *spellings,
        type=_method,
        default=default,
        metavar=f"{{{','.join(OFFERED)}}}",
        help=f"how the cache is implemented ({default or 'ours'})",
    )


def _method(name: str) -> str:
    name = _SPELLINGS.get(name, name)
    if name not in METHODS:
        raise argparse.ArgumentTypeError(not_among(name, OFFERED))
    return name


def add_policy_arguments(group: argparse._ArgumentGroup) -> None:
    for knob in POLICY_KNOBS:
        usual = knob.usual if knob.usual is not None else f"what {TOTAL_KV_CAP} or the trained length leaves"
        group.add_argument(
            f"--{knob.name.replace('_', '-')}",
            type=int,
            default=default_knob(knob.name, knob.usual),
            metavar=knob.short.upper(),
            help=f"{knob.about} ({usual})",
        )
    for word in POLICY_WORDS:
        group.add_argument(
            f"--{word.name.replace('_', '-')}",
            choices=None if word.name in FORMS else WORDS[word.name],
            metavar=word.name.split("_")[-1].upper() if word.name in FORMS else None,
            default=word.usual,
            help=f"{word.about} ({word.usual})",
        )


def add_measuring_arguments(group: argparse._ArgumentGroup, protocol: str | None = "fast") -> None:
    """protocol: the default; None: the command finds one."""
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=protocol,
        help="fast: all losses in a few block forwards, TPOT from a steady-state sample; decode-loop: every token is "
        "decoded one by one; chunked: chunks of a prefill, one compression and a short continuation (fast)",
    )
    group.add_argument(
        "--prefill-tokens",
        type=int,
        metavar="P",
        help=f"prefill of a chunk (the trained length, at most {TOTAL_KV_CAP}; the cache is half of it)",
    )
    add_backend_arguments(group)
    add_threads_argument(group)
    add_store_argument(group)


def add_backend_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--attn-backend",
        choices=tuple(BACKENDS),
        default=default_backend(),
        help="attention kernel (auto; FLASH_SDPA=1 or 0 in the environment: flash or math)",
    )
    group.add_argument(
        "--strict", action="store_true", help="an attention backend that does not run is an error, not a warning"
    )


def add_more_arguments(group: argparse._ArgumentGroup) -> None:
    """For measures that are taken where they are asked for."""
    group.add_argument(
        "--first-token", action="store_true", help="time to first token too: of a prompt as long as the total KV"
    )
    group.add_argument(
        "--energy", action="store_true", help="joules per token too, where the device has a counter (15 seconds)"
    )


def add_sample_argument(group: argparse._ArgumentGroup, auto: str) -> None:
    group.add_argument(
        "--baseline-tokens",
        default="auto",
        metavar="N",
        help=f"tokens at which re-computation is evaluated, a whole window each: a number, all, or auto: until "
        f"perplexity is known to 0.5%%, or for {auto}; from 64 to 1024 (auto)",
    )


def sample_size(text: str, protocol: str = "fast") -> int | None:
    """The sample size in `auto` (None), `all` (0) or a number of tokens. Raises UsageError."""
    if text == "auto":
        return None
    if protocol != "fast":
        raise UsageError(f"baseline_tokens {text!r}: is for --protocol fast, {protocol} takes no sample; leave it out")
    if text == "all":
        return 0
    if not re.fullmatch(r"\d{1,18}", text) or int(text) < 1:
        raise UsageError(f"baseline_tokens {shown(text)}: must be a whole number >= 1, 'all' or 'auto'")
    return int(text)


def percent(text: str) -> float:
    """A limit to the perplexity increase, as it is typed. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -100 < value < math.inf:
        raise UsageError(f"max-ppl-increase {shown(text)}: must be a number of percent above -100, for example 3")
    return value


def add_threads_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's default)")


def add_store_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--store",
        type=Path,
        default=STORE,
        metavar="DIR",
        help=f"where measurements are kept and found, shared with sweeps ({STORE})",
    )


def text_source(arguments: argparse.Namespace) -> TextSource:
    """Raises TextError."""
    given = (arguments.text, arguments.token_ids, arguments.dataset_name) != (None, None, None)
    source = TextSource(
        text=arguments.text,
        token_ids=arguments.token_ids,
        dataset_name=arguments.dataset_name if given else default_dataset(),
        dataset_config=arguments.dataset_config,
        split=arguments.split,
        offset=arguments.offset,
        max_eval_tokens=arguments.max_eval_tokens,
        book=arguments.book,
        join=arguments.join,
    )
    source.check()
    return source


def check_values(arguments: argparse.Namespace) -> None:
    """Raises UsageError for a number that 64 bits do not hold, and for a name that no file can have or that cannot be
    written down."""
    for name, given in vars(arguments).items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise UsageError(f"{name} {shown(value)}: must be a whole number of at most 64 bits")
            if isinstance(value, str | Path):
                _check_name(f"--{name.replace('_', '-')}", str(value))


def _check_name(option: str, text: str) -> None:
    """Raises UsageError."""
    if "\0" in text:
        raise UsageError(f"{option} {shown(text)}: has a NUL character; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} {shown(text)}: {_why_undecoded(text)}") from None


def _why_undecoded(text: str) -> str:
    try:
        meant = os.fsencode(text).decode()
    except UnicodeError:
        return "not UTF-8; give, or rename to, a name that is"
    return f"is {meant} in UTF-8, which this environment turns off for Python; set PYTHONUTF8=1"


def load_asked(arguments: argparse.Namespace) -> tuple[LoadedModel, TokenStream]:
    """The model and the text that were asked for. Raises UsageError."""
    loaded, (stream,) = load_asked_with(arguments, [text_source(arguments)])
    return loaded, stream


def load_asked_with(
    arguments: argparse.Namespace, sources: Sequence[TextSource]
) -> tuple[LoadedModel, list[TokenStream]]:
    """The model that was asked for, and texts. Raises UsageError."""
    from ..evaluating import load_model_and_texts
    from .output import check_folder, messages_on_stderr

    if "store" in arguments:
        check_folder("store", arguments.store)
    chosen = arguments.dtype, arguments.quantization, arguments.threads
    with messages_on_stderr():
        return load_model_and_texts(arguments.model, sources, *chosen)


def measuring(arguments: argparse.Namespace) -> Measuring:
    """Raises UsageError."""
    tokens = sample_size(arguments.baseline_tokens, arguments.protocol)
    more = [kind for kind in MORE if getattr(arguments, kind, False)]
    return Measuring(protocol=arguments.protocol, strict=arguments.strict, baseline_tokens=tokens, more=more)


def given_policy(arguments: argparse.Namespace) -> EvictionPolicy:
    """The policy as far as it is given: `complete_policy` finds a window that was left out. Raises PolicyError."""
    if arguments.prefill_tokens is not None and (arguments.protocol != "chunked" or arguments.prefill_tokens < 1):
        raise UsageError(f"prefill_tokens {arguments.prefill_tokens}: must be >= 1, and --protocol chunked")
    return given_stream_policy(arguments)


def given_stream_policy(arguments: argparse.Namespace) -> EvictionPolicy:
    """As `given_policy`, for commands that know one protocol only: the text is one stream."""
    return EvictionPolicy(
        n_sink=arguments.n_sink,
        window_size=1 if arguments.window_size is None else arguments.window_size,
        compress_every=arguments.compress_every,
        cache_slack=arguments.cache_slack,
        max_drop=arguments.max_drop,
        **{name: getattr(arguments, name) for name in WORDS},
    )


def complete_policy(arguments: argparse.Namespace, loaded: LoadedModel) -> EvictionPolicy:
    """The policy with a window of what the cap leaves, unless one is given; of a chunk, half the prefill is the cap."""
    if arguments.protocol != "chunked":
        return stream_policy(arguments, loaded)
    policy = given_policy(arguments)
    prefill = arguments.prefill_tokens or usual_total(loaded)
    policy = for_chunks(policy, prefill)
    return policy if arguments.window_size is not None else with_derived_window(policy, max(prefill // 2, 1))


def stream_policy(arguments: argparse.Namespace, loaded: LoadedModel) -> EvictionPolicy:
    """As `complete_policy`, of one stream."""
    policy = given_stream_policy(arguments)
    return policy if arguments.window_size is not None else with_derived_window(policy, usual_total(loaded))


def usual_total(loaded: LoadedModel) -> int:
    """Tokens that a cache holds where nobody says."""
    return min(TOTAL_KV_CAP, loaded.trained_length or TOTAL_KV_CAP)
