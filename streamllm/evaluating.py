"""One evaluation, from names to a typed result: what `python -m streamllm evaluate` does, from Python too."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .configuration import Configuration
from .errors import UsageError, shown
from .measuring.baseline import as_baseline, average, baseline_policy, compared, row_of, sampled, with_bytes
from .measuring.reference_time import with_times
from .measuring.text import TextSource
from .options import DTYPES, EXECUTIONS, PROTOCOLS, QUANTIZATIONS
from .results.schema import Row
from .terminal.progress import working

if TYPE_CHECKING:
    import numpy as np

    from .engine.model import LoadedModel
    from .measuring.baseline import Measured
    from .measuring.evaluation import Evaluator
    from .measuring.jobs import More
    from .measuring.measurements import Measurements
    from .measuring.quality import QualityComparison
    from .measuring.sample import SampleSize
    from .measuring.text import TokenStream
    from .policy import EvictionPolicy


STORE = Path("sweeps/.store")
"""Where measurements are kept, unless told otherwise."""
BASELINE_SEC = 300.0
"""For which the baseline is sampled, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """How it is measured, whatever is evaluated. Raises UsageError."""

    protocol: str = "fast"
    """One of `options.PROTOCOLS`."""
    strict: bool = False
    """An attention backend that does not run is an error, not a warning."""
    baseline_tokens: int | None = None
    """Size of the baseline's sample; 0: all; None: until it is known to 0.5%, or for `BASELINE_SEC`."""
    more: Sequence[More] = ()
    """What is measured besides, of protocol `fast`."""

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"protocol {shown(self.protocol)}: must be one of {', '.join(PROTOCOLS)}")
        if self.baseline_tokens is not None and self.baseline_tokens < 0:
            raise UsageError(f"baseline_tokens {shown(self.baseline_tokens)}: must be a whole number >= 0")
        if self.more and self.protocol != "fast":
            raise UsageError(
                f"{self.more[0]} with protocol {self.protocol!r}: it is measured by protocol fast; leave one out"
            )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate`."""

    row: Row
    losses: np.ndarray
    """(n, 2): position, and float64 nats of the token after it."""
    baseline: Row | None = None
    """The re-computation baseline, if there is one."""


def evaluate(
    what: Configuration,
    model: str = "testbed",
    source: TextSource | None = None,
    *,
    dtype: str = "auto",
    how: Measuring | None = None,
    with_baseline: bool = False,
    threads: int | None = None,
    store: Path = STORE,
) -> Evaluation:
    """What `python -m streamllm evaluate` does. model: testbed, smollm2, a folder, a .gguf file or a hub id; source:
    the embedded text unless given; threads: of a CPU (torch's default). The baseline is taken from the store, and
    measured if it is wanted and not there.

    Raises UsageError, UnsupportedModelError, TextError; NonFiniteLossError where a dtype's range is not enough."""
    from .engine.methods import check_cache, check_execution, check_protocol

    how = how or Measuring()
    check_names(what, dtype)
    check_protocol(what.method, how.protocol, dtype)
    check_execution(what.method, what.execution)
    check_cache(what.method, what.policy)
    source = source or TextSource()
    source.check()
    loaded, stream = load_model_and_text(model, source, dtype, what.quantization or "none", threads)
    return evaluate_loaded(
        measurements_beside(what.policy, loaded, stream, Path(store), how.protocol), what, how, with_baseline
    )


def check_names(what: Configuration, dtype: str) -> None:
    """Raises UsageError for a name that nothing has."""
    from .engine.backends import BACKENDS
    from .engine.methods import METHODS

    for kind, name, known in (
        ("method", what.method, METHODS),
        ("backend", what.backend, BACKENDS),
        ("execution", what.execution, EXECUTIONS),
        ("quantization", what.quantization or "none", QUANTIZATIONS),
        ("dtype", dtype, DTYPES),
    ):
        if name not in known:
            raise UsageError(f"{kind} {shown(name)}: must be one of {', '.join(known)}")


def load_model_and_text(
    model: str, source: TextSource, dtype: str = "auto", quantization: str = "none", threads: int | None = None
) -> tuple[LoadedModel, TokenStream]:
    """As `load_model_and_texts`, of one text."""
    loaded, (stream,) = load_model_and_texts(model, (source,), dtype, quantization, threads)
    return loaded, stream


def load_model_and_texts(
    model: str,
    sources: Sequence[TextSource],
    dtype: str = "auto",
    quantization: str = "none",
    threads: int | None = None,
) -> tuple[LoadedModel, list[TokenStream]]:
    """What is wrong with any is found before weights are read. Raises UsageError, UnsupportedModelError, TextError."""
    from .engine.device import limit_threads
    from .engine.loading import check_files, load_model, load_tokenizer
    from .measuring.text import check_text, load_tokens

    limit_threads(threads)
    vocabulary = check_files(model)
    wants_tokenizer = any(source.token_ids is None for source in sources)
    tokenizer = load_tokenizer(model) if wants_tokenizer else None
    for source in sources:
        check_text(source, lambda: tokenizer, vocabulary)
    with working(f"loading {model}"):
        loaded = load_model(model, dtype, quantization=quantization)
    streams = []
    for source in sources:
        with working(f"reading {source.label}"):
            streams.append(load_tokens(source, tokenizer, loaded.vocabulary))
    return loaded, streams


def measurements_beside(
    policy: EvictionPolicy, loaded: LoadedModel, stream: TokenStream, store: Path, protocol: str = "fast"
) -> Measurements:
    """The measurements at the total KV of a policy."""
    from .measuring.measurements import Measurements
    from .measuring.store import MeasurementStore

    total = baseline_policy(policy, protocol, loaded.trained_length).kept
    return Measurements.of(MeasurementStore(store), loaded, stream, total)


def evaluate_loaded(
    measurements: Measurements, what: Configuration, how: Measuring, with_baseline: bool = False
) -> Evaluation:
    """As `evaluate`."""
    from .engine.methods import check_protocol
    from .measuring.plans import comparable_batches

    check_protocol(what.method, how.protocol, measurements.loaded.dtype_name)
    runs = baseline_runs(measurements, what, how, 1 if with_baseline else 0)
    baseline = average(runs) if runs else None
    comparison = compare_quality(measurements, how.protocol, baseline[1] if baseline else None)
    batches = None
    if comparison is not None and how.protocol == "fast":
        sampled_tokens = 0 if baseline is None else len(baseline[1])
        batches = comparable_batches(sampled_tokens, measurements.total, measurements.stream) if sampled_tokens else 0
    row, losses = _measured_now(measurements, what, how, batches)
    if baseline is not None:
        row = row | compared(row, losses, baseline, comparison)
    elif comparison is not None:
        row = row | comparison.vs_strict(losses).flat("ppl_vs_strict_percent")
    n_losses = len(measurements.stream.tokens) - 1
    if comparison is not None and len(losses) < n_losses:
        row = row | sampled(losses, comparison, n_losses)
    if baseline is None:
        (row,) = with_times([row])
        return Evaluation(row, losses)
    row, beside = with_times([row, baseline[0]])
    return Evaluation(row, losses, beside)


def _measured_now(measurements: Measurements, what: Configuration, how: Measuring, batches: int | None) -> Measured:
    """Of a method that is sampled, what the store has is gone on with. batches: of the baseline's sample that
    predictions are compared with, as with strict StreamingLLM's; None: with neither."""
    from .engine.methods import sampled_losses
    from .engine.probing import runnable
    from .measuring.jobs import Job
    from .measuring.plans import with_found
    from .measuring.timing import compile_step

    loaded, stream = measurements.loaded, measurements.stream
    then = "compiling and timing" if what.execution == "compile" else "timing"
    with working(what.method, then) as progress:
        if how.protocol == "fast" and sampled_losses(what.method) is not None:
            size = baseline_size(measurements, how.baseline_tokens)
            evaluated = measurements.whole(how.protocol, what, how.strict, progress, size=size)
            record, losses = evaluated.record, evaluated.losses
        else:
            prepared = runnable(what, loaded, how.strict)
            if how.protocol == "decode-loop":
                compile_step(loaded, prepared, stream.tokens)
            evaluator: Evaluator = PROTOCOLS[how.protocol].get()
            beside = [partial(measurements.compared_with, batches)] if batches is not None else []
            quality, record = evaluator(loaded, prepared, stream, measurements.bench.reference, progress, *beside)
            losses = quality.table
        for kind in how.more:
            record = with_found(record, measurements.bench.measure(Job(kind, what), how.strict).record)
    asked = {"backend_requested": what.backend, "reference_total": measurements.total}
    row = Row.of(measurements.keys.identity(what, how.protocol) | record)
    return with_bytes(row, what, measurements.keys.conditions) | asked, losses


def compare_quality(
    measurements: Measurements, protocol: str, baseline: np.ndarray | None = None
) -> QualityComparison | None:
    """With strict StreamingLLM at every token, and the baseline's losses where there are any; None by chunks, where a
    policy's losses are not those of a stream, and where the reference's overflow."""
    from .measuring.quality import NonFiniteLossError, QualityComparison

    if protocol == "chunked":
        return None
    try:
        return QualityComparison(_strict_losses(measurements, protocol), baseline)
    except NonFiniteLossError as error:
        warnings.warn(f"not compared with strict StreamingLLM: {error}", stacklevel=2)
        return None


def _strict_losses(measurements: Measurements, protocol: str = "fast") -> np.ndarray:
    """Raises NonFiniteLossError."""
    with working("strict StreamingLLM") as progress:
        return measurements.strict(progress, keeps=protocol == "fast").losses


def baseline_runs(measurements: Measurements, beside: Configuration, how: Measuring, wanted: int = 1) -> list[Measured]:
    """Every run of the fixed baseline beside a configuration: all that are stored, and of the first `wanted` those that
    are not."""
    loaded, protocol = measurements.loaded, how.protocol
    size = None if not wanted or protocol != "fast" else baseline_size(measurements, how.baseline_tokens)
    what = Configuration("recompute", baseline_policy(beside.policy, protocol, loaded.trained_length), beside.backend)
    runs: list[Measured] = []
    for number in itertools.count():
        stored = measurements.find(protocol, what, run=number)
        if stored is None and number >= wanted:
            return runs
        if stored is not None and (not wanted or protocol != "fast"):
            run = stored
        else:
            name = "baseline" if wanted == 1 else f"baseline, run {number + 1} of {wanted}"
            with working(name, "timing") as progress:
                run = measurements.whole(protocol, what, how.strict, progress, number, size)
        losses = run.losses
        row = row_of(what, protocol, run)
        runs.append((as_baseline(row, losses, compare_quality(measurements, protocol, losses)), losses))
    raise AssertionError("unreachable: the store is finite")


def baseline_size(measurements: Measurements, tokens: int | None) -> SampleSize:
    """How large the baseline's sample has to become; tokens: as `Measuring.baseline_tokens`."""
    from .measuring.quality import NonFiniteLossError
    from .measuring.sample import LEAST_TOKENS, AutoSize, FixedSize

    if tokens is not None:
        return FixedSize(tokens or len(measurements.stream.tokens))
    try:
        return AutoSize(_strict_losses(measurements), BASELINE_SEC)
    except NonFiniteLossError:  # said when qualities are compared
        return FixedSize(LEAST_TOKENS)
