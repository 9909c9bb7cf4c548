"""The block-parallel evaluator beside a decode loop over the same policy, and beside a plain chunked causal forward of
the same tokens, which is its floor.

python -m tests.benchmarks.evaluator [--cache 2048] [--tokens 4096] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoding import negative_log_likelihood
from streamllm.engine.device import synchronize
from streamllm.engine.methods.ours import RerotatedCache
from streamllm.engine.model import LoadedModel
from streamllm.policy import EvictionPolicy

from .reporting import asked_for, interleaved, parser, report, steady, summary

BLOCK = 256


@BACKENDS["auto"].active()  # the kernels that the evaluator is held to
def plain_losses(loaded: LoadedModel, tokens: np.ndarray, cache: int, block: int = BLOCK, streams: int = 1) -> None:
    """Causal forwards of `block` tokens over the last `cache` tokens, at wrong positions: only the work is right.
    No policy's losses can be had from less. streams: that many times, as a batch."""
    stream = torch.from_numpy(tokens).to(loaded.device).expand(streams, -1)
    state = RerotatedCache(loaded, BACKENDS["auto"])
    held = 0
    for start in range(0, len(tokens) - 1, block):
        stop = min(start + block, len(tokens) - 1)
        state.begin(held, stop - start)
        logits = loaded.forward(stream[:, start:stop], state.position_ids(stop - start), state).logits
        negative_log_likelihood(logits.flatten(0, 1), stream[:, start + 1 : stop + 1].flatten())
        held += stop - start
        if held > cache:
            surplus = held - cache
            for layer in range(len(state.keys)):
                state.keys[layer] = state.keys[layer][:, :, surplus:]
                state.values[layer] = state.values[layer][:, :, surplus:]
            held = cache


@torch.inference_mode()
def main() -> None:
    options = parser(str(__doc__))
    options.add_argument("--cache", type=int, default=2048, help="sinks and window (2048)")
    options.add_argument("--tokens", type=int, default=4096, help="length of the text (4096)")
    arguments = options.parse_args()
    loaded = asked_for(arguments)
    tokens = np.random.default_rng(0).integers(loaded.vocabulary, size=arguments.tokens + 1)

    def per_token(work: Callable[[], object]) -> Callable[[], float]:
        from time import perf_counter

        def measure() -> float:
            synchronize(loaded.device)
            started = perf_counter()
            work()
            synchronize(loaded.device)
            return 1e3 * (perf_counter() - started) / arguments.tokens

        return measure

    policies = {r: EvictionPolicy(n_sink=4, window_size=arguments.cache - 4, compress_every=r) for r in (1, 64)}
    variants = {"plain chunked forward": per_token(lambda: plain_losses(loaded, tokens, arguments.cache))}
    for r, policy in policies.items():
        variants[f"block-parallel R={r}"] = per_token(
            lambda policy=policy: block_parallel_losses(loaded, tokens, policy)
        )
        variants[f"decode loop: ours R={r}"] = steady(loaded, Configuration("ours", policy))
    times = interleaved(variants, arguments.rounds)
    rows = []
    for name, values in times.items():
        found = summary(values)
        plain = summary([value / least for value, least in zip(values, times["plain chunked forward"], strict=True)])
        rows.append(
            {
                "variant": name,
                "ms/token": found["median"],
                "low": found["low"],
                "high": found["high"],
                "times plain": plain["median"],
                "ratio low": plain["low"],
                "ratio high": plain["high"],
            }
        )
    report(f"evaluator, cache {arguments.cache}, {arguments.tokens} tokens", loaded, rows, arguments.json)


if __name__ == "__main__":
    main()
