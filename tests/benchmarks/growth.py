"""What a token costs as one thing grows at a time: window, sinks, pruning interval; and along a very long stream, where
time and memory must stay flat.

python -m tests.benchmarks.growth [--stream 200000] [--json FILE]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from streamllm.configuration import Configuration
from streamllm.engine.device import peak_memory
from streamllm.engine.model import LoadedModel
from streamllm.measuring.timing import no_garbage_collection
from streamllm.policy import EvictionPolicy

from .reporting import asked_for, interleaved, parser, report, steady, summary, warm

METHODS = ("mit", "ours", "ring")
POLICIES = {
    **{f"window {w}": EvictionPolicy(n_sink=4, window_size=w) for w in (252, 508, 1020, 2044)},
    **{f"sinks {s}": EvictionPolicy(n_sink=s, window_size=1024 - s) for s in (0, 4, 32, 128)},
    **{f"R {r}": EvictionPolicy(n_sink=4, window_size=1020, compress_every=r) for r in (1, 16, 64)},
}


def policy_rows(loaded: LoadedModel, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for setting, policy in POLICIES.items():
        times = interleaved({method: steady(loaded, Configuration(method, policy)) for method in METHODS}, rounds)
        row: dict[str, Any] = {"setting": setting}
        for method, values in times.items():
            found = summary(values)
            row |= {
                f"{method} ms/token": found["median"],
                f"{method} low": found["low"],
                f"{method} high": found["high"],
            }
        rows.append(row)
    return rows


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
        rows = policy_rows(loaded, arguments.rounds)
        stream = stream_rows(tiny, arguments.stream)
    report("growth with the policy", loaded, rows, arguments.json)
    file = arguments.json
    report("growth with the stream", tiny, stream, file and file.with_stem(f"{file.stem}-stream"))


if __name__ == "__main__":
    main()
