"""Decodes with a full cache under torch's profiler. Times of parts are taken under the profiler, whose own cost is
stated; on a GPU they are those of kernels, on a CPU those of operators, and what is left is idle: waiting for Python.

Writes FILE (JSON) and beside it a Chrome trace, FILE's name with .trace.json.gz, for https://ui.perfetto.dev.

examples:
python -m streamllm profile                                         the embedded model, vanilla StreamingLLM
python -m streamllm profile --method mit --attn-backend eager
python -m streamllm profile --method ring --execution compile       a compiled step is one part
python -m streamllm profile --intervals 1 16 256 --window-size 124  forward against update at other R
python -m streamllm profile --fusion                                which operators a compiled step of ring fuses
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ..configuration import Configuration
from ..errors import UsageError, shown
from ..options import EXECUTIONS
from ..policy import EvictionPolicy
from ..results.schema import knobs_in_short
from ..terminal.arguments import (
    add_backend_arguments,
    add_method_argument,
    add_model_arguments,
    add_policy_arguments,
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
    from ..engine.model import LoadedModel
    from ..explain.profiling import Profile
    from ..measuring.text import TokenStream

HELP = "where a token's time goes: kernels, parts of the model, cache update against forward"
_SHOWN_KERNELS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is profiled")
    add_model_arguments(what)
    add_text_arguments(what)
    policy = parser.add_argument_group("the policy")
    add_method_argument(policy, "--streaming-mode", default=None)
    add_policy_arguments(policy)
    how = parser.add_argument_group("how it is run")
    add_backend_arguments(how)
    how.add_argument(
        "--execution",
        choices=EXECUTIONS,
        default="eager",
        help="how a step is run; all but eager need --method ring (eager)",
    )
    add_threads_argument(how)
    how.add_argument(
        "--intervals",
        type=int,
        nargs="*",
        default=[1, 8, 32, 64],
        metavar="R",
        help="for the table of forward against update, profile these values of --compress-every too (1 8 32 64)",
    )
    how.add_argument(
        "--fusion",
        action="store_true",
        help="instead: which operators are fused, by execution and attention kernel, with calls before and after and "
        "what each kind costs; of a method whose steps can be compiled (ring)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-file",
        "--output",
        type=Path,
        metavar="FILE.json",
        help="(results/profile_kernels/profile.json, or fusion.json)",
    )
    output.add_argument("--json", action="store_true", help="what is written to FILE on stdout, nothing else")
    add_tracking_arguments(output)


def run(arguments: argparse.Namespace) -> int:
    text_source(arguments)
    given_stream_policy(arguments)
    kind = "fusion" if arguments.fusion else "profile"
    file = arguments.output_file or Path(f"results/profile_kernels/{kind}.json")
    if file.suffix != ".json":
        raise UsageError(f"output_file {shown(str(file))}: must end in .json")
    if any(interval < 1 for interval in arguments.intervals):
        raise UsageError(f"intervals {' '.join(map(str, arguments.intervals))}: whole numbers >= 1, or none")
    make_room(file)

    from ..engine.methods import check_execution
    from ..engine.probing import runnable

    method = arguments.method or ("ring" if arguments.fusion else "ours")
    execution = "compile" if arguments.fusion else arguments.execution
    check_execution(method, execution)
    loaded, stream = load_asked(arguments)
    policy = stream_policy(arguments, loaded)
    asked = Configuration(method, policy, arguments.attn_backend, execution)
    with messages_on_stderr():
        what = runnable(asked, loaded, arguments.strict)
    if arguments.fusion:
        return _fusion(arguments, loaded, what, stream, file)
    trace = file.with_name(f"{file.stem}.trace.json.gz")

    from ..explain.profiling import profile_decoding
    from ..measuring.timing import used_backend

    tracking = Tracking(arguments, "profile")
    subject = _identity(loaded, what, stream) | {"backend_requested": arguments.attn_backend}
    with working("profiling"), tracking.measuring(subject):
        own = profile_decoding(loaded, what, stream.tokens, trace)
        others = {
            other: own if other == policy else profile_decoding(loaded, replace(what, policy=other), stream.tokens)
            for other in _others(what, arguments.intervals)
        }
    with what.kernel.active():
        backend = used_backend(loaded, what, stream.tokens)
    result = subject | {
        "backend": backend,
        **_record(own),
        "intervals": [_interval(found, other) for other, found in others.items()],
        "trace": str(trace),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps(result) if arguments.json else _report(result, file))
    tracking.log(Result(record=_tracked(result), files=[file, trace]))
    return 0


def _fusion(
    arguments: argparse.Namespace, loaded: "LoadedModel", what: Configuration, stream: "TokenStream", file: Path
) -> int:
    from ..explain.fusion import fusion_of

    tracking = Tracking(arguments, "profile")
    subject = _identity(loaded, what, stream) | {"backend_requested": arguments.attn_backend}
    with working("compiling and profiling"), tracking.measuring(subject):
        found = fusion_of(loaded, what, stream.tokens)
    compiled = next(run for run in found.runs if run.execution == "compile")
    subject |= {"backend": compiled.backend}
    result = subject | asdict(found)
    file.write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps(result) if arguments.json else _fusion_report(result, file))
    launches = {"measured_tpot_ms": compiled.tpot_ms, "launches_per_token": compiled.launches_per_token}
    tracking.log(Result(record=subject | launches, files=[file]))
    return 0


def _tracked(result: dict[str, Any]) -> dict[str, Any]:
    """For MLflow, whose `tpot_ms` are ratios in one unit: this one is by the clock. Parts' times are metrics."""
    parts = {f"parts_ms/{part}": ms for part, ms in result["parts_ms"].items()}
    return (
        {name: value for name, value in result.items() if name != "tpot_ms"}
        | parts
        | {"measured_tpot_ms": result["tpot_ms"]}
    )


