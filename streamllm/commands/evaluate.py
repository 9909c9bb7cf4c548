"""examples:
python -m streamllm evaluate                                        the embedded model and text, vanilla StreamingLLM
python -m streamllm evaluate --mode both                            beside the re-computation baseline, which is kept
python -m streamllm evaluate --n-sink 0                             what happens without sinks
python -m streamllm evaluate --method mit --protocol decode-loop    token by token
python -m streamllm evaluate --refresh-budget 64 --max-eval-tokens 4096                             why not to
python -m streamllm evaluate --model EleutherAI/pythia-70m --dataset-name pg19 --max-eval-tokens 20000 --json
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configuration import Configuration
from ..errors import UsageError, shown
from ..evaluating import Measuring, baseline_runs, evaluate_loaded, measurements_beside
from ..measuring.baseline import average
from ..measuring.reference_time import with_times
from ..options import EXECUTIONS
from ..policy import EvictionPolicy, RefreshPolicy
from ..results.schema import Row
from ..terminal.arguments import (
    add_measuring_arguments,
    add_method_argument,
    add_model_arguments,
    add_more_arguments,
    add_policy_arguments,
    add_sample_argument,
    add_text_arguments,
    complete_policy,
    given_policy,
    load_asked,
    measuring,
    text_source,
)
from ..terminal.output import make_room, messages_on_stderr, report
from ..terminal.printing import say
from ..terminal.refused_flags import OF_EVALUATIONS, refuse_what_is_not_done
from ..terminal.tracking import Result, Tracking, add_tracking_arguments

if TYPE_CHECKING:
    import numpy as np

    from ..measuring.measurements import Measurements

HELP = "perplexity, time per token and peak KV of one policy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is evaluated")
    add_model_arguments(what)
    add_text_arguments(what)

    policy = parser.add_argument_group("the policy")
    add_method_argument(policy, "--streaming-mode", default="ours")
    add_policy_arguments(policy)
    policy.add_argument(
        "--overlap", type=int, default=0, metavar="O", help="a prune leaves O tokens more than the window (0)"
    )
    policy.add_argument(
        "--refresh-budget",
        type=int,
        default=0,
        metavar="B",
        help="a prune puts B of the tokens it would evict back: method refresh, a negative result, by decode-loop "
        "only (0)",
    )
    policy.add_argument(
        "--refresh-policy",
        default="uniform",
        metavar="{none,uniform}",
        help="which tokens: evenly spread over all that passed by, or none, without a budget (uniform)",
    )
    policy.add_argument(
        "--refresh-position",
        choices=("tail", "order"),
        default="tail",
        help="where they are put: behind the window, or between sinks and window in the order of the text (tail)",
    )

    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--mode",
        choices=("streaming", "baseline", "both"),
        default="streaming",
        help="streaming is compared with a baseline that is already stored; both measures it if it is not (streaming)",
    )
    add_measuring_arguments(how, protocol=None)
    add_sample_argument(how, "five minutes")
    add_more_arguments(how)
    how.add_argument(
        "--execution",
        choices=EXECUTIONS,
        default="eager",
        help="how a step is run; all but eager need --method ring (eager)",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one flat JSON object on stdout, nothing else")
    output.add_argument(
        "--output-file",
        "--output",
        type=Path,
        metavar="FILE",
        help="write JSON with the objects `baseline` and `streaming`",
    )
    output.add_argument(
        "--per-token-losses",
        type=Path,
        metavar="FILE",
        help="float64 nats; .npy: element i belongs to token i + 1, else NaN; .parquet: columns token, loss",
    )
    add_tracking_arguments(output)
    refuse_what_is_not_done(parser, OF_EVALUATIONS)


def run(arguments: argparse.Namespace) -> int:
    arguments = argparse.Namespace(**vars(arguments) | {"protocol": _protocol(arguments)})
    text_source(arguments)
    given_policy(arguments)
    how = measuring(arguments)
    method = _method(arguments)
    file = arguments.per_token_losses
    if file is not None and file.suffix not in (".npy", ".parquet"):
        raise UsageError(f"per_token_losses {shown(str(file))}: must end in .npy or .parquet")
    make_room(file, arguments.output_file)

    from ..engine.device import default_device
    from ..engine.energy import energy_counter
    from ..engine.methods import check_execution, check_protocol
    from ..measuring.quality import NonFiniteLossError

    check_protocol(method, arguments.protocol, arguments.dtype)
    check_execution(method, arguments.execution)
    if arguments.energy:
        energy_counter(default_device())
    loaded, stream = load_asked(arguments)
    policy = _policy(arguments, complete_policy(arguments, loaded))
    what = Configuration(method, policy, arguments.attn_backend, arguments.execution)
    measurements = measurements_beside(policy, loaded, stream, arguments.store, how.protocol)
    tracking = Tracking(arguments, "evaluate")
    subject = measurements.keys.identity(what, how.protocol) | {"backend_requested": what.backend}
    try:
        with messages_on_stderr(), tracking.measuring(subject):
            result, losses = _measured(measurements, what, how, arguments.mode)
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.overlap and "streaming" in result:  # with the record's window_size
        result["streaming"] |= {"overlap": arguments.overlap, "same_policy_as": "overlap 0"}
    if "warning" in result.get("streaming", {}):
        print(f"warning: {result['streaming']['warning']}", file=sys.stderr)
    if file is not None:
        _write_losses(losses, len(stream.tokens) - 1, file)
    written = {role: row.to_json() for role, row in result.items()}
    if arguments.output_file is not None:
        arguments.output_file.write_text(json.dumps(written, indent=2) + "\n")
    role = "baseline" if arguments.mode == "baseline" else "streaming"
    say(json.dumps(written[role]) if arguments.json else report(result))
    tracking.log(*_runs(result, role, written, losses))
    return 0


def _runs(result: dict[str, Row], role: str, written: dict[str, Any], losses: "np.ndarray") -> list[Result]:
    """What was asked for, and the baseline if it was measured on the way."""
    documents = {"result.json": written[role], "evaluation.json": written}
    runs = [Result(record=result[role], documents=documents, losses=losses)]
    if role == "streaming" and "baseline" in result and not result["baseline"]["reused"]:
        runs.append(Result(record=result["baseline"], documents={"result.json": written["baseline"]}))
    return runs


def _protocol(arguments: argparse.Namespace) -> str:
    """The one that was asked for, or the usual one; a refreshing cache knows one only."""
    refreshes = arguments.refresh_budget or arguments.method == "refresh"
    return arguments.protocol or ("decode-loop" if refreshes else "fast")


def _method(arguments: argparse.Namespace) -> str:
    """Raises UsageError for an overlap or a refresh that cannot be meant."""
    for name in ("overlap", "refresh_budget"):
        if (value := getattr(arguments, name)) < 0:
            raise UsageError(f"{name} {value}: must be a whole number >= 0")
    if (policy := arguments.refresh_policy) not in ("none", "uniform"):
        raise UsageError(
            f"refresh_policy {shown(policy)}: tokens are put back evenly spread over all that passed by; give "
            f"uniform, or leave it out"
        )
    if not arguments.refresh_budget:
        return str(arguments.method)
    if arguments.refresh_policy == "none":
        raise UsageError(
            f"refresh_budget {arguments.refresh_budget}: refresh_policy none puts nothing back; leave one out"
        )
    if arguments.method not in ("ours", "refresh"):
        raise UsageError(
            f"refresh_budget {arguments.refresh_budget}: method {arguments.method!r} keeps a window only; "
            f"leave --method out"
        )
    return "refresh"


def _policy(arguments: argparse.Namespace, policy: EvictionPolicy) -> EvictionPolicy:
    """With what overlap and refresh keep: out of a derived window, so that the total stays, or beside a given one. An
    overlap is nothing but a wider window."""
    overlap, budget = arguments.overlap, arguments.refresh_budget
    window = policy.window_size - (overlap + budget if arguments.window_size is None else 0)
    if window < 1:
        raise UsageError(
            f"overlap {overlap} and refresh_budget {budget}: the total leaves {policy.window_size} tokens for them and "
            f"the window; lower them to {policy.window_size - 1} together at most"
        )
    policy = replace(policy, window_size=window + overlap)
    if not budget:
        return policy
    return RefreshPolicy(**asdict(policy), refresh_budget=budget, refresh_position=arguments.refresh_position)


def _measured(
    measurements: "Measurements", what: Configuration, how: Measuring, mode: str
) -> tuple[dict[str, Row], "np.ndarray"]:
    """The rows by their role, and the losses (n, 2: position, nats) of what was asked for."""
    if mode == "baseline":
        row, losses = average(baseline_runs(measurements, what, how))
        (row,) = with_times([row])
        return {"baseline": row}, losses
    found = evaluate_loaded(measurements, what, how, with_baseline=mode == "both")
    if found.baseline is None:
        print("no baseline is stored for this: --mode both measures and keeps it", file=sys.stderr)
        return {"streaming": found.row}, found.losses
    return {"baseline": found.baseline, "streaming": found.row}, found.losses


def _write_losses(table: "np.ndarray", n_losses: int, file: Path) -> None:
    """table (n, 2): position, loss."""
    import numpy as np

    if file.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame({"token": table[:, 0].astype(np.int64) + 1, "loss": table[:, 1]}).to_parquet(file, index=False)
        return
    losses = np.full(n_losses, np.nan)
    losses[table[:, 0].astype(np.int64)] = table[:, 1]
    np.save(file, losses)
