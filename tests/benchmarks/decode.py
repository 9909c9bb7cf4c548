"""Time per token of every cache with a full window, beside the floor: the bytes that must be read at copy bandwidth.

python -m tests.benchmarks.decode [--cache 2048] [--dtype bfloat16] [--json FILE]

Where llama-cpp-python and gguf, or kvpress, are installed, they take part in the same interleaved run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from streamllm.configuration import Configuration
from streamllm.engine.device import copy_bandwidth
from streamllm.measuring.timing import bytes_per_token, no_garbage_collection
from streamllm.options import QUANTIZATIONS
from streamllm.policy import EvictionPolicy, KvDtype

from .peers import peer_variants
from .reporting import asked_for, interleaved, parser, report, steady, summary


class Variant(NamedTuple):
    method: str
    compress_every: int = 1
    execution: str = "eager"
    quantization: str = "none"
    backend: str = "auto"
    kv_dtype: KvDtype = "auto"

    @property
    def name(self) -> str:
        policy = [] if self.method == "recompute" else [f"R={self.compress_every}"]
        usual = (self.execution, "eager"), (self.quantization, "none"), (self.backend, "auto")
        other = [value.removesuffix("_weight_only") for value, default in usual if value != default]
        kept = [f"KV {self.kv_dtype}"] * (self.kv_dtype != "auto")
        return " ".join([self.method, *policy, *other, *kept])

    def on(self, policy: EvictionPolicy) -> Configuration:
        return Configuration(self.method, replace(policy, kv_dtype=self.kv_dtype), self.backend, self.execution)


VARIANTS = (
    Variant("recompute"),
    Variant("mit"),
    Variant("ours"),
    Variant("ours", 64),
    Variant("ring"),
    Variant("ring", 64),
    Variant("ring", kv_dtype="float16"),
    Variant("ring", execution="compile"),
    *(Variant("ring", execution="compile", kv_dtype=kept) for kept in ("float16", "bfloat16", "float8_e4m3")),
    Variant("ring", 64, execution="compile", kv_dtype="float16"),
    Variant("ring", quantization="int8_weight_only"),
    Variant("ring", execution="compile", quantization="int8_weight_only"),
    Variant("ring", execution="compile", quantization="int8_weight_only", kv_dtype="float16"),
    Variant("ring", execution="compile", quantization="int4_weight_only"),
)
GPU_VARIANTS = (
    Variant("ring", execution="cudagraph"),
    *(Variant(method, backend=backend) for method in ("recompute", "ours", "ring") for backend in ("math", "flash")),
)
REFERENCE = Variant("ours").name


@torch.inference_mode()
def main() -> None:
    options = parser(str(__doc__))
    options.add_argument("--cache", type=int, default=2048, help="sinks and window (2048)")
    arguments = options.parse_args()
    models = {quantization: asked_for(arguments, quantization) for quantization in QUANTIZATIONS}
    loaded = models["none"]
    chosen = VARIANTS + (GPU_VARIANTS if loaded.device.type == "cuda" else ())
    policies = {r: EvictionPolicy(n_sink=4, window_size=arguments.cache - 4, compress_every=r) for r in (1, 64)}
    with no_garbage_collection():
        variants = {v.name: steady(models[v.quantization], v.on(policies[v.compress_every])) for v in chosen}
        variants |= peer_variants(arguments.cache, arguments.dtype, arguments.threads, arguments.shape)
        times = interleaved(variants, arguments.rounds)
    needed = bytes_per_token(loaded, policies[1])
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
