"""Recall of what a stream said earlier, against distance, for several policies beside one another: questions all along
a stream, whose answers are told without decoding; and perplexity along a text. Writes recall.csv (a line per question),
recall.png and summary.json.

examples:
python -m streamllm recall                                    the embedded model, which recalls little anyway
python -m streamllm recall --model smollm2 --total-kv 256 512 1024 2048
python -m streamllm recall --model smollm2 --total-kv 512 --n-sink 4 64 256 --task first
python -m streamllm recall --model smollm2 --total-kv 512 --compress-every 1 256 --dense --task passkey lines
python -m streamllm recall --model smollm2 --total-kv 512 --positions compact keep
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..configuration import Configuration
from ..errors import UsageError
from ..evaluating import measurements_beside
from ..policy import FORMS, WORDS, EvictionPolicy, peak_kv, strict_policy, with_derived_window
from ..results.schema import FIELDS, POLICY_KNOBS, POLICY_WORDS, knobs_in_short
from ..tasks.texts import TASKS
from ..terminal.arguments import (
    add_model_arguments,
    add_store_argument,
    add_text_arguments,
    add_threads_argument,
    load_asked,
    text_source,
    usual_total,
)
from ..terminal.output import make_room, messages_on_stderr
from ..terminal.printing import say
from ..terminal.progress import working

if TYPE_CHECKING:
    import numpy as np

    from ..engine.model import LoadedModel
    from ..explain.recall import AskedStream
    from ..measuring.text import TokenStream

HELP = "what a cache forgets: recall against distance, by policy"
_FILES = ("recall.csv", "recall.png", "summary.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is asked")
    add_model_arguments(what)
    what.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="kinds of questions (all)")
    what.add_argument("--length", type=int, default=16_000, metavar="N", help="tokens of a task's stream (16000)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of the streams (0)")
    policies = parser.add_argument_group("the policies: of several values, every combination")
    for knob in (FIELDS["total_kv"], *POLICY_KNOBS):
        usual = "what the total leaves" if knob.name == "window_size" else knob.usual
        usual = "the trained length, at most 2048" if knob.name == "total_kv" else usual
        policies.add_argument(
            f"--{knob.name.replace('_', '-')}",
            type=int,
            nargs="+",
            metavar=knob.short.upper() or "N",
            help=f"{knob.about} ({usual})",
        )
    for word in (word for word in POLICY_WORDS if word.name not in FORMS):  # one schedule tells whether it is there
        flag = f"--{word.name.replace('_', '-')}"
        policies.add_argument(flag, nargs="+", choices=WORDS[word.name], help=f"{word.about} ({word.usual})")
    policies.add_argument("--dense", action="store_true", help="beside them, nothing evicted")
    add_text_arguments(parser.add_argument_group("the text whose perplexity is taken, as long as a stream"))
    how = parser.add_argument_group("how it is measured")
    add_threads_argument(how)
    add_store_argument(how)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir",
        type=Path,
        default=Path("results/recall"),
        metavar="DIR",
        help="where the files go (results/recall)",
    )
    output.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")


def run(arguments: argparse.Namespace) -> int:
    if arguments.length < 64:
        raise UsageError(f"length {arguments.length}: must be >= 64 tokens")
    if arguments.max_eval_tokens is None:
        arguments.max_eval_tokens = arguments.length
    text_source(arguments)
    asked_policies(arguments, arguments.total_kv or [2**20])  # what cannot be meant, before a model is loaded
    folder = arguments.output_dir
    make_room(folder / "recall.csv")

    import pandas as pd

    from ..engine.loading import load_tokenizer
    from ..explain.recall import asked_stream
    from ..explain.recall_figure import draw_recall
    from ..measuring.quality import NonFiniteLossError

    loaded, text = load_asked(arguments)
    policies = asked_policies(arguments, arguments.total_kv or [usual_total(loaded)])
    tokenizer = load_tokenizer(arguments.model)
    with working("writing the streams"):
        asked = [asked_stream(task, arguments.length, tokenizer, arguments.seed) for task in arguments.task]
    try:
        with messages_on_stderr():
            found = [_measured(policy, loaded, asked, text, arguments.store) for policy in policies]
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    record = _subject(arguments, loaded, text) | {"policies": [policy for policy, _ in found]}
    pd.DataFrame([line for _, lines in found for line in lines]).to_csv(folder / "recall.csv", index=False)
    draw_recall(record["policies"], _title(record), folder / "recall.png")
    (folder / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    say(json.dumps(record) if arguments.json else f"{report(record)}\n\nfiles: {folder}/{', '.join(_FILES)}")
    return 0


def asked_policies(arguments: argparse.Namespace, totals: list[int]) -> list[EvictionPolicy]:
    """Every combination of the knobs' values. Raises PolicyError, and UsageError where both the total and the window
    are given."""
    if arguments.total_kv and arguments.window_size:
        raise UsageError(
            f"window_size {arguments.window_size[0]}, total_kv {arguments.total_kv[0]}: give one of the two"
        )
    names = [knob.name for knob in POLICY_KNOBS if knob.name != "window_size"] + [
        name for name in WORDS if name not in FORMS
    ]
    values = [getattr(arguments, name) or [FIELDS[name].usual] for name in names]
    found = []
    for total, *knobs in itertools.product(arguments.window_size or totals, *values):
        policy = EvictionPolicy(window_size=1, **dict(zip(names, knobs, strict=True)))
        if arguments.window_size:
            policy = EvictionPolicy(**asdict(policy) | {"window_size": total})
        found.append(policy if arguments.window_size else with_derived_window(policy, total))
    if arguments.dense:
        found.append(EvictionPolicy(n_sink=0, window_size=1, compress_every=0))
    return list(dict.fromkeys(found))


def _measured(
    policy: EvictionPolicy, loaded: "LoadedModel", asked: "list[AskedStream]", text: "TokenStream", store: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A policy's part of the result, and a record for each of its questions."""
    from ..explain.recall import after_prunes, answers, by_octave, by_position, prunes_apart, summary
    from ..measuring import plans
    from ..measuring.cache_size import peak_bytes

    what, name = Configuration("ring", policy), _name(policy)
    tasks, lines = {}, []
    for one in asked:
        measurements = measurements_beside(policy, loaded, one.stream, store)
        with working(f"{one.task}, {name}") as progress:
            table = measurements.run(plans.hits(what), progress=progress).losses
        assert table is not None
        records = answers(one, table, policy)
        parts = {f"by_{of}": by_octave(records, of) for of in ("distance", "place")}
        tasks[one.task] = summary(records) | parts
        lines += [{"task": one.task, "policy": name, **record} for record in records]
    n_queries = max(len(one.stream.tokens) for one in asked) - 1
    peak = peak_kv(policy, n_queries)
    losses = _losses(policy, loaded, text, store)
    pruned = []
    if prunes_apart(policy, len(losses)):
        reference = replace(strict_policy(policy.kept), positions=policy.positions)
        pruned = after_prunes(losses, _losses(reference, loaded, text, store), policy)
    return {
        "name": name,
        **asdict(policy),
        "peak_kv": peak,
        "peak_kv_mib": peak_bytes(what, loaded.kv_layers, loaded.dtype_name, peak, policy, n_queries) / 2**20,
        "tasks": tasks,
        "perplexity_by_position": by_position(losses),
        "after_prunes": pruned,
    }, lines


