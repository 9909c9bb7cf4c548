"""What a cell measures: the plan of its jobs, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from streamllm.configuration import Configuration
from streamllm.errors import UnavailableError, UsageError
from streamllm.measuring.baseline import as_baseline, average, baseline_policy, compared, row_of
from streamllm.measuring.reference_time import with_times
from streamllm.results.schema import Row

from ..waiting import JobError
from .plan import Outcome, Planned

if TYPE_CHECKING:
    import numpy as np

    from streamllm.measuring.baseline import Measured
    from streamllm.measuring.jobs import Plan
    from streamllm.measuring.plans import Evaluated
    from streamllm.measuring.quality import QualityComparison
    from streamllm.measuring.sample import SampleSize
    from streamllm.measuring.text import TokenStream
    from streamllm.policy import EvictionPolicy

Said = Callable[[str], None]


def total_of(planned: Planned, trained_length: int | None) -> int:
    """Total KV of the reference that a cell is measured beside."""
    return baseline_policy(planned.policy, planned.cell.protocol, trained_length).kept


def baseline_of(planned: Planned, trained_length: int | None) -> EvictionPolicy:
    """The policy of what a cell is compared with."""
    if planned.baseline != "recompute":
        return planned.policy
    return baseline_policy(planned.policy, planned.cell.protocol, trained_length)


def policy_measured(planned: Planned, trained_length: int | None) -> EvictionPolicy:
    """The policy that a cell's row has, as far as it is known beforehand."""
    if planned.cell.method == planned.baseline:
        return baseline_of(planned, trained_length)
    try:
        return Configuration(planned.cell.method, planned.policy).effective
    except UsageError:  # the method can do nothing with it
        return planned.policy


def check(planned: Planned) -> None:
    """Raises UnavailableError for a method that cannot be measured in that way, UsageError for an execution that it has
    not."""
    from streamllm.engine.methods import check_execution, check_protocol

    check_protocol(planned.cell.method, planned.cell.protocol, planned.cell.dtype)
    check_execution(planned.cell.method, planned.cell.execution)


def measure(
    planned: Planned,
    text: TokenStream,
    trained_length: int | None,
    rounds: int,
    say: Said,
    kept: Callable[[Evaluated], None],
) -> Plan[Outcome]:
    """rounds: in which all times are taken again. kept: told of every result. Raises JobError."""
    from streamllm.evaluating import BASELINE_SEC
    from streamllm.measuring import plans
    from streamllm.measuring.quality import QualityComparison
    from streamllm.measuring.sample import AutoSize

    cell = planned.cell
    strict = yield from _strict(planned, text, trained_length, say)
    size = AutoSize(strict, BASELINE_SEC) if strict is not None and cell.protocol == "fast" else None

    def beside(losses: np.ndarray | None = None) -> QualityComparison | None:
        return None if strict is None else QualityComparison(strict, losses)

    what = Configuration(planned.baseline, baseline_of(planned, trained_length), cell.attn_backend)
    say("  evaluating the baseline...")
    total = total_of(planned, trained_length) if strict is not None and cell.protocol == "fast" else None
    runs = yield from _runs(planned, what, text, rounds, size, kept, total)
    baseline = average([(as_baseline(row, losses, beside(losses)), losses) for row, losses in runs])
    say(f"  baseline {numbers(baseline[0])}")
    common: Outcome = {
        "state": "complete",
        "backend": baseline[0]["backend"],
        "dataset": planned.source.label,
        "protocol": cell.protocol,
    }
    if cell.method == planned.baseline:
        return {**common, "baseline": with_times([baseline[0]])[0].to_json()}
    what = Configuration(cell.method, planned.policy, cell.attn_backend, cell.execution)
    say(f"  evaluating {method_name(cell.method)}...")
    batches = 0
    if total is not None and planned.baseline == "recompute":
        batches = plans.comparable_batches(len(baseline[1]), total, text)
    runs = yield from _runs(planned, what, text, rounds, size, kept, total, batches)
    row, losses = average(runs)
    streaming = row | compared(row, losses, baseline, beside(baseline[1]))
    say(f"  {method_name(cell.method)} {numbers(streaming)}")
    both = with_times([baseline[0], streaming])
    return {
        **common,
        "backend": streaming["backend"],
        "speedup": streaming["speedup"],
        "baseline": both[0].to_json(),
        "streaming": both[1].to_json(),
    }


def _strict(planned: Planned, text: TokenStream, trained_length: int | None, say: Said) -> Plan[np.ndarray | None]:
    """Losses of strict StreamingLLM at every token, which qualities are compared through; None by chunks, where a
    policy's losses are not those of a stream, and where the reference's overflow."""
    from streamllm.measuring import plans

    if planned.cell.protocol == "chunked":
        return None
    total = total_of(planned, trained_length)
    is_fast = planned.cell.protocol == "fast"
    try:
        plan = plans.strict(total) if is_fast else plans.quality(plans.strict_configuration(total), text)
        return (yield from plan).losses
    except JobError as error:
        if "NonFiniteLossError" not in str(error):
            raise
        say(f"  warning: not compared with strict StreamingLLM: {error}")
        return None


def _runs(
    planned: Planned,
    what: Configuration,
    text: TokenStream,
    rounds: int,
    size: SampleSize | None,
    kept: Callable[[Evaluated], None],
    total: int | None,
    recomputed: int = 0,
) -> Plan[list[Measured]]:
    """The measurement and, in rounds, the same again. total, recomputed: as `plans.fast`."""
    from streamllm.measuring import plans
    from streamllm.measuring.sample import AsItIs

    found: list[Measured] = []
    for run in range(rounds + 1):
        enough = size if not rounds or size is None else AsItIs()  # rounds are about times
        evaluated = yield from plans.whole(planned.cell.protocol, what, text, run, enough, None, total, recomputed)
        kept(evaluated)
        found.append((row_of(what, planned.cell.protocol, evaluated), evaluated.losses))
    return found


def unavailable(error: Exception) -> Outcome:
    """What became of a cell that cannot be measured."""
    is_known = isinstance(error, UnavailableError) or (isinstance(error, JobError) and error.unavailable)
    return {"state": "unavailable" if is_known else "failed", "reason": " ".join(str(error).split())[:500]}


def numbers(record: Row) -> str:
    """As the source documents' logs have them."""
    time_of = f"{record['measured_tpot_ms']:.2f} ms/token"
    if record["protocol"] != "fast":  # whose runtime is that of measuring
        time_of = f"Runtime: {record['runtime_sec']:.4g}s"
    return f"PPL: {record['perplexity']:.2f}, {time_of}{' (from the store)' * record['reused']}"


def method_name(method: str) -> str:
    return {"ours": "StreamingLLM", "mit": "StreamingLLM (MIT)"}.get(method, method)
