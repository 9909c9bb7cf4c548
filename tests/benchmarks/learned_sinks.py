"""Does a model with learned sinks still need attention sinks? Perplexity without any and with 1, 2 and 4, of small
models that were trained with learned sinks and without, and where the attention of either goes.

python -m tests.benchmarks.learned_sinks [--seed 1] [--models FOLDER] [--json FILE] [--figure FILE.png]

Trains what FOLDER does not have yet (`sink_models`). The text is the embedded one, which is held out, behind the token
that began every window of training. Each policy is compared, token by token, with full attention: to that first token
and the last 127 to 255, which is no further than the models were trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GptOssForCausalLM

from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.engine.model import LoadedModel
from streamllm.figure_style import CYCLE, new_figure, save, style
from streamllm.measuring.quality import paired_increase, perplexity
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import EvictionPolicy
from streamllm.testbed.corpus import evaluation_text, training_documents

from . import sink_models
from .reporting import machine, markdown_table
from .sink_models import FIRST, Recipe, Variant

SINKS, TOTALS = (0, 1, 2, 4), (64, 128)
STRIDE = 128
NAMES = {0.0: "no learned sinks", 1.0: "learned sinks", 10.0: "learned sinks, 10 x rate"}
"""By the rate that sinks were learned at. A sink is one number that moves by no more than its rate in a step: with the
rate of all else it is behind what matrices do to the first token's key within so few steps."""
COLORS = (CYCLE[1], CYCLE[0], CYCLE[2])
RESULTS = Path(__file__).parent / "results"


def training_tokens() -> Tensor:
    documents = "\n\n".join(training_documents(evaluation_text()))
    return torch.tensor(load_tokenizer("testbed")(documents)["input_ids"])


def stream() -> np.ndarray:
    """The embedded text behind the token that begins it."""
    tokens = load_tokens(TextSource(), load_tokenizer("testbed"), Recipe.vocabulary).tokens
    return np.concatenate(([FIRST], tokens))


def windows(tokens: np.ndarray, count: int) -> Tensor:
    """(count, trained length): the beginning of a text, each behind the first token."""
    length = Recipe.trained_length
    pieces = tokens[1 : 1 + count * (length - 1)].reshape(count, -1)
    return torch.from_numpy(np.pad(pieces, ((0, 0), (1, 0)), constant_values=FIRST))


