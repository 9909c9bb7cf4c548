"""Perplexity of shares of layers in one total (`layer_budgets`) beside that of the same total in every layer, token by
token; and of the share that is best on the first half of the text, on its second half, which did not choose it.

python -m tests.benchmarks.layer_budgets [--totals 32 64 128] [--model MODEL --text FILE --tokens N] [--json FILE]

Four sinks, pruned after every token. Shares are those of the space `layer_budgets`, and each layer alone that holds
more, or is all that others take from. What is measured is kept in a store, so that an interrupted run goes on. Writes
results/layer_budgets-MODEL-TEXT.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from search_spaces import load_space
from streamllm.configuration import Configuration
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model
from streamllm.engine.model import LoadedModel
from streamllm.measuring.measurements import Measurements
from streamllm.measuring.quality import paired_increase
from streamllm.measuring.store import MeasurementStore
from streamllm.measuring.text import TokenStream
from streamllm.policy import longest_kv, strict_policy
from streamllm.results.schema import knobs_in_short
from streamllm.terminal.progress import working

from .positions import RESULTS, read
from .reporting import machine, markdown_table

UNIFORM = "uniform"


def words(n_layers: int) -> list[str]:
    """`uniform` first."""
    shared = [str(word) for word in load_space("layer_budgets").parameters["layer_budgets"]]
    alone = [f"retrieval:{layer}:75" for layer in range(n_layers)]
    others = (",".join(str(one) for one in range(n_layers) if one != layer) for layer in range(n_layers))
    return [*shared, *alone, *(f"retrieval:{layers}:50" for layers in others)]


def rows_of(loaded: LoadedModel, stream: TokenStream, total: int, store: Path) -> Iterator[dict[str, Any]]:
    """A row for each share, and the last for the one that the first half of the text chooses."""
    measurements = Measurements.of(MeasurementStore(store), loaded, stream, total)
    losses: dict[str, np.ndarray] = {}
    for word in words(len(loaded.layers)):
        policy = replace(strict_policy(total), layer_budgets=word)
        with working(knobs_in_short(policy.named)) as progress:
            losses[word] = measurements.quality(Configuration("ring", policy), progress).losses
        longest = longest_kv(policy, len(losses[word]), len(loaded.layers))
        row = {"total": total, "budgets": word, "longest": longest, "PPL": float(np.exp(losses[word][:, 1].mean()))}
        yield row | (paired_increase(losses[word], losses[UNIFORM]).flat("over uniform %") if word != UNIFORM else {})
    half = len(losses[UNIFORM]) // 2
    chosen = min(losses, key=lambda word: losses[word][:half, 1].mean())
    row = {"total": total, "budgets": f"best of the first half: {chosen}"}
    later = losses[chosen][half:]
    row["PPL"] = float(np.exp(later[:, 1].mean()))
    yield row | paired_increase(later, losses[UNIFORM][half:]).flat("over uniform %")


def shown(row: dict[str, Any]) -> dict[str, str]:
    cells = {"total": str(row["total"]), "budgets": row["budgets"], "PPL": f"{row['PPL']:.3f}"}
    if (more := row.get("over uniform %")) is None:
        return cells | {"over uniform %": ""}
    return cells | {
        "over uniform %": f"{more:+.2f} [{row['over uniform %_low']:+.2f}, {row['over uniform %_high']:+.2f}]"
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="testbed")
    options.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="(the embedded text)")
    options.add_argument("--tokens", type=int, default=23_011, help="(23011)")
    options.add_argument("--totals", type=int, nargs="+", default=[32, 64, 128], help="sinks and window (32 64 128)")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--store", type=Path, default=Path("sweeps/.store"), metavar="DIR")
    options.add_argument("--json", type=Path, metavar="FILE", help="(results/layer_budgets-MODEL-TEXT.json)")
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    loaded = load_model(arguments.model)
    stream = read(arguments.text, arguments.tokens + 1, arguments.model, loaded)
    rows = [row for total in arguments.totals for row in rows_of(loaded, stream, total, arguments.store)]
    print(markdown_table([shown(row) for row in rows]))
    facts = {
        "benchmark": "layer budgets",
        "model": loaded.name,
        "weights": loaded.weights,
        "layers": len(loaded.layers),
        "trained_length": loaded.trained_length,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "text": stream.label,
        "text_digest": stream.digest,
        "tokens": len(stream.tokens) - 1,
        **machine(),
    }
    file = arguments.json or RESULTS / f"layer_budgets-{arguments.model}-{stream.label}.json"
    file.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
