"""Losses around prunes: of each token beside the same token's under vanilla StreamingLLM that holds as much as the
policy ever does. Writes losses.csv, losses.parquet, spike.png and summary.json.

examples:
python -m streamllm diagnose                                        the embedded model and text, pruned every 32 tokens
python -m streamllm diagnose --window-size 60                       a small cache: forgetting half of it shows
python -m streamllm diagnose --compress-every 64 --n-sink 32 --cache-slack 16 --max-drop 32 --output-dir softlite
python -m streamllm diagnose --model EleutherAI/pythia-2.8b --dataset-name pg19 --max-eval-tokens 20000
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configuration import Configuration
from ..evaluating import measurements_beside
from ..policy import EvictionPolicy
from ..results.schema import knobs_in_short
from ..terminal.arguments import (
    add_model_arguments,
    add_policy_arguments,
    add_store_argument,
    add_text_arguments,
    add_threads_argument,
    given_stream_policy,
    load_asked,
    stream_policy,
    text_source,
)
from ..terminal.output import make_room, messages_on_stderr
from ..terminal.printing import say
from ..terminal.progress import working
from ..terminal.tracking import Result, Tracking, add_tracking_arguments

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ..explain.diagnosis import Spike
    from ..measuring.measurements import Measurements

HELP = "what a prune does to the losses after it: the series, the spike, a picture"
_FILES = ("losses.csv", "losses.parquet", "spike.png", "summary.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is diagnosed")
    add_model_arguments(what)
    add_text_arguments(what)
    add_policy_arguments(parser.add_argument_group("the policy; here R is 32 unless given"))
    parser.set_defaults(compress_every=32)
    how = parser.add_argument_group("how it is measured")
    add_threads_argument(how)
    add_store_argument(how)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir",
        type=Path,
        default=Path("results/diagnose_prune"),
        metavar="DIR",
        help="where the files go (results/diagnose_prune)",
    )
    output.add_argument("--json", action="store_true", help="one flat JSON object on stdout, nothing else")
    add_tracking_arguments(output)


def run(arguments: argparse.Namespace) -> int:
    text_source(arguments)
    given_stream_policy(arguments).check_uniform("diagnose")
    folder = arguments.output_dir
    make_room(folder / "losses.csv")

    from ..explain.diagnosis import check_prunes, find_spike, reference_policy, token_table
    from ..explain.diagnosis_figure import draw_diagnosis
    from ..measuring.quality import NonFiniteLossError
    from ..policy import prune_starts

    loaded, stream = load_asked(arguments)
    policy = stream_policy(arguments, loaded)
    measurements = measurements_beside(policy, loaded, stream, arguments.store)
    n_losses = len(stream.tokens) - 1
    check_prunes(policy, n_losses)
    reference = reference_policy(policy, n_losses, loaded.trained_length)
    tracking = Tracking(arguments, "diagnose")
    subject = measurements.keys.identity(Configuration("ours", policy), "fast")
    try:
        with messages_on_stderr(), tracking.measuring(subject):
            tables = [
                _losses(measurements, which, name) for which, name in ((policy, "policy"), (reference, "reference"))
            ]
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = token_table(policy, tables[0][:, 1], tables[1][:, 1])
    spike = find_spike(table["excess"].to_numpy(), prune_starts(policy, n_losses))
    record = _record(measurements, policy, reference, table, spike)
    table.to_csv(folder / "losses.csv", index=False)
    table.to_parquet(folder / "losses.parquet", index=False)
    title = f"{_title(record)}\n{record['summary']}"
    draw_diagnosis(spike, table, loaded.trained_length, title, folder / "spike.png")
    (folder / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    say(json.dumps(record) if arguments.json else _report(record, folder))
    files = [folder / name for name in _FILES]
    tracking.log(Result(record=record, description=record["summary"], files=files))
    return 0


def _losses(measurements: "Measurements", policy: EvictionPolicy, name: str) -> "np.ndarray":
    """(n, 2): position, nats; out of the store if they are there."""
    with working(name) as progress:
        return measurements.quality(Configuration("ours", policy), progress).losses


def _record(
    measurements: "Measurements",
    policy: EvictionPolicy,
    reference: EvictionPolicy,
    table: "pd.DataFrame",
    spike: "Spike",
) -> dict[str, Any]:
    from ..explain.diagnosis import in_words
    from ..measuring.quality import paired_increase, perplexity

    loaded = measurements.loaded
    own, theirs = (table[["token", name]].to_numpy() for name in ("loss", "reference_loss"))
    return {
        **measurements.keys.identity(Configuration("ours", policy), "fast"),
        "reference_total": reference.kept,
        "peak_kv": int(table["keys"].max()),
        "trained_length": loaded.trained_length,
        **perplexity(own[:, 1]).flat("perplexity"),
        **perplexity(theirs[:, 1]).flat("reference_perplexity"),
        **paired_increase(own, theirs).flat("ppl_increase_percent"),
        "prunes": int(table["prune"].sum()),
        "averaged_prunes": spike.prunes,
        "interval": spike.interval,
        **spike.level.flat("level_before_nats"),
        **spike.jump.flat("jump_nats"),
        **spike.peak.flat("peak_nats"),
        "peak_at": spike.peak_at,
        "peak_tokens": spike.peak_tokens,
        **spike.area.flat("area_nats"),
        **(spike.width.flat("width_tokens") if spike.width is not None else {"width_tokens": None}),
        "summary": in_words(spike, int(table["keys"].max()), loaded.trained_length),
    }


def _title(record: dict[str, Any]) -> str:
    return (
        f"{record['model']} on {record['dataset']}, {record['dtype']}: {knobs_in_short(record)}; "
        f"reference: S={record['n_sink']} W={record['reference_total'] - record['n_sink']} R=1"
    )


_ROWS = {
    "level_before_nats": "before a prune, nats above the reference",
    "jump_nats": "first token after it, nats above that",
    "peak_nats": "highest {peak_tokens} tokens after it, nats above that",
    "area_nats": "area until the next prune, nats",
    "width_tokens": "width (area / peak), tokens",
    "ppl_increase_percent": "perplexity above the reference's, %",
}


def _report(record: dict[str, Any], folder: Path) -> str:
    rows = [f"{'':50}{'value':>9}  95% interval"]
    for name, words in _ROWS.items():
        label = words.format(**record)
        if record[name] is None:
            rows.append(f"{label:50}{'-':>9}  no spike, no width")
        else:
            low, high = record[f"{name}_low"], record[f"{name}_high"]
            rows.append(f"{label:50}{record[name]:9.4f}  [{low:.4f}, {high:.4f}]")
    return "\n".join(
        [
            _title(record),
            f"{record['prunes']} prunes in {record['n_tokens'] - 1} tokens, {record['interval']} apart at least; "
            f"up to {record['peak_kv']} keys; perplexity {record['perplexity']:.4g}, "
            f"reference {record['reference_perplexity']:.4g}",
            "",
            record["summary"],
            "",
            *rows,
            "",
            f"files: {folder}/{', '.join(_FILES)}",
        ]
    )
