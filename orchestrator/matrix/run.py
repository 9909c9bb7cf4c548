"""Runs a matrix: its cells one after another in this process, each into a JSON file; then its tables and figures.

A cell that is finished is never measured again; one that fails leaves its reason in its file and the others in peace.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from streamllm.configuration import Configuration
from streamllm.errors import UnavailableError, UnsupportedModelError, UsageError
from streamllm.evaluating import compare_quality
from streamllm.files import write_atomically
from streamllm.measuring.baseline import as_baseline, baseline_policy, compared
from streamllm.measuring.reference_time import with_times
from streamllm.results.schema import Row
from streamllm.results.study_folder import StudyFolder
from streamllm.terminal.printing import say

from ..ending import WORDS, Ending
from ..workers.lease import leases_on, study_lease
from .plan import Document, MatrixPlan, MatrixRequest, Outcome, Planned, cost, describe, make_plan

if TYPE_CHECKING:
    from streamllm.engine.model import LoadedModel
    from streamllm.measuring.baseline import Measured
    from streamllm.measuring.measurements import Measurements
    from streamllm.measuring.text import TextSource, TokenStream
    from streamllm.measuring.timing import Reference

_TITLES = {"wikitext": "WikiText-103", "pg19": "PG19"}
_FORMATS = ("md", "csv", "latex")
_TOLD = {"dataset", "protocol", "method", "attn_backend", "execution"}
"""Axes that the source documents' figures tell apart."""


class _SpoiledError(RuntimeError):
    """Nothing can be measured by this process any more."""


def run_matrix(request: MatrixRequest, dry_run: bool, ending: Ending) -> int:
    """The exit code: 1 if a cell failed. Raises UsageError."""
    plan = make_plan(request)
    if dry_run:
        say(describe(plan))
        return 0
    plan.folder.mkdir(parents=True, exist_ok=True)
    with study_lease(StudyFolder(plan.folder)):
        code = _measure_all(plan, plan.documents(), ending)
        documents = plan.documents()
        _conclude(plan, [documents[planned.file] for planned in plan.cells if planned.file in documents])
    return code


def _measure_all(plan: MatrixPlan, documents: dict[Path, Document], ending: Ending) -> int:
    from streamllm.terminal.output import messages_on_stderr

    finished = {file for file, document in documents.items() if document["state"] == "complete"}
    left = [planned for planned in plan.cells if planned.file not in finished]
    left.sort(key=_by_model(left))
    _info(f"{plan.name}: {len(plan.cells)} cells, {len(finished)} of them finished; total KV {plan.cap}")
    bench = _Bench(plan, documents)
    try:
        with messages_on_stderr():
            for number, planned in enumerate(left, len(plan.cells) - len(left) + 1):
                _info(f"[{number}/{len(plan.cells)}] running experiment: {_title(plan, planned)}")
                documents[planned.file] = _attempt(bench, planned)
                _write(planned.file, documents[planned.file])
                _say_outcome(plan, planned, documents[planned.file])
                if number < len(plan.cells):
                    _info(f"left: {cost(left[number - len(finished) :], documents)}")
    except _SpoiledError as error:
        _info(f"the accelerator can compute nothing more ({error}); the same command goes on from here")
        return 1
    except KeyboardInterrupt:
        ending.was_heard()
        _info(WORDS)
        return ending.exit_code
    return int(any(document["state"] == "failed" for document in documents.values()))


def _by_model(cells: Sequence[Planned]) -> Callable[[Planned], int]:
    """Sorts by model as loaded, in the order of first appearance: each is loaded once."""
    order = list(dict.fromkeys((planned.cell.dtype, planned.cell.quantization) for planned in cells))
    return lambda planned: order.index((planned.cell.dtype, planned.cell.quantization))


def _attempt(bench: _Bench, planned: Planned) -> Document:
    """The cell's file, whatever became of it. Raises what no other cell would survive either."""
    import torch

    from streamllm.engine.device import empty_cache
    from streamllm.measuring.store import StoreError

    started = time.monotonic()
    try:
        outcome = bench.measure(planned)
    except (UnavailableError, UnsupportedModelError) as error:
        outcome = {"state": "unavailable", "reason": str(error)}
    except (StoreError, _OtherMachineError):
        raise
    except torch.AcceleratorError as error:
        raise _SpoiledError(str(error).splitlines()[0]) from None
    except Exception as error:  # whatever libraries raise is this cell's
        reason = " ".join(str(error).split())[:500]
        outcome = {"state": "failed", "reason": reason if isinstance(error, UsageError) else _named(error, reason)}
    gc.collect()
    empty_cache()
    from ..configuration import commit

    return {
        "cell": planned.file.stem,
        **outcome,
        "settings": planned.settings,
        "measured_sec": time.monotonic() - started,
        "finished_at": time.time(),
        "commit": commit(),
    }


