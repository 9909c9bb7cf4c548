"""A row in MLflow's words: what of it are params, metrics and tags of a run, and the data set that it names."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING

from streamllm.results.schema import FIELDS, KNOBS, SCORE, AnyRow, knobs_in_short
from streamllm.results.study import FIXED

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

PARAMS = (*(field.name for field in KNOBS), "dtype")
TAGS = {field.name: field.tag or field.name for field in FIELDS.values() if field.mlflow == "tag"}
"""Name in a row -> tag."""
METRICS = tuple(field.name for field in FIELDS.values() if field.mlflow == "metric")


def tags_of(row: AnyRow) -> dict[str, str]:
    words = {tag: row[name] for name, tag in TAGS.items() if row.get(name) is not None}
    return {tag: str(value)[:5000] for tag, value in words.items()}


def params_of(row: AnyRow) -> dict[str, str]:
    return {name: str(row[name]) for name in PARAMS if name in row}


def metrics_of(row: AnyRow) -> dict[str, float]:
    """Measures with the ends of their intervals, and scores of tasks with their standard errors."""
    names = [f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")]
    names += [name for name in row if name.startswith(SCORE)]
    return {name: float(row[name]) for name in names if is_number(row.get(name))}


def is_number(value: object) -> bool:
    """One that MLflow takes as a metric on every store."""
    return isinstance(value, int | float) and math.isfinite(value)


def dataset_of(row: AnyRow, program: str) -> DatasetInput | None:
    """For the column "Dataset", where the row names one; nothing is read again. program: what has read it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if (name := row.get("dataset")) is None:
        return None
    tokens = row.get("n_tokens")
    digest = row.get("text_digest") or digest_of(name, str(tokens))
    source = {"tags": {"mlflow.source.name": program}}
    profile = None if tokens is None else json.dumps({"tokens": tokens})
    dataset = Dataset(str(name)[:500], digest[:36], "code", json.dumps(source), profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])


def digest_of(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()[:16]


def run_name(row: AnyRow) -> str:
    if row["trial"] in FIXED:
        return str(row["trial"])
    return f"{row['trial']:03d} {row['method']} {knobs_in_short(row)} {row['backend_requested']}"
