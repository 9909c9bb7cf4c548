"""The cliff at R >= 128 of the source documents: what pruning more rarely costs, by two accountings and several totals.

python -m tests.benchmarks.cliff [--tokens 12288] [--json FILE] [--figure FILE.png]

By nominal accounting the cache grows to S + W + R keys between prunes. With a total of the trained length that is past
every position the model was trained on; with a lower total, or by peak accounting, it is not until R is larger. So: a
cliff that lies at the same R whatever the total would be lazy pruning's; one that lies at the same number of keys is
the trained range's. A second table takes one run apart, by the keys that a query attends to.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.figure_style import CYCLE, GREY, MARKERS, new_figure, save, style
from streamllm.measuring.quality import Estimate, paired_increase, perplexity
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import (
    CapAccounting,
    EvictionPolicy,
    PolicyError,
    evicted_before,
    peak_kv,
    steady_state,
    with_derived_window,
)

from .reporting import machine

INTERVALS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 320, 512)
CURVES: dict[str, tuple[int, CapAccounting]] = {
    "nominal, total 256": (256, "nominal"),
    "nominal, total 128": (128, "nominal"),
    "nominal, total 64": (64, "nominal"),
    "peak, total 256": (256, "peak"),
}
APART = "nominal, total 256"
KEYS = (0, 288, 320, 352, 384, 448, 512, 768)
"""Edges; R = 1 attends to 257: a full trained length and the query's own key."""
RESULTS = Path(__file__).parent / "results"


def keys_attended(policy: EvictionPolicy, n_queries: int) -> np.ndarray:
    """(n_queries), each query's own key included."""
    return np.arange(1, n_queries + 1) - np.array(evicted_before(policy, n_queries))


def measure(tokens: np.ndarray) -> tuple[list[dict[str, Any]], dict[tuple[str, int], np.ndarray]]:
    """A row per curve and R, and the losses behind them. Compared are the tokens behind the first prune of any."""
    loaded = load_model("testbed", "float32")
    n_losses = len(tokens) - 1
    positions = np.arange(n_losses)
    rows, losses = [], {}
    for curve, (total, accounting) in CURVES.items():
        for interval in INTERVALS:
            row: dict[str, Any] = {"curve": curve, "compress_every": interval}
            rows.append(row)
            try:
                policy = with_derived_window(EvictionPolicy(compress_every=interval), total, accounting)
            except PolicyError as error:
                row["impossible"] = str(error)
                continue
            found = losses[curve, interval] = block_parallel_losses(loaded, tokens, policy)
            steady = steady_state(policy)
            assert steady is not None
            later = slice(steady.start, None)
            vanilla = np.column_stack((positions, losses[curve, 1]))[later]
            increase = paired_increase(np.column_stack((positions, found))[later], vanilla)
            row |= {
                "window_size": policy.window_size,
                "peak_kv": peak_kv(policy, n_losses),
                "mean_keys": float(keys_attended(policy, n_losses)[later].mean()),
                **perplexity(found[later]).flat("perplexity"),
                **increase.flat("ppl_increase_percent"),
            }
            print(f"{curve}, R {interval}: {row['ppl_increase_percent']:+.1f}%", flush=True)
    return rows, losses


def apart(losses: dict[tuple[str, int], np.ndarray], interval: int = INTERVALS[-1]) -> list[dict[str, Any]]:
    """One run's losses over R = 1, by the number of keys that the query attended to."""
    total, accounting = CURVES[APART]
    policy = with_derived_window(EvictionPolicy(compress_every=interval), total, accounting)
    table = np.column_stack((np.arange(len(losses[APART, 1])), losses[APART, interval]))
    vanilla = np.column_stack((np.arange(len(losses[APART, 1])), losses[APART, 1]))
    steady = steady_state(policy)
    assert steady is not None
    keys = keys_attended(policy, len(table))
    keys[: steady.start] = -1
    rows = []
    for low, high in pairwise(KEYS):
        chosen = (keys > low) & (keys <= high)
        if chosen.any():
            increase = paired_increase(table[chosen], vanilla[chosen])
            rows.append(
                {
                    "keys_from": int(keys[chosen].min()),
                    "keys_to": int(keys[chosen].max()),
                    "tokens": int(chosen.sum()),
                    **perplexity(losses[APART, 1][chosen]).flat("vanilla_perplexity"),
                    **perplexity(losses[APART, interval][chosen]).flat("perplexity"),
                    **increase.flat("ppl_increase_percent"),
                }
            )
    return rows