def _named(error: Exception, reason: str) -> str:
    return f"{type(error).__name__}: {reason}"


class _OtherMachineError(UsageError):
    """Results of another model, text or machine are in the folder."""


@dataclass
class _Bench:
    """The model that is loaded, and the texts; a cell that needs another model replaces it."""

    plan: MatrixPlan
    documents: dict[Path, Document]
    _loaded: LoadedModel | None = None
    _of: tuple[str, str] | None = None
    _references: dict[int, list[Reference]] = field(default_factory=dict)
    """The references by the total that they hold."""
    _texts: dict[TextSource, TokenStream | Exception] = field(default_factory=dict)

    def measure(self, planned: Planned) -> Outcome:
        """Raises whatever the libraries raise, and UsageError where a cell cannot be measured here."""
        from streamllm.engine.methods import check_execution, check_protocol

        cell = planned.cell
        check_protocol(cell.method, cell.protocol)
        check_execution(cell.method, cell.execution)
        measurements = self._measurements(planned)
        _check_same(planned, measurements, self.documents)
        _info("  evaluating the baseline...")
        baseline = _baseline(measurements, planned)
        _info(f"  baseline {_numbers(baseline[0])}")
        common: Outcome = {
            "state": "complete",
            "backend": baseline[0]["backend"],
            "dataset": planned.source.label,
            "protocol": cell.protocol,
        }
        if cell.method == planned.baseline:
            return {**common, "baseline": with_times([baseline[0]])[0].to_json()}
        _info(f"  evaluating {_method(cell.method)}...")
        streaming = _streaming(measurements, planned, baseline)
        _info(f"  {_method(cell.method)} {_numbers(streaming)}")
        both = with_times([baseline[0], streaming])
        return {
            **common,
            "backend": streaming["backend"],
            "speedup": streaming["speedup"],
            "baseline": both[0].to_json(),
            "streaming": both[1].to_json(),
        }

    def _measurements(self, planned: Planned) -> Measurements:
        from streamllm.measuring.measurements import Measurements
        from streamllm.measuring.store import MeasurementStore

        loaded = self._model(planned)
        total = baseline_policy(planned.policy, planned.cell.protocol, loaded.trained_length).kept
        kept_warm = self._references.setdefault(total, [])
        return Measurements(
            MeasurementStore(self.plan.store), loaded, self._text(planned.source, loaded), total, kept_warm
        )

    def _model(self, planned: Planned) -> LoadedModel:
        from streamllm.engine.device import limit_threads
        from streamllm.engine.loading import load_model
        from streamllm.terminal.progress import working

        wanted = planned.cell.dtype, planned.cell.quantization
        if self._loaded is None or self._of != wanted:
            self._loaded = None
            self._references.clear()
            limit_threads(self.plan.threads)
            with working(f"loading {planned.model}"):
                self._loaded = load_model(planned.model, planned.cell.dtype, quantization=planned.cell.quantization)
            self._of = wanted
        return self._loaded

    def _text(self, source: TextSource, loaded: LoadedModel) -> TokenStream:
        """Read once; one that cannot be had is not tried again."""
        from streamllm.engine.loading import load_tokenizer
        from streamllm.measuring.text import load_tokens

        if source not in self._texts:
            try:
                tokenizer = None if source.token_ids is not None else load_tokenizer(loaded.name)
                self._texts[source] = load_tokens(source, tokenizer, loaded.vocabulary)
            except UsageError as error:
                self._texts[source] = error
        stream = self._texts[source]
        if isinstance(stream, Exception):
            raise stream
        return stream


def _check_same(planned: Planned, measurements: Measurements, documents: dict[Path, Document]) -> None:
    """Raises _OtherMachineError if finished cells are of another model, text, device, number of threads or version of a
    library than this one will be."""
    from streamllm.measuring.conditions import kind_of_worker

    now = {
        **kind_of_worker(measurements.loaded.device),
        "model_digest": measurements.loaded.digest,
        "text_digest": measurements.stream.digest,
    }
    for file, document in documents.items():
        settings = document["settings"]
        alike = {"source": planned.settings["source"], "dtype": planned.cell.dtype}
        alike["quantization"] = planned.cell.quantization
        if document["state"] != "complete" or any(settings.get(name) != value for name, value in alike.items()):
            continue
        for name, value in now.items():
            if (before := document["baseline"].get(name, value)) != value:  # an older one does not say with what
                raise _OtherMachineError(
                    f"{file} has {name} {before!r}, now it is {value!r}: one table is of one model, text, device, "
                    f"number of threads and set of versions; give another --study, or remove the file"
                )