def _identity(loaded: "LoadedModel", what: Configuration, stream: "TokenStream") -> dict[str, Any]:
    from ..measuring.conditions import Conditions
    from ..measuring.keys import identity

    record = identity(Conditions.of(loaded), stream, what, "fast")
    del record["protocol"]
    return record


def _others(what: Configuration, intervals: list[int]) -> list[EvictionPolicy]:
    """The policy at every interval asked for and its own; none where the method does not prune."""
    own = what.policy.compress_every
    if what.effective.compress_every != own or not intervals:
        return []
    return [replace(what.policy, compress_every=interval) for interval in sorted({*intervals, own} - {0})]


def _record(profiled: "Profile") -> dict[str, Any]:
    return {
        "tpot_ms": profiled.tpot_ms,
        "profiled_ms": profiled.profiled_ms,
        "profiler_overhead_percent": 100 * (profiled.profiled_ms / profiled.tpot_ms - 1),
        "profiled_tokens": profiled.tokens,
        "parts_ms": profiled.parts_ms | {"idle": profiled.idle_ms},
        "launches_per_token": profiled.launches,
        "kernels": [asdict(kernel) for kernel in profiled.kernels],
    }


def _interval(profiled: "Profile", policy: EvictionPolicy) -> dict[str, Any]:
    """Milliseconds per prune interval."""
    return {
        "compress_every": policy.compress_every,
        "tokens": profiled.cycle,
        "forward_ms": profiled.cycle * profiled.forward_ms,
        "update_ms": profiled.cycle * profiled.update_ms,
        "idle_ms": profiled.cycle * profiled.idle_ms,
        "update_percent": 100 * profiled.update_ms / (profiled.update_ms + profiled.forward_ms),
        "tpot_ms": profiled.tpot_ms,
    }