def increase_of(row: dict[str, Any]) -> Estimate:
    return Estimate(*(row[f"ppl_increase_percent{end}"] for end in ("", "_low", "_high")))


def markdown(rows: list[dict[str, Any]], bins: list[dict[str, Any]]) -> str:
    lines = ["| R | " + " | ".join(CURVES) + " |", "|---|" + "---|" * len(CURVES)]
    cells = {(row["curve"], row["compress_every"]): _cell(row) for row in rows}
    lines += [f"| {r} | " + " | ".join(cells[curve, r] for curve in CURVES) + " |" for r in INTERVALS]
    lines += [
        "",
        f"| keys attended to ({APART}, R {INTERVALS[-1]}) | tokens | perplexity | above R 1 |",
        "|---|---|---|---|",
    ]
    for row in bins:
        keys = f"{row['keys_from']} .. {row['keys_to']}"
        lines.append(f"| {keys} | {row['tokens']} | {row['perplexity']:.4g} | {_percent(increase_of(row))} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if "impossible" in row:
        return "no window fits"
    change = f"PPL {row['perplexity']:.2f}" if row["compress_every"] == 1 else _percent(increase_of(row))
    return f"{change}; peak {row['peak_kv']}, mean {row['mean_keys']:.0f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:+.1f}% [{estimate.low:+.1f}, {estimate.high:+.1f}]"


def draw(rows: list[dict[str, Any]], trained: int, path: Path) -> None:
    """Against R, and against the largest number of keys that a query attends to."""
    with style():
        figure = new_figure(9, 3.6)
        left, right = figure.subplots(1, 2, sharey=True)
        for curve, color, marker in zip(CURVES, CYCLE, MARKERS, strict=False):
            own = [row for row in rows if row["curve"] == curve and "impossible" not in row]
            estimates = [increase_of(row) for row in own]
            values = [e.value for e in estimates]
            errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
            for axes, name in ((left, "compress_every"), (right, "peak_kv")):
                at = [row[name] for row in own]
                axes.errorbar(at, values, errors, color=color, marker=marker, markersize=4, linewidth=1, label=curve)
        left.set_xscale("log", base=2)
        left.set_xticks([r for r in INTERVALS if r & (r - 1) == 0], [str(r) for r in INTERVALS if r & (r - 1) == 0])
        left.set_xlabel("compress_every R")
        left.set_ylabel("perplexity above R = 1, %")
        left.set_yscale("symlog", linthresh=10)
        left.set_yticks([0, 5, 10, 100, 1000], ["0", "5", "10", "100", "1000"])
        left.set_ylim(-4, 1000)
        left.legend(fontsize=8)
        right.axvline(trained, color=GREY, linestyle=":")
        right.text(
            trained, 1.01, f"trained on {trained}", transform=right.get_xaxis_transform(), ha="center", fontsize=8
        )
        right.set_xlabel("most keys a query attends to")
        for axes in (left, right):
            axes.axhline(0, color="0.3", linewidth=1)
        save(figure, path.with_suffix(""), [path.suffix[1:]])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=12_288, help="of the embedded text (12288)")
    options.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    options.add_argument("--json", type=Path, default=RESULTS / "cliff.json", metavar="FILE")
    options.add_argument("--figure", type=Path, default=RESULTS / "cliff.png", metavar="FILE.png")
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    loaded = load_model("testbed", "float32")
    source = TextSource(max_eval_tokens=arguments.tokens + 1)
    stream = load_tokens(source, load_tokenizer("testbed"), loaded.vocabulary)
    rows, losses = measure(stream.tokens)
    bins = apart(losses)
    print(markdown(rows, bins))
    facts = {"benchmark": "cliff", "model": loaded.name, "trained_length": loaded.trained_length, "n_sink": 4}
    facts |= {"text": stream.label, "tokens": len(stream.tokens) - 1, **machine()}
    arguments.json.write_text(json.dumps(facts | {"rows": rows, "by_keys_attended": bins}, indent=1) + "\n")
    draw(rows, int(loaded.trained_length or 0), arguments.figure)


if __name__ == "__main__":
    main()