def _baseline(measurements: Measurements, planned: Planned) -> Measured:
    cell, policy = planned.cell, planned.policy
    if planned.baseline == "recompute":
        policy = baseline_policy(policy, cell.protocol, measurements.loaded.trained_length)
    what = Configuration(planned.baseline, policy, cell.attn_backend)
    record, losses = _evaluate(measurements, cell.protocol, what)
    return as_baseline(record, losses, compare_quality(measurements, cell.protocol, losses)), losses


def _streaming(measurements: Measurements, planned: Planned, baseline: Measured) -> Row:
    cell = planned.cell
    what = Configuration(cell.method, planned.policy, cell.attn_backend, cell.execution)
    record, losses = _evaluate(measurements, cell.protocol, what)
    comparison = compare_quality(measurements, cell.protocol, baseline[1])
    return record | compared(record, losses, baseline, comparison)


def _evaluate(measurements: Measurements, protocol: str, what: Configuration) -> Measured:
    """The measurement, from the store if it is there."""
    from streamllm.evaluating import baseline_size
    from streamllm.measuring.evaluation import identity
    from streamllm.terminal.progress import working

    size = baseline_size(measurements, None) if protocol == "fast" else None
    with working(what.method, "timing") as progress:
        measurement, fresh = measurements.whole(
            protocol,
            what,
            progress=progress,
            leases=leases_on(measurements.loaded.device.type),
            size=size,
        )
    assert measurement.losses is not None
    record = identity(measurements.loaded, what, measurements.stream, protocol)
    more = {"reused": not fresh, "reference_total": measurements.total}
    return Row.of(record | measurement.record | more), measurement.losses


def _write(file: Path, document: Document) -> None:
    """Atomically. Raises UsageError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); the same command goes on from here") from error


def _conclude(plan: MatrixPlan, documents: Sequence[Document]) -> None:
    """Tables, on stdout too, and figures."""
    from dashboards.figures import write_figures
    from dashboards.pareto import show, write
    from dashboards.tables.matrix_tables import FIGURES, matrix_figures, matrix_rows, matrix_tables

    if not documents:
        return
    columns = {protocol: plan.matrix.shown(protocol) for protocol in ("fast", "decode-loop", "chunked")}
    paths = []
    for suffix, table in matrix_tables(plan.matrix.name, plan.matrix.description, documents, columns).items():
        show(table, "\n".join((table.title, *table.summary)), (*table.notes, ""))
        paths += write(table, _FORMATS, plan.folder, f"{plan.matrix.name}{suffix}")
    if set(plan.matrix.varying()) <= _TOLD:
        rows = [row for row in matrix_rows(documents) if row["state"] == "complete"]
        paths += write_figures([], plan.folder, ("png",), rows, only=FIGURES).paths
    paths += matrix_figures(plan.matrix.name, documents, columns, plan.folder)
    missing = Counter(document["state"] for document in documents if document["state"] != "complete")
    if missing:
        states = ", ".join(f"{count} {state}" for state, count in missing.items())
        say(f"not measured: {states}, of {len(plan.cells)} cells; the same command tries them again")
    say(f"results   {plan.folder / 'results'}")
    say(" ".join(("written  ", *(str(path.relative_to(plan.folder)) for path in paths))))


def _say_outcome(plan: MatrixPlan, planned: Planned, document: Document) -> None:
    title = _title(plan, planned)
    if document["state"] != "complete":
        _info(f"✗ {document['state']}: {title}: {document['reason']}")
        return
    result = document["streaming"] if "streaming" in document else document["baseline"]
    if "warning" in result:
        _info(f"  warning: {result['warning']}")
    speedup = f" (speedup: {document['speedup']:.2f}x)" if "speedup" in document else ""
    _info(f"✓ experiment done: {title}{speedup}")


def _title(plan: MatrixPlan, planned: Planned) -> str:
    """A title that tells the cell from the others."""
    spoken = {"attn_backend": "Backend"}
    axes = (["configuration"] if plan.matrix.configurations else []) + list(plan.matrix.axes)
    axes = [axis for axis in axes if axis in plan.matrix.varying() and axis != "dataset"]
    values = [f"{spoken.get(axis, axis)}: {getattr(planned.cell, axis)}" for axis in axes]
    label = planned.source.label
    return f"{_TITLES.get(label, label)}" + (f" ({', '.join(values)})" if values else "")


def _numbers(record: Row) -> str:
    time_of = f"{record['measured_tpot_ms']:.2f} ms/token"
    if record["protocol"] != "fast":  # whose runtime is that of measuring
        time_of = f"Runtime: {record['runtime_sec']:.4g}s"
    return f"PPL: {record['perplexity']:.2f}, {time_of}{' (from the store)' * record['reused']}"


def _method(method: str) -> str:
    return {"ours": "StreamingLLM", "mit": "StreamingLLM (MIT)"}.get(method, method)


def _info(message: str) -> None:
    say(f"[INFO] {message}", sys.stderr)
