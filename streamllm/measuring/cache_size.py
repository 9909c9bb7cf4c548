"""A method's cache at its largest, in bytes.

In tokens (`peak_kv`) it is the policy's alone. In bytes it is the method's as well: where a layer has a sliding window
of its own, `ring` keeps no more than that, and the others keep all that the policy leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..configuration import Configuration
from ..engine.methods import method_named
from ..policy import EvictionPolicy, peak_kv

KvLayers = Sequence[tuple[int | None, int]]
"""Of each layer: its sliding window, and the bytes of a token's keys and values as the model computes them."""


def peak_bytes(what: Configuration, layers: KvLayers, dtype: str, peak: int, stream: EvictionPolicy, n: int) -> int:
    """Of the keys and values that are held at most, the query's own included.

    dtype: the model's; peak: `peak_kv`, the layers' mean by their bytes; stream: the schedule that the first `n` tokens
    of a stream were decoded by, which is `what.effective` unless the text was cut into chunks."""
    holds_window = method_named(what.method).holds_window
    windows, rest = 0, [what.effective.kept_bytes(computed, dtype) for _, computed in layers]
    for number, (own, (window, _)) in enumerate(zip(stream.of_layers(len(layers)), layers, strict=True)):
        if window is not None and holds_window(own, window):
            windows += min(window, n) * rest[number]
            rest[number] = 0
    if windows and any(rest) and not stream.is_uniform:
        peak = peak_kv(stream, n, rest)
    return windows + peak * sum(rest)
