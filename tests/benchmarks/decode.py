"""Time per token of every cache with a full window, beside the floor: the bytes that must be read at copy bandwidth.

python -m tests.benchmarks.decode [--cache 2048] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from streamllm.backends import BACKENDS
from streamllm.device import copy_bandwidth
from streamllm.loaded import LoadedModel
from streamllm.methods import effective_policy
from streamllm.policy import EvictionPolicy
from streamllm.timing import TimedDecoder, bytes_per_token, no_garbage_collection

from .reporting import interleaved, parser, random_model, report, summary


class Variant(NamedTuple):
    method: str
    compress_every: int = 1
    execution: str = "eager"
    quantization: str = "none"

    @property
    def name(self) -> str:
        if self.method == "recompute":
            return self.method
        int8 = " int8" if self.quantization != "none" else ""
        return f"{self.method} R={self.compress_every} {self.execution}{int8}"


VARIANTS = (
    Variant("recompute"),
    Variant("mit"),
    Variant("ours"),
    Variant("ours", 64),
    Variant("ring"),
    Variant("ring", 64),
    Variant("ring", execution="compile"),
    Variant("ring", quantization="int8_weight_only"),
    Variant("ring", execution="compile", quantization="int8_weight_only"),
)
GPU_VARIANTS = (Variant("ring", execution="cudagraph"),)
REFERENCE = Variant("ours").name


def timed(variant: Variant, loaded: LoadedModel, cache: int) -> Callable[[], float]:
    """Fills the cache, warms up, compiles; the function returned times whole prune cycles, in ms per token."""
    policy = effective_policy(
        variant.method, EvictionPolicy(n_sink=4, window_size=cache - 4, compress_every=variant.compress_every)
    )
    tokens = np.arange(4096)
    decoder = TimedDecoder(loaded, variant.method, policy, BACKENDS["auto"], tokens, variant.execution)
    decoder.prefill()
    decoder.decode(decoder.growing + decoder.whole_cycles(4))
    count = decoder.whole_cycles(1 if variant.method == "recompute" else 24)
    return lambda: 1e3 * decoder.decode(count)


@torch.inference_mode()
def main() -> None:
    options = parser(str(__doc__))
    options.add_argument("--cache", type=int, default=2048, help="sinks and window (2048)")
    arguments = options.parse_args()
    loaded = random_model(arguments)
    chosen = VARIANTS + (GPU_VARIANTS if loaded.device.type == "cuda" else ())
    with no_garbage_collection():
        models = {"none": loaded, "int8_weight_only": random_model(arguments, "int8_weight_only")}
        variants = {variant.name: timed(variant, models[variant.quantization], arguments.cache) for variant in chosen}
        times = interleaved(variants, arguments.rounds)
    needed = bytes_per_token(loaded, EvictionPolicy(n_sink=4, window_size=arguments.cache - 4))
    floor = 1e3 * needed / copy_bandwidth(loaded.device)
    rows = [{"variant": f"floor: {needed / 1e6:.0f} MB", "ms/token": floor, "floor / time": 1.0}]
    for name, values in times.items():
        found = summary(values)
        # The ratio of each round, not of two medians: what slows a round down slows both.
        ratio = summary([reference / value for reference, value in zip(times[REFERENCE], values, strict=True)])
        rows.append(
            {
                "variant": name,
                "ms/token": found["median"],
                "low": found["low"],
                "high": found["high"],
                f"faster than {REFERENCE}": ratio["median"],
                "ratio low": ratio["low"],
                "ratio high": ratio["high"],
                "floor / time": floor / found["median"],
            }
        )
    report(f"decode, cache {arguments.cache}", loaded, rows, arguments.json)


if __name__ == "__main__":
    main()
