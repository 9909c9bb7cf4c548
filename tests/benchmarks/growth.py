"""What a token costs as one thing grows at a time: window, sinks, pruning interval, layers; along a very long stream,
where time and memory must stay flat; and what a token of a text costs the evaluator as the text grows.

python -m tests.benchmarks.growth [--stream 200000] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.device import peak_memory
from streamllm.engine.model import LoadedModel
from streamllm.measuring.timing import no_garbage_collection
from streamllm.policy import EvictionPolicy

from .reporting import asked_for, interleaved, parser, random_model, report, steady, summary, warm

METHODS = ("mit", "ours", "ring")
POLICIES = {
    **{f"window {w}": EvictionPolicy(n_sink=4, window_size=w) for w in (252, 508, 1020, 2044)},
    **{f"sinks {s}": EvictionPolicy(n_sink=s, window_size=1024 - s) for s in (0, 4, 32, 128)},
    **{f"R {r}": EvictionPolicy(n_sink=4, window_size=1020, compress_every=r) for r in (1, 16, 64)},
}
LAYERS = (3, 6, 12, 24)
TEXTS = (4096, 8192, 16384, 32768)


def policy_rows(loaded: LoadedModel, rounds: int) -> list[dict[str, Any]]:
    return [{"setting": name} | _times(loaded, policy, rounds) for name, policy in POLICIES.items()]


def layer_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    policy = EvictionPolicy(n_sink=4, window_size=1020)
    return [
        {"setting": f"layers {n}"}
        | _times(random_model(arguments.shape, arguments.dtype, num_hidden_layers=n), policy, arguments.rounds)
        for n in LAYERS
    ]


def _times(loaded: LoadedModel, policy: EvictionPolicy, rounds: int) -> dict[str, float]:
    times = interleaved({method: steady(loaded, Configuration(method, policy)) for method in METHODS}, rounds)
    row: dict[str, float] = {}
    for method, values in times.items():
        found = summary(values)
        row |= {f"{method} ms/token": found["median"], f"{method} low": found["low"], f"{method} high": found["high"]}
    return row


def text_rows(loaded: LoadedModel, rounds: int) -> list[dict[str, Any]]:
    """A window of 1,020 and 4 sinks over texts of random tokens, in turn: microseconds a token."""
    policy = EvictionPolicy(n_sink=4, window_size=1020, compress_every=64)
    random = np.random.default_rng(0)

    def timed(tokens: np.ndarray) -> float:
        started = time.perf_counter()
        block_parallel_losses(loaded, tokens, policy)
        return 1e6 * (time.perf_counter() - started) / len(tokens)

    texts = {f"text of {n} tokens": random.integers(loaded.vocabulary, size=n) for n in TEXTS}
    times = interleaved({name: partial(timed, tokens) for name, tokens in texts.items()}, rounds)
    return [{"setting": name, **{f"us/token {k}": v for k, v in summary(t).items()}} for name, t in times.items()]


def stream_rows(loaded: LoadedModel, length: int, parts: int = 8) -> list[dict[str, Any]]:
    """A ring of 252 + 4 over `length` tokens: time per token and peak memory of each part of the stream."""
    decoder = warm(loaded, Configuration("ring", EvictionPolicy()))
    rows = []
    for part in range(parts):
        with peak_memory(loaded.device) as memory:
            seconds = decoder.decode(length // parts)
        row = {"setting": f"to token {(part + 1) * (length // parts)}", "ring ms/token": 1e3 * seconds}
        rows.append(row | {"peak memory MB": memory.megabytes})
    return rows


@torch.inference_mode()
def main() -> None:
    options = parser(str(__doc__))
    options.add_argument(
        "--stream", type=int, default=200_000, help="tokens of the long stream, on a tiny model (200000)"
    )
    arguments = options.parse_args()
    loaded = asked_for(arguments)
    tiny = asked_for(argparse.Namespace(**vars(arguments) | {"shape": "tiny"}))
    with no_garbage_collection():
        rows = policy_rows(loaded, arguments.rounds) + layer_rows(arguments)
        texts = text_rows(tiny, min(arguments.rounds, 5))
        stream = stream_rows(tiny, arguments.stream)
    file = arguments.json
    report("growth with the policy and layers", loaded, rows, file)
    report("growth with the text", tiny, texts, file and file.with_stem(f"{file.stem}-text"))
    report("growth with the stream", tiny, stream, file and file.with_stem(f"{file.stem}-stream"))


if __name__ == "__main__":
    main()
