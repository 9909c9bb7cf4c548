"""examples:
python -m streamllm evaluate                                        the embedded model and text, vanilla StreamingLLM
python -m streamllm evaluate --method recompute                     the baseline it is compared with
python -m streamllm evaluate --n-sink 0                             what happens without sinks
python -m streamllm evaluate --model EleutherAI/pythia-70m --dataset-name pg19 --max-eval-tokens 20000 --json
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import BACKENDS
from ..errors import UsageError
from ..methods import METHODS
from ..options import DTYPES, PROTOCOLS
from ..policy import EvictionPolicy, with_derived_window
from ..text import TextSource

if TYPE_CHECKING:
    from ..evaluation import Quality
    from ..loaded import LoadedModel

HELP = "perplexity, time per token and peak KV of one policy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is evaluated")
    what.add_argument("--model", default="testbed", metavar="MODEL", help="testbed, a folder or a hub id (testbed)")
    add_text_arguments(what)
    what.add_argument("--dtype", choices=DTYPES, default="auto", help="float32 on CPU, bfloat16 on a GPU (auto)")

    policy = parser.add_argument_group("the policy")
    policy.add_argument("--method", choices=METHODS, default="ours", help="how the cache is implemented (ours)")
    policy.add_argument("--n-sink", type=int, default=4, metavar="S", help="first tokens never evicted (4)")
    policy.add_argument(
        "--window-size",
        type=int,
        metavar="W",
        help="recent tokens kept by a prune (what 2048 or the trained length leaves)",
    )
    policy.add_argument(
        "--compress-every",
        type=int,
        default=1,
        metavar="R",
        help="prune only when R divides the token count; 0 never (1)",
    )
    policy.add_argument("--cache-slack", type=int, default=0, metavar="X", help="prune only above S + W + X tokens (0)")
    policy.add_argument(
        "--max-drop", type=int, default=0, metavar="D", help="evict at most D tokens after a token; 0 no limit (0)"
    )

    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="fast",
        help="fast: all losses in a few block forwards, TPOT from a steady-state sample; decode-loop: every token is "
        "decoded one by one (fast)",
    )
    how.add_argument("--attn-backend", choices=tuple(BACKENDS), default="auto", help="attention kernel (auto)")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's default)")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one flat JSON object on stdout, nothing else")
    output.add_argument("--output-file", type=Path, metavar="FILE", help="write the same JSON object to FILE")
    output.add_argument(
        "--per-token-losses",
        type=Path,
        metavar="FILE.npy",
        help="float64 nats; element i belongs to token i + 1, NaN where the baseline's sample leaves one out",
    )


def add_text_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text file (the embedded text)")
    group.add_argument("--token-ids", type=Path, metavar="FILE.json", help="a JSON list of token ids instead of text")
    group.add_argument(
        "--dataset-name", metavar="NAME", help="wikitext, pg19, a hub id or a folder in the hub's layout"
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set")
    group.add_argument("--max-eval-tokens", type=int, metavar="N", help="only the first N tokens (all)")


def text_source(arguments: argparse.Namespace) -> TextSource:
    """Raises TextError."""
    source = TextSource(
        text=arguments.text,
        token_ids=arguments.token_ids,
        dataset_name=arguments.dataset_name,
        dataset_config=arguments.dataset_config,
        max_eval_tokens=arguments.max_eval_tokens,
    )
    source.check()
    return source


def run(arguments: argparse.Namespace) -> int:
    source = text_source(arguments)
    given = EvictionPolicy(
        n_sink=arguments.n_sink,
        window_size=1 if arguments.window_size is None else arguments.window_size,
        compress_every=arguments.compress_every,
        cache_slack=arguments.cache_slack,
        max_drop=arguments.max_drop,
    )
    for path in (arguments.output_file, arguments.per_token_losses):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"output {str(path)!r}: no such folder {str(path.parent)!r}")

    from ..attention import resolve_backend
    from ..evaluation import EVALUATORS, identity
    from ..models import load_model, load_tokenizer
    from ..quality import NonFiniteLossError
    from ..text import load_tokens
    from ..timing import limit_threads

    limit_threads(arguments.threads)
    loaded = load_model(arguments.model, arguments.dtype)
    tokenizer = None if source.token_ids is not None else load_tokenizer(arguments.model)
    stream = load_tokens(source, tokenizer, loaded.model.config.vocab_size)
    policy = given
    if arguments.window_size is None:
        policy = with_derived_window(given, min(2048, loaded.trained_length or 2048))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backend = resolve_backend(arguments.attn_backend, loaded.device, loaded.dtype, loaded.head_size)
    for warning in caught:
        _say(f"warning: {warning.message}")
    evaluate = EVALUATORS[arguments.protocol]
    try:
        quality, measured = evaluate(
            loaded, stream, arguments.method, policy, backend, _progress(len(stream.tokens) - 1)
        )
    except NonFiniteLossError as error:
        _say(f"error: {error}")
        return 1
    result = identity(loaded, stream, arguments.method, policy, arguments.protocol) | measured
    result["backend_requested"] = arguments.attn_backend
    _warn_beyond_trained(loaded, result["peak_kv"])
    _write(result, quality, len(stream.tokens) - 1, arguments)
    return 0


def _write(result: dict[str, Any], quality: "Quality", n_losses: int, arguments: argparse.Namespace) -> None:
    import numpy as np

    if arguments.per_token_losses is not None:
        losses = np.full(n_losses, np.nan)
        losses[quality.positions] = quality.losses
        np.save(arguments.per_token_losses, losses)
    text = json.dumps(result)
    if arguments.output_file is not None:
        arguments.output_file.write_text(text + "\n")
    if arguments.json:
        print(text)
        return
    for name, value in result.items():
        print(f"{name:22} {f'{value:.6g}' if isinstance(value, float) else value}")


def _warn_beyond_trained(loaded: "LoadedModel", peak: int) -> None:
    if loaded.trained_length is not None and peak > loaded.trained_length:
        _say(
            f"warning: queries attend to up to {peak} keys, the model was trained on {loaded.trained_length}; "
            f"expect its perplexity to suffer"
        )


def _progress(total: int) -> Callable[[int], None] | None:
    if not sys.stderr.isatty():
        return None
    started = time.monotonic()

    def show(done: int) -> None:
        if done % 64 == 0 or done == total:
            rate = done / (time.monotonic() - started)
            print(f"\r{done}/{total} tokens, {rate:.0f}/s ", end="\n" if done == total else "", file=sys.stderr)

    return show


def _say(message: str) -> None:
    print(message, file=sys.stderr)
