"""Results of tasks as measurements: what names them, where they are found again, and how they are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..measuring.conditions import Conditions
from ..measuring.keys import task_key
from ..measuring.store import Measurement, MeasurementStore, digest_of_modules
from ..results.schema import STDERR, knobs_in_short
from ..version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .model import Conventions, StreamingLM
    from .tasks import PreparedTask

_CODE = ("explain.writing", "harness.model", "harness.scoring", "harness.tasks", "harness.writing")
"""What determines a score besides `store.MEASURING_CODE`."""


def asked(task: PreparedTask, tokenizer: PreTrainedTokenizerBase, conventions: Conventions) -> dict[str, Any]:
    """All that determines the task's result besides the model and its policy."""
    key = {
        **task.key(),
        "harness_code": digest_of_modules(*_CODE),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": conventions.max_length,
        "add_bos_token": conventions.add_bos_token,
        "prefix_token_id": conventions.prefix_token_id,
    }
    return key | ({"decoder": conventions.decoder, "seed": conventions.seed} if task.writes else {})


def key_of(model: StreamingLM, task: PreparedTask) -> dict[str, Any]:
    """The name of the task's result in the store."""
    writes = task.writes and model.conventions.decoder == "method"
    part = asked(task, model.tokenizer, model.conventions)
    return task_key(Conditions.of(model.loaded), model.what, part, writes)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that a fast tokenizer does; of another, of its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def results_of(model: StreamingLM, task: PreparedTask) -> dict[str, Any]:
    """The task's results, run now, with its `scores`."""
    results = task.run(model)
    return results | {"scores": scores(results)}


def measured(store: MeasurementStore, model: StreamingLM, task: PreparedTask) -> dict[str, Any]:
    """The task's results, with `reused`: whether the store had them."""
    key = key_of(model, task)
    if (found := store.get(key)) is not None:
        return found.record | {"reused": True}
    results = results_of(model, task)
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
    """`TASK/METRIC` and `TASK/METRIC_stderr` -> the value; of a metric after a filter, `TASK/METRIC/FILTER` and
    `TASK/METRIC/FILTER_stderr`."""
    found = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, comma, filtered = name.partition(",")
            if comma and isinstance(value, int | float):
                plain = metric.removesuffix(STDERR)
                parts = [task, plain, filtered] if filtered != "none" else [task, plain]
                found["/".join(parts) + STDERR * (plain != metric)] = float(value)
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