@torch.inference_mode()
def look(model: GptOssForCausalLM, inputs: Tensor) -> dict[str, Any]:
    """Perplexity of windows (n, length); and by layer, the mean over heads and the later half of the queries of the
    weights on the first token and on the learned sink, by the model's own attention."""
    model.set_attn_implementation("eager")
    found = model(inputs, use_cache=False, output_attentions=True)
    loss = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    late = [layer[:, :, inputs.shape[1] // 2 :].double() for layer in found.attentions]
    return {
        "perplexity": loss.exp().item(),
        "first token": [layer[..., 0].mean().item() for layer in late],
        "learned sink": [max(0.0, 1 - layer.sum(-1).mean().item()) for layer in late],
    }


def full_attention(loaded: LoadedModel, tokens: np.ndarray) -> np.ndarray:
    """(n - 1) losses: each token given the first one and the last 127 to 255 of the stream."""
    everything, losses = EvictionPolicy(compress_every=0), []
    for begin in range(0, len(tokens) - 1, STRIDE):
        end = min(begin + STRIDE, len(tokens) - 1)
        seen = tokens[max(1, end + 1 - Recipe.trained_length) : end + 1]
        piece = block_parallel_losses(loaded, np.concatenate((tokens[:1], seen)), everything)
        losses.append(piece[begin - end :])
    return np.concatenate(losses)


def measure(loaded: LoadedModel, variant: Variant, tokens: np.ndarray) -> list[dict[str, Any]]:
    """A row for full attention and each policy; compared are the tokens after the first 256."""
    positions = np.arange(len(tokens) - 1)

    def table(losses: np.ndarray) -> np.ndarray:
        return np.column_stack((positions, losses))[Recipe.trained_length :]

    def row(losses: np.ndarray, **facts: Any) -> dict[str, Any]:
        return {**asdict(variant), **facts} | perplexity(losses[:, 1]).flat("perplexity")

    full = table(full_attention(loaded, tokens))
    rows = [row(full, policy="full attention")]
    for total in TOTALS:
        policies = {sinks: EvictionPolicy(n_sink=sinks, window_size=total - sinks) for sinks in SINKS}
        found = {sinks: table(block_parallel_losses(loaded, tokens, policy)) for sinks, policy in policies.items()}
        for sinks, losses in found.items():
            over_full = paired_increase(losses, full).flat("above_full_percent")
            over_four = paired_increase(losses, found[4]).flat("above_four_sinks_percent")
            rows.append(row(losses, total=total, n_sink=sinks) | over_full | over_four)
    return rows


def trained(variant: Variant, folder: Path, held_out: np.ndarray) -> None:
    """Trains it if the folder does not have it."""
    if (folder / "training.json").exists():
        return
    some = windows(held_out, 8)
    model, seen = sink_models.train(training_tokens(), Recipe(), variant, lambda model: look(model, some))
    sink_models.save(model, seen, Recipe(), folder)


def measured(variant: Variant, folder: Path, tokens: np.ndarray) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a trained model, and what is known of it otherwise."""
    model = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32)
    facts = {
        **asdict(variant),
        "attention": look(model, windows(tokens, 32)),
        "sinks": [layer.self_attn.sinks.tolist() for layer in model.model.layers] if variant.learned else [],
        "training": json.loads((folder / "training.json").read_text()),
    }
    return measure(load_model(str(folder), "float32"), variant, tokens), facts


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A line for each policy, a column for each model."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        policy = row.get("policy") or f"total {row['total']}, S = {row['n_sink']}"
        cell = f"{row['perplexity']:.2f}"
        if "above_full_percent" in row:
            low, high = row["above_full_percent_low"], row["above_full_percent_high"]
            cell += f", {row['above_full_percent']:+.1f}% [{low:+.1f}, {high:+.1f}]"
        lines.setdefault(policy, {"policy": policy})[title(row)] = cell
    return list(lines.values())


def draw(rows: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]], path: Path, total: int = TOTALS[0]) -> None:
    """What evicting the first tokens costs at one total, and where attention goes."""
    with style():
        figure = new_figure(7, 2.6)
        left, right = figure.subplots(1, 2)
        width = 0.8 / len(models)
        for number, (model, color) in enumerate(zip(models, COLORS, strict=True)):
            aside = (number - (len(models) - 1) / 2) * width
            own = [row for row in rows if row.get("total") == total and title(row) == title(model)]
            values = np.array([row["above_full_percent"] for row in own])
            ends = np.array([[row[f"above_full_percent_{end}"] for row in own] for end in ("low", "high")])
            left.bar(np.arange(len(own)) + aside, values, 0.9 * width, yerr=np.abs(ends - values), color=color)
            first, sink = (100 * np.array(model["attention"][name]) for name in ("first token", "learned sink"))
            at = np.arange(len(first)) + aside
            right.bar(at, first, 0.9 * width, color=color, label=title(model))
            right.bar(at, sink, 0.9 * width, bottom=first, color="white", edgecolor=color)
        left.set_xticks(range(len(SINKS)), [f"S = {sinks}" for sinks in SINKS])
        left.set_title(f"perplexity above full attention, %, total {total}")
        right.set_xticks(range(Recipe.layers), [f"layer {layer}" for layer in range(Recipe.layers)])
        right.set_title("attention, %: first token; hollow: learned sink")
        right.set_ylim(0, 100)
        left.legend(*right.get_legend_handles_labels())
        save(figure, path.with_suffix(""), [path.suffix[1:]])


def title(model: dict[str, Any]) -> str:
    """Of a model, or a row."""
    return NAMES[model["sink_rate"]]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=1, metavar="N", help="of weights and windows (1)")
    options.add_argument("--models", type=Path, default=Path("sweeps/learned-sinks"), metavar="FOLDER")
    options.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    options.add_argument("--json", type=Path, default=RESULTS / "learned_sinks.json", metavar="FILE")
    options.add_argument("--figure", type=Path, default=RESULTS / "learned_sinks.png", metavar="FILE.png")
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    tokens, rows, models = stream(), [], []
    variants = [Variant(rate, arguments.seed) for rate in NAMES]
    for variant in variants:
        trained(variant, arguments.models / variant.name, tokens)
    for variant in variants:
        found, facts = measured(variant, arguments.models / variant.name, tokens)
        rows += found
        models.append(facts)
    print(markdown_table(shown(rows)))
    facts = {"benchmark": "learned_sinks", "text": "testbed", "tokens": len(tokens) - 1, **machine()}
    arguments.json.write_text(json.dumps(facts | {"rows": rows, "models": models}, indent=1) + "\n")
    draw(rows, models, arguments.figure)


if __name__ == "__main__":
    main()