def _fusion_report(result: dict[str, Any], file: Path) -> str:
    called = "kernels" if result["threads"] is None else "from Python"
    lines = [
        *_subject(result),
        "",
        f"{'execution':12}{'attention':12}{'ms/token':>10}{called:>14}{'operators and fused kernels':>32}",
        *(f"{run['execution']:12}{run['backend']:12}{run['tpot_ms']:10.2f}{run['launches_per_token']:14.0f}"
          f"{run['computing_per_token']:32.0f}" for run in result["runs"]),
        "",
        f"{'kind, eager':30}{'calls/token':>12}{'ms/token':>10}{'share':>8}{'without it':>12}",
        *(f"{kind['name']:30}{kind['calls_per_token']:12.0f}{kind['ms_per_token']:10.3f}{kind['share']:8.0%}"
          f"{kind['most_speedup']:11.2f}x" for kind in result["kinds"]),
        "",
        f"{'fused by compile':30}{'calls/token':>12}{'ms/token':>10}",
    ]  # fmt: skip
    for number, kernel in enumerate(result["fused"], 1):
        lines.append(f"{f'kernel {number}':30}{kernel['calls_per_token']:12.0f}{kernel['ms_per_token']:10.3f}")
        lines += wrap(", ".join(kernel["operators"]), 100, initial_indent="  ", subsequent_indent="  ")
    for kernel in result["own"]:
        lines.append(f"{kernel['name']:30}{kernel['calls_per_token']:12.0f}{kernel['ms_per_token']:10.3f}")
    left = ", ".join(f"{kernel['name'].removeprefix('aten::')} {kernel['calls_per_token']:.0f}"
                     for kernel in result["left"])  # fmt: skip
    return "\n".join([*lines, f"called one by one still: {left or 'nothing'}", "", f"file: {file}"])


def _subject(result: dict[str, Any]) -> list[str]:
    threads = "" if result["threads"] is None else f", threads {result['threads']}"
    return [
        f"{result['model']}, {result['dtype']}, {result['device']}{threads}",
        f"{result['method']} {result['backend']} {result['execution']} {knobs_in_short(result)}",
    ]


def _report(result: dict[str, Any], file: Path) -> str:
    on_gpu = result["threads"] is None
    lines = [
        *_subject(result),
        f"{result['tpot_ms']:.2f} ms per token; {result['profiled_ms']:.2f} under the profiler "
        f"({result['profiler_overhead_percent']:+.0f}%), over {result['profiled_tokens']} tokens; "
        f"{result['launches_per_token']:.0f} {'kernels' if on_gpu else 'operators called from Python'} per token",
        "",
        f"{'part':34}{'ms/token':>10}{'share':>8}",
    ]
    for part, time in sorted(result["parts_ms"].items(), key=lambda item: (item[0] == "idle", -item[1])):
        name = f"{part} ({'of the GPU' if on_gpu else 'Python'})" if part == "idle" else part
        lines.append(f"{name:34}{time:10.3f}{time / result['profiled_ms']:8.0%}")
    lines += ["", f"{'kernel' if on_gpu else 'operator':54}{'calls/token':>12}{'ms/token':>10}{'share':>8}"]
    for kernel in result["kernels"][:_SHOWN_KERNELS]:
        calls, time = kernel["calls_per_token"], kernel["ms_per_token"]
        lines.append(f"{kernel['name'][:53]:54}{calls:12.1f}{time:10.3f}{time / result['profiled_ms']:8.0%}")
    if result["intervals"]:
        lines += [
            "",
            f"{'prune interval':>14}{'forward ms':>12}{'update ms':>11}{'share':>8}{'idle ms':>10}{'ms/token':>10}",
        ]
    for row in result["intervals"]:
        lines.append(
            f"{row['tokens']:14}{row['forward_ms']:12.2f}{row['update_ms']:11.2f}{row['update_percent']:7.0f}%"
            f"{row['idle_ms']:10.2f}{row['tpot_ms']:10.2f}"
        )
    return "\n".join([*lines, "", f"files: {file}, {result['trace']}"])
