"""Measures every point of a search space, as a truth that samplers can be compared on (`samplers`): a policy's quality
once, by the block-parallel evaluator; the time of each configuration beside the reference's, in rounds, each of which
takes all of them in another order. Goes on where it was stopped.

python -m tests.benchmarks.space_table SPACE.yaml OUT.json [--model testbed] [--rounds 3] [--tokens 4096]
python -m tests.benchmarks.space_table SPACE.yaml OUT.json --shape pythia-70m --qualities OTHER.json

Random weights have no quality: with --shape, the policies' qualities are those of another table.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.search.points import configuration_of
from search_spaces import SearchSpace, load_space
from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.engine.model import LoadedModel
from streamllm.files import write_atomically
from streamllm.measuring.pairing import in_turn, load_average
from streamllm.measuring.quality import median_interval, paired_increase
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.measuring.timing import Reference, TimedDecoder, no_garbage_collection
from streamllm.policy import strict_policy

from .reporting import SHAPES, machine, random_model

Table = dict[str, Any]


def qualities(table: Table, loaded: LoadedModel, tokens: np.ndarray, whats: dict[str, Configuration]) -> None:
    """Adds `ppl_vs_strict_percent` of each policy that has none yet."""
    positions = np.arange(len(tokens) - 1)

    def losses(what: Configuration) -> np.ndarray:
        return np.column_stack((positions, block_parallel_losses(loaded, tokens, what.effective)))

    strict = losses(Configuration("ring", strict_policy(table["cap"])))
    for what in whats.values():
        name = str(what.effective)
        if name not in table["quality"]:
            increase = paired_increase(losses(what), strict)
            table["quality"][name] = [increase.value, increase.low, increase.high]


@torch.inference_mode()
def ratios(
    loaded: LoadedModel, what: Configuration, tokens: np.ndarray, reference: Reference, pairs: int
) -> list[float]:
    """Time per token over the reference's, of so many pairs of segments in turn."""
    with no_garbage_collection():
        with what.kernel.active():
            run = TimedDecoder(loaded, what, tokens)
            run.prefill()
            run.warm_up()
        length = run.segment_length()

        def segment() -> float:
            with run.backend.active():
                return 1e3 * run.decode(length)

        found = islice(in_turn((segment, lambda: reference.segment(length * run.pace))), pairs)
        return [own / theirs for own, theirs in found]


def measure(arguments: argparse.Namespace, space: SearchSpace, table: Table) -> None:
    whats = {json.dumps(params): configuration_of(params, space, table["cap"]) for params in space.points()}
    started = time.time()
    if arguments.shape:
        loaded = random_model(arguments.shape, arguments.dtype)
        tokens = np.random.default_rng(0).integers(1000, size=arguments.tokens)
        table["quality"] = json.loads(arguments.qualities.read_text())["quality"]
    else:
        loaded = load_model(arguments.model, arguments.dtype)
        source = TextSource(text=arguments.text, max_eval_tokens=arguments.tokens)
        tokens = load_tokens(source, load_tokenizer(arguments.model), sys.maxsize).tokens
        qualities(table, loaded, tokens, whats)
    write_atomically(arguments.out, json.dumps(table))
    print(f"{len(table['quality'])} policies in {time.time() - started:.0f} s", flush=True)
    reference = Reference.start(loaded, table["cap"], tokens)
    for number in range(arguments.rounds):
        order = [name for name in whats if len(table["ratios"].get(name, [])) <= number * arguments.pairs]
        random.Random(number).shuffle(order)
        for done, name in enumerate(order, 1):
            table["ratios"].setdefault(name, []).extend(ratios(loaded, whats[name], tokens, reference, arguments.pairs))
            if done % 25 == 0 or done == len(order):
                table["loads"].append(round(load_average(), 2))
                write_atomically(arguments.out, json.dumps(table))
                print(f"round {number + 1}: {done} of {len(order)}, {time.time() - started:.0f} s", flush=True)


def rows_of(table: Table) -> list[dict[str, Any]]:
    """A row per configuration: knobs, quality, the median of all its ratios with its interval."""
    rows = []
    space = load_space(table["space"])
    for name, found in table["ratios"].items():
        params = json.loads(name)
        what = configuration_of(params, space, table["cap"])
        ratio, quality = median_interval(np.array(found)), table["quality"][str(what.effective)]
        rows.append(
            {key: value for key, value in params.items() if len(space.parameters[key]) > 1}
            | {"time_ratio": round(ratio.value, 5), "low": round(ratio.low, 5), "high": round(ratio.high, 5)}
            | {"ppl_vs_strict_percent": round(quality[0], 5)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space")
    parser.add_argument("out", type=Path, help="raw measurements; beside it NAME-rows.json, what samplers read")
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of that shape in place of the model")
    parser.add_argument("--qualities", type=Path, metavar="FILE", help="raw measurements that have the policies'")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, metavar="FILE", help="(the model's own)")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=4, help="of segments, a round (4)")
    parser.add_argument("--rows-only", action="store_true", help="of what has been measured so far")
    arguments = parser.parse_args()
    limit_threads(1)
    space = load_space(arguments.space)
    table: Table = (
        json.loads(arguments.out.read_text())
        if arguments.out.is_file()
        else {"space": arguments.space, "cap": space.cap, "quality": {}, "ratios": {}, "loads": []}
    )
    if arguments.shape and arguments.qualities is None:
        parser.error("--shape: needs --qualities")
    if not arguments.rows_only:
        measure(arguments, space, table)
    rows = rows_of(table)
    width = float(np.median([(row["high"] - row["low"]) / 2 / row["time_ratio"] for row in rows]))
    about = {
        "what": "Every point of the space: ppl_vs_strict_percent by the block-parallel evaluator, once a policy; "
        "time_ratio the median over rounds of pairs of segments in turn with the reference, with its interval of 95%.",
        "space": Path(arguments.space).name,
        "model": f"{arguments.shape}, qualities of {arguments.qualities.stem}" if arguments.shape else arguments.model,
        "n_tokens": arguments.tokens,
        "pairs": int(np.median([len(found) for found in table["ratios"].values()])),
        "half_interval": round(width, 4),
        "load": {"median": float(np.median(table["loads"])), "most": max(table["loads"])},
    }
    rows_file = arguments.out.with_name(f"{arguments.out.stem}-rows.json")
    lines = ",\n".join(json.dumps(row) for row in rows)
    rows_file.write_text(json.dumps(machine() | about, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n')
    print(f"{len(rows)} of {space.size} configurations, half an interval {width:.1%} of a ratio: {rows_file}")


if __name__ == "__main__":
    main()
