"""Perplexity along a stream where positions are kept, with four sinks and one, beside where they are compact, and
where there are no sinks.

python -m tests.benchmarks.positions [--edges 256 512 1024 2048 4096 8192] [--json FILE]
python -m tests.benchmarks.positions --model smollm2 --text FILE [FILE ...] --tokens 32768 --total 2048

The text is cut into stretches, and within each the policies are compared token by token. Of several texts, the last is
whole and the others come before it, as much of each as there is room for: a short text far into a stream. What is
measured is kept in a store, so that an interrupted run goes on. Writes results/positions-MODEL-TEXT.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from streamllm.configuration import Configuration
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.engine.model import LoadedModel
from streamllm.measuring.measurements import Measurements
from streamllm.measuring.quality import paired_increase
from streamllm.measuring.store import MeasurementStore
from streamllm.measuring.text import TextSource, TokenStream, load_tokens
from streamllm.policy import EvictionPolicy, strict_policy
from streamllm.results.schema import knobs_in_short
from streamllm.terminal.progress import working

from .reporting import machine, markdown_table

RESULTS = Path(__file__).parent / "results"
BESIDE = ("keep", "one sink", "one sink, keep", "no sinks")
_STRETCHES = 8


def read(texts: Sequence[Path], tokens: int, model: str, loaded: LoadedModel) -> TokenStream:
    """So many tokens: the last text, and before it as much of the others as there is room for."""
    tokenizer = load_tokenizer(model)
    sources = [TextSource(text=text) for text in texts] or [TextSource()]
    parts = [load_tokens(source, tokenizer, loaded.vocabulary).tokens for source in sources]
    last = parts[-1][:tokens]
    joined = np.concatenate([*(part[: tokens - len(last)] for part in parts[:-1]), last])[-tokens:]
    digest = hashlib.sha256(joined.astype("<i8").tobytes()).hexdigest()
    return TokenStream(joined, "+".join(source.label for source in sources), digest)


def policies(total: int, every: int, beside: Sequence[str] = BESIDE) -> dict[str, EvictionPolicy]:
    """The first is what the others are compared with."""
    compact = replace(strict_policy(total), compress_every=every)
    single = replace(compact, n_sink=1, window_size=total - 1)
    others = {
        "keep": replace(compact, positions="keep"),
        "one sink": single,
        "one sink, keep": replace(single, positions="keep"),
        "no sinks": replace(compact, n_sink=0, window_size=total),
    }
    return {"compact": compact} | {name: others[name] for name in beside}


def losses_of(measurements: Measurements, chosen: dict[str, EvictionPolicy]) -> dict[str, np.ndarray]:
    """(n, 2) each: position, nats."""
    found = {}
    for name, policy in chosen.items():
        started = time.perf_counter()
        with working(name) as progress:
            found[name] = measurements.quality(Configuration("ring", policy), progress).losses
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def stretches(found: dict[str, np.ndarray], edges: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each: perplexities, and by how many percent they are above that of four sinks, compact."""
    reference = found["compact"]
    for low, high in pairwise([0, *edges, len(reference)]):
        row: dict[str, Any] = {"from": low, "to": high}
        for name, table in found.items():
            row[f"{name} PPL"] = float(np.exp(table[low:high, 1].mean()))
        for name in list(found)[1:]:
            row |= paired_increase(found[name][low:high], reference[low:high]).flat(f"{name} %")
        yield row


def shown(row: dict[str, Any]) -> dict[str, str]:
    """With intervals in the cells of their values."""
    cells = {"tokens": f"{row['from']:,} to {row['to']:,}"}
    for name in (name for name in row if name.endswith("PPL")):
        cells[name] = f"{row[name]:.2f}"
    for name in (name for name in row if name.endswith("%")):
        cells[name] = f"{row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"
    return cells


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="testbed")
    options.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="(the embedded text)")
    options.add_argument("--tokens", type=int, default=16_384, help="(16384)")
    options.add_argument("--total", type=int, default=256, help="sinks and window (256)")
    options.add_argument("--every", type=int, default=1, metavar="R", help="(1)")
    options.add_argument("--beside", nargs="+", choices=BESIDE, default=BESIDE, help="four sinks, compact (all)")
    options.add_argument("--edges", type=int, nargs="+", metavar="TOKEN", help="between stretches (eight alike)")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--store", type=Path, default=Path("sweeps/.store"), metavar="DIR")
    options.add_argument("--json", type=Path, metavar="FILE", help="(results/positions-MODEL-TEXT.json)")
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    loaded = load_model(arguments.model, arguments.dtype)
    stream = read(arguments.text, arguments.tokens + 1, arguments.model, loaded)
    chosen = policies(arguments.total, arguments.every, arguments.beside)
    measurements = Measurements.of(MeasurementStore(arguments.store), loaded, stream, arguments.total)
    found = losses_of(measurements, chosen)
    n_losses = len(stream.tokens) - 1
    edges = arguments.edges or [n_losses * i // _STRETCHES for i in range(1, _STRETCHES)]
    rows = list(stretches(found, edges))
    (whole,) = stretches(found, [])
    print(markdown_table([shown(row) for row in (*rows, whole)]))
    facts = {
        "benchmark": "positions",
        "model": loaded.name,
        "weights": loaded.weights,
        "trained_length": loaded.trained_length,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "text": stream.label,
        "text_digest": stream.digest,
        "tokens": n_losses,
        "policies": {name: knobs_in_short(policy.named) for name, policy in chosen.items()},
        **machine(),
    }
    file = arguments.json or RESULTS / f"positions-{arguments.model}-{stream.label}.json"
    file.write_text(json.dumps(facts | {"rows": rows, "whole": whole}, indent=1) + "\n")


if __name__ == "__main__":
    main()
