"""What the knobs of StreamingLLM cost in perplexity on a real model, SmolLM2-135M-Instruct, which comes by pip.

python -m tests.benchmarks.real_model GRID [--text FILE] [--tokens 8000] [--model smollm2] [--dtype auto]

GRID: sinks      sinks at totals of 256 to 2048; each beside four sinks at the same total
      lazy       R at a total of 2048, far within the 8192 positions that the model was trained on; beside R 1
      cliff      R at a total of 8192, where R grows the cache past them, and at one that leaves it room; beside R 1
      softlite   slack and max drop at S 32, R 32, total 2048; beside neither

What is measured is kept in a store, so that an interrupted run goes on. Writes results/smollm2-GRID-TEXT.json and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from streamllm.configuration import Configuration
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.figure_style import CYCLE, MARKERS, new_figure, save, style
from streamllm.measuring.measurements import Measurements
from streamllm.measuring.quality import Estimate, paired_increase
from streamllm.measuring.store import MeasurementStore
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import EvictionPolicy, peak_kv, with_derived_window
from streamllm.terminal.progress import working

from .reporting import machine

RESULTS = Path(__file__).parent / "results"
SINKS = (4, 0, 1, 2, 8, 16, 32, 64)
INTERVALS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CLIFF = (1, 128, 512)
SLACKS, DROPS = (0, 8, 16, 32), (0, 8, 16, 32)

_AXES = {
    "sinks": ("sinks", "four sinks"),
    "lazy": ("compress_every R", "R = 1"),
    "cliff": ("compress_every R", "R = 1"),
    "softlite": ("cache slack", "no slack, no max drop"),
}
"""Of a figure: the knob, and what the others are compared with."""

_SINCE = {"cliff": 8192}
"""Of the text: compared are the tokens from there on. Before, nothing has been evicted, by whatever R."""

Cell = tuple[str, int, EvictionPolicy]
"""The curve it is on, where on it, and what is measured; the first of a curve is what the others are compared with."""


def cells(grid: str) -> list[Cell]:
    """In an order that leaves whole curves if time runs out."""
    if grid == "sinks":
        return [(f"total {total}", s, _policy(total, n_sink=s)) for total in (512, 256, 1024, 2048) for s in SINKS]
    if grid == "lazy":
        return [("total 2048", r, _policy(2048, compress_every=r)) for r in INTERVALS]
    if grid == "cliff":
        past = [("total 8192", r, _policy(8192, compress_every=r)) for r in CLIFF]
        within = [("total 7680: grown by R, at most 8192", r, _policy(7680, compress_every=r)) for r in CLIFF]
        return [*past, *within]
    return [
        (f"max drop {drop}", slack, _policy(2048, n_sink=32, compress_every=32, cache_slack=slack, max_drop=drop))
        for drop in DROPS
        for slack in SLACKS
    ]


def _policy(total: int, **knobs: int) -> EvictionPolicy:
    return with_derived_window(EvictionPolicy(**{"n_sink": 4} | knobs), total)


def measure(measurements: Measurements, grid: str) -> list[dict[str, Any]]:
    references: dict[str, np.ndarray] = {}
    rows = []
    for curve, at, policy in cells(grid):
        with working(f"{curve}, {at}") as progress:
            measured = measurements.quality(Configuration("ours", policy), progress)
        later = measured.losses[measured.losses[:, 0] >= _SINCE.get(grid, 0)]
        reference = references.setdefault("all" if grid == "softlite" else curve, later)
        increase = paired_increase(later, reference)
        of_perplexity = ("perplexity", "perplexity_low", "perplexity_high", "evaluated_tokens", "quality_sec")
        rows.append(
            {
                "curve": curve,
                "at": at,
                **asdict(policy),
                "peak_kv": peak_kv(policy, len(measured.losses)),
                **{name: measured.record[name] for name in of_perplexity},
                "compared_tokens": len(later),
                **increase.flat("increase_percent"),
            }
        )
        print(f"{curve}, {at}: PPL {rows[-1]['perplexity']:.2f}, {_percent(increase)}", file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Curves are columns; of the first of each, perplexity, of the others what they are above it."""
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    places = sorted({row["at"] for row in rows})
    found = {(row["curve"], row["at"]): _cell(row) for row in rows}
    lines = ["| | " + " | ".join(curves) + " |", "|---|" + "---|" * len(curves)]
    return "\n".join(
        [*lines, *(f"| {at} | " + " | ".join(found.get((c, at), "") for c in curves) + " |" for at in places)]
    )