def _losses(policy: EvictionPolicy, loaded: "LoadedModel", text: "TokenStream", store: Path) -> "np.ndarray":
    """(n, 2): position, nats; out of the store if they are there."""
    with working(f"text, {_name(policy)}") as progress:
        return measurements_beside(policy, loaded, text, store).quality(Configuration("ring", policy), progress).losses


def _name(policy: EvictionPolicy) -> str:
    if not policy.compress_every:
        return "nothing evicted"
    unsaid = {"cache_slack": 0, "max_drop": 0}
    return knobs_in_short({name: value for name, value in asdict(policy).items() if unsaid.get(name) != value}, True)


def _subject(arguments: argparse.Namespace, loaded: "LoadedModel", text: "TokenStream") -> dict[str, Any]:
    return {
        "model": loaded.name,
        "model_digest": loaded.digest,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "trained_length": loaded.trained_length,
        "length": arguments.length,
        "seed": arguments.seed,
        "dataset": text.label,
        "text_digest": text.digest,
        "n_tokens": len(text.tokens),
    }


def _title(record: dict[str, Any]) -> str:
    trained = f", trained on {record['trained_length']}" if record["trained_length"] else ""
    return f"{record['model']}, {record['dtype']}{trained}; streams of {record['length']} tokens, seed {record['seed']}"


def report(record: dict[str, Any]) -> str:
    """A table for each task: recall in percent, a column for each octave of distances."""
    lines = [
        _title(record),
        "recall in %; in brackets where nothing asked for was whole in the cache, with ~ where not all of it was",
    ]
    policies = record["policies"]
    width = max(len(policy["name"]) for policy in policies) + 2
    for task in policies[0]["tasks"]:
        of = "place" if TASKS[task].asked == "first" else "distance"
        ends = sorted({point["to"] for policy in policies for point in policy["tasks"][task][f"by_{of}"]})
        lines += ["", f"{task}: {TASKS[task].about}; {policies[0]['tasks'][task]['questions']} questions"]
        headers = "".join(f"{end:>7}" for end in ends)
        lines.append(f"{f'{of} up to':{width}}{headers}{'all [95%]':>18}{'nats':>7}")
        for policy in policies:
            lines.append(f"{policy['name']:{width}}{_cells(policy['tasks'][task], of, ends)}")
    lines += ["", f"perplexity along {record['dataset']}, {record['n_tokens']} tokens, by quarters"]
    for policy in policies:
        logs = [math.log(part["perplexity"]) for part in policy["perplexity_by_position"]]
        quarters = [math.exp(fmean(logs[len(logs) * at // 4 : len(logs) * (at + 1) // 4])) for at in range(4)]
        lines.append(f"{policy['name']:{width}}" + "".join(f"{value:>8.2f}" for value in quarters))
    return "\n".join(lines)


def _cells(task: dict[str, Any], of: str, ends: list[int]) -> str:
    points = {point["to"]: point for point in task[f"by_{of}"]}
    shown = "".join(f"{_cell(points[end]) if end in points else '':>7}" for end in ends)
    every = f"{100 * task['recall']:.0f} [{100 * task['recall_low']:.0f}, {100 * task['recall_high']:.0f}]"
    return f"{shown}{every:>18}{task['answer_loss']:>7.2f}"


def _cell(point: dict[str, Any]) -> str:
    recall = f"{100 * point['recall']:.0f}"
    if point["cached"] == 1:
        return recall
    return f"({recall})" if point["cached"] == 0 else f"{recall}~"
