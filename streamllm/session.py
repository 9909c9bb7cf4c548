"""Shared by the measuring commands: loading model and text, finding the baseline, talking to the terminal."""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import sample_size, text_source
from .baseline import as_baseline, average, baseline_policy
from .configuration import Configuration
from .errors import UsageError
from .progress import working
from .results.schema import AnyRow, Row

if TYPE_CHECKING:
    import numpy as np

    from .baseline import Measured
    from .measurements import Measurements
    from .model import LoadedModel
    from .policy import EvictionPolicy
    from .quality import QualityComparison
    from .sample import SampleSize
    from .text import TokenStream


BASELINE_SEC = 300.0
"""For which a command samples the baseline, unless told otherwise."""


def load_model_and_text(arguments: argparse.Namespace) -> tuple[LoadedModel, TokenStream]:
    """Raises UsageError."""
    from .device import limit_threads
    from .models import load_model, load_tokenizer
    from .text import load_tokens

    source = text_source(arguments)
    limit_threads(arguments.threads)
    with messages_on_stderr(), working(f"loading {arguments.model}"):
        loaded = load_model(arguments.model, arguments.dtype, quantization=arguments.quantization)
    with working(f"reading {source.label}"):
        tokenizer = None if source.token_ids is not None else load_tokenizer(arguments.model)
        return loaded, load_tokens(source, tokenizer, loaded.vocabulary)


def open_measurements(
    arguments: argparse.Namespace, policy_of: Callable[[LoadedModel], EvictionPolicy]
) -> tuple[Measurements, EvictionPolicy]:
    """Loads model and text; what they are asked about is the policy, completed by what the model allows. Raises
    UsageError."""
    from .measurements import Measurements
    from .store import MeasurementStore

    loaded, stream = load_model_and_text(arguments)
    policy = policy_of(loaded)
    protocol = getattr(arguments, "protocol", "fast")
    total = baseline_policy(policy, protocol, loaded.trained_length).kept
    return Measurements(MeasurementStore(arguments.store), loaded, stream, total), policy


def compare_quality(
    measurements: Measurements, protocol: str, baseline: np.ndarray | None = None
) -> QualityComparison | None:
    """With strict StreamingLLM at every token, and the baseline's losses where there are any; None by chunks, where a
    policy's losses are not those of a stream, and where the reference's overflow."""
    from .quality import NonFiniteLossError, QualityComparison

    if protocol == "chunked":
        return None
    try:
        return QualityComparison(_strict_losses(measurements), baseline)
    except NonFiniteLossError as error:
        warnings.warn(f"not compared with strict StreamingLLM: {error}", stacklevel=2)
        return None


def _strict_losses(measurements: Measurements) -> np.ndarray:
    """Raises NonFiniteLossError."""
    with working("strict StreamingLLM") as progress:
        strict, _ = measurements.strict(progress=progress)
    assert strict.losses is not None
    return strict.losses


def measure_baseline(
    measurements: Measurements, arguments: argparse.Namespace, policy: EvictionPolicy, only_stored: bool
) -> Measured | None:
    """The fixed baseline, the mean of all its runs in the store; of what is not there, the first `--runs` are measured,
    unless only what is stored is wanted: then None if there is nothing."""
    runs = baseline_runs(measurements, arguments, policy, only_stored)
    return average(runs) if runs else None


def baseline_runs(
    measurements: Measurements, arguments: argparse.Namespace, policy: EvictionPolicy, only_stored: bool
) -> list[Measured]:
    """Every run of the fixed baseline: all that are stored, and of the first `--runs` those that are not."""
    from .evaluation import identity

    loaded, stream, protocol = measurements.loaded, measurements.stream, arguments.protocol
    size = None if only_stored or protocol != "fast" else baseline_size(measurements, arguments.baseline_tokens)
    fixed = baseline_policy(policy, protocol, loaded.trained_length)
    what = Configuration("recompute", fixed, arguments.attn_backend)
    wanted = 0 if only_stored else getattr(arguments, "runs", 1)
    runs: list[Measured] = []
    for number in itertools.count():
        stored = measurements.find(protocol, what, run=number)
        if stored is None and number >= wanted:
            return runs
        if stored is not None and (only_stored or protocol != "fast"):
            measurement, fresh = stored, False
        else:
            with working(
                "baseline" if wanted == 1 else f"baseline, run {number + 1} of {wanted}", "timing"
            ) as progress:
                measurement, fresh = measurements.whole(
                    protocol, what, strict=arguments.strict, progress=progress, run=number, size=size
                )
        losses = measurement.losses
        assert losses is not None
        record = Row.of(identity(loaded, stream, "recompute", fixed, protocol) | measurement.record)
        record = as_baseline(record, losses, compare_quality(measurements, protocol, losses))
        runs.append((record | {"reference_total": measurements.total, "reused": not fresh}, losses))
    raise AssertionError("unreachable: the store is finite")


def baseline_size(measurements: Measurements, tokens: str) -> SampleSize:
    """How large the baseline's sample has to become, by `--baseline-tokens`. Raises UsageError."""
    from .quality import NonFiniteLossError
    from .sample import LEAST_TOKENS, AutoSize, FixedSize

    count = sample_size(tokens)
    if count is not None:
        return FixedSize(count or len(measurements.stream.tokens))
    try:
        return AutoSize(_strict_losses(measurements), BASELINE_SEC)
    except NonFiniteLossError:  # said when qualities are compared
        return FixedSize(LEAST_TOKENS)


def make_room(*files: Path | None) -> None:
    """Creates the folders that output files are to lie in. Raises UsageError."""
    for file in files:
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"output {str(file)!r}: its folder cannot be made ({error.strerror})") from error


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Warnings as one line each, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


def report(result: Mapping[str, AnyRow]) -> str:
    """The objects of a result side by side, a line per value."""
    names = dict.fromkeys(name for record in reversed(list(result.values())) for name in record)
    lines = [f"{'':28}" + "".join(f"{column:24}" for column in result)] if len(result) > 1 else []
    for name in names:
        values = (record.get(name, "") for record in result.values())
        shown = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
        lines.append((f"{name:28}" + "".join(f"{value[:23]:24}" for value in shown)).rstrip())
    return "\n".join(lines)
