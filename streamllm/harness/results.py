"""Results of tasks as measurements: what names them, where they are found again, and how they are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..measuring.conditions import Conditions
from ..measuring.store import Measurement, MeasurementStore, digest_of_modules
from ..results.schema import knobs_in_short
from .scoring import is_evaluated

if TYPE_CHECKING:
    from .model import StreamingLM
    from .tasks import PreparedTask

_CODE = ("explain.writing", "harness.model", "harness.scoring", "harness.tasks", "harness.writing")
"""What determines a score besides `store.MEASURING_CODE`."""


def task_key(model: StreamingLM, task: PreparedTask) -> dict[str, Any]:
    """All that determines the task's result, and nothing else: log-likelihoods depend neither on the cache
    implementation nor, unless the weights are quantized, on the hardware."""
    conditions, what, conventions = Conditions.of(model.loaded), model.what, model.conventions
    by_method = not is_evaluated(what.method) or (task.writes and conventions.decoder == "method")
    key: dict[str, Any] = {
        "kind": "task",
        **conditions.of_quality(what.method if by_method else None),
        "harness_code": digest_of_modules(*_CODE),
        "model_digest": conditions.model_digest,
        "dtype": conditions.dtype,
        "tokenizer": tokenizer_digest(model),
        **asdict(what.effective),
        "max_length": conventions.max_length,
        "add_bos_token": conventions.add_bos_token,
        "prefix_token_id": conventions.prefix_token_id,
        **task.key(),
    }
    if by_method:
        key |= {"method": what.method, "attn_backend": what.backend, "execution": what.execution}
    if task.writes:
        key |= {"decoder": conventions.decoder, "seed": conventions.seed}
    if conditions.is_quantized:
        key |= {"device": conditions.kind["device"], "cpu_capability": conditions.cpu_capability}
    return key


def tokenizer_digest(model: StreamingLM) -> str:
    """Of all that a fast tokenizer does; of another, of its vocabulary."""
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def measured(store: MeasurementStore, model: StreamingLM, task: PreparedTask) -> dict[str, Any]:
    """The task's results, with `reused`: whether the store had them."""
    key = task_key(model, task)
    if (found := store.get(key)) is not None:
        return found.record | {"reused": True}
    results = task.run(model)
    store.put(key, Measurement(results))
    return results | {"reused": False}


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several tasks or groups, as the harness' table takes them."""
    together: dict[str, Any] = {}
    for one in results:
        for part, values in one.items():
            if isinstance(values, dict):
                together[part] = together.get(part, {}) | values
    return together


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """`TASK/METRIC` and `TASK/METRIC_stderr` -> the value; of a metric after a filter, `TASK/METRIC/FILTER`."""
    found = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, comma, filtered = name.partition(",")
            if comma and isinstance(value, int | float):
                found[f"{task}/{metric}" + (f"/{filtered}" if filtered != "none" else "")] = float(value)
    return found


def facts_of(model: StreamingLM) -> dict[str, Any]:
    """The subject of a run of tasks, by the names of a row."""
    conditions, what = Conditions.of(model.loaded), model.what
    return {
        "model": conditions.model,
        "model_digest": conditions.model_digest,
        "weights": conditions.weights,
        "dtype": conditions.dtype,
        "method": what.method,
        **asdict(what.effective),
        "backend_requested": what.backend,
        "device": conditions.kind["device"],
        "threads": conditions.kind["threads"],
        "version": __version__,
    }


def title(written: Mapping[str, Any]) -> str:
    """What was run, above the table."""
    policy = knobs_in_short(written)
    how = "from the store" if written["reused"] else f"{written['requests']:,} requests in {written['seconds']:.1f} s"
    return f"{written['model']} ({written['dtype']}), {written['method']} {policy}: {how}"