def _cell(row: dict[str, Any]) -> str:
    return (
        f"{row['perplexity']:.2f} ({_percent(Estimate(*(row[f'increase_percent{e}'] for e in ('', '_low', '_high'))))})"
    )


def _percent(estimate: Estimate) -> str:
    if estimate.low == estimate.high == 0:
        return "reference"
    return f"{estimate.value:+.2f}% [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def draw(rows: list[dict[str, Any]], grid: str, title: str, path: Path) -> None:
    knob, reference = _AXES[grid]
    with style():
        figure = new_figure(7, 3.6)
        axes = figure.subplots()
        for number, curve in enumerate(dict.fromkeys(row["curve"] for row in rows)):
            own = sorted((row for row in rows if row["curve"] == curve), key=lambda row: int(row["at"]))
            values = [row["increase_percent"] for row in own]
            errors = [
                [row["increase_percent"] - row["increase_percent_low"] for row in own],
                [row["increase_percent_high"] - row["increase_percent"] for row in own],
            ]
            look = {"color": CYCLE[number % len(CYCLE)], "marker": MARKERS[number % len(MARKERS)]}
            axes.errorbar([row["at"] for row in own], values, errors, markersize=4, linewidth=1, label=curve, **look)
        axes.set_xscale("symlog", base=2, linthresh=1)
        ticks = sorted({row["at"] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel(knob)
        axes.set_ylabel(f"perplexity above {reference}, %")
        if max(row["increase_percent"] for row in rows) > 10:
            axes.set_yscale("symlog", linthresh=1)
            axes.set_yticks([-1, 0, 1, 10, 100], ["-1", "0", "1", "10", "100"])
            axes.set_ylim(-2, 200)
        axes.axhline(0, color="0.3", linewidth=1)
        axes.set_title(title)
        axes.legend(fontsize=8)
        save(figure, path.with_suffix(""), ["png"])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("grid", choices=("sinks", "lazy", "cliff", "softlite"))
    options.add_argument("--model", default="smollm2")
    options.add_argument("--text", type=Path, metavar="FILE", help="a novel, an article (the embedded)")
    options.add_argument("--tokens", type=int, default=8000)
    options.add_argument("--dtype", default="auto")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--store", type=Path, default=Path("sweeps/.store"), metavar="DIR")
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    loaded = load_model(arguments.model, arguments.dtype)
    source = TextSource(text=arguments.text, max_eval_tokens=arguments.tokens)
    stream = load_tokens(source, load_tokenizer(arguments.model), loaded.vocabulary)
    rows = measure(Measurements.of(MeasurementStore(arguments.store), loaded, stream, 2048), arguments.grid)
    print(markdown(rows))
    facts = {
        "benchmark": f"real_model {arguments.grid}",
        "model": loaded.name,
        "weights": loaded.weights,
        "trained_length": loaded.trained_length,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "text": stream.label,
        "text_digest": stream.digest,
        "tokens": len(stream.tokens),
        **machine(),
    }
    stem = RESULTS / f"{arguments.model}-{arguments.grid}-{stream.label}"
    stem.with_suffix(".json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    draw(
        rows,
        arguments.grid,
        f"{loaded.name} on {len(stream.tokens)} tokens of {stream.label}",
        stem.with_suffix(".png"),
    )


if __name__ == "__main__":
    main()
