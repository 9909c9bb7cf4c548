"""Tasks as jobs of a sweep: what is asked of all configurations alike, and how a worker measures it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration import Configuration
from ..engine.loading import load_tokenizer, resolve_model
from ..engine.methods import is_evaluated
from ..engine.model import LoadedModel
from ..errors import UsageError, shown
from ..measuring.jobs import TaskAsked
from ..results.schema import OBJECTIVES, SCORE
from .model import Conventions, StreamingLM
from .results import asked, results_of
from .tasks import PreparedTask, TaskOptions, Tasks

_CONVENTIONS = Conventions(decoder="evaluator")
"""Scores are of policies, as perplexities are: the evaluator writes, where it computes the same as the method."""


def tasks_asked(wanted: tuple[str, ...], put: Mapping[str, Any], model: str) -> tuple[TaskAsked, ...]:
    """The tasks that these scores are of, their documents read; put: by names of `TaskOptions`. Raises UsageError for
    what no task has."""
    names = list(dict.fromkeys(score.split("/")[1] for score in wanted))
    options = json.dumps(dict(put), sort_keys=True)
    tokenizer = load_tokenizer(model)
    tasks = Tasks(names, _options(options), tokenizer, resolve_model(model))
    found = []
    for name in names:
        task = tasks.prepared(name)
        _check_metrics(task, [score for score in wanted if score.split("/")[1] == name])
        found.append(TaskAsked(name, options, json.dumps(asked(task, tokenizer, _CONVENTIONS), sort_keys=True)))
    return tuple(found)


def _check_metrics(task: PreparedTask, wanted: list[str]) -> None:
    """Raises UsageError for a metric that the task has not, or that is better the other way round. What groups come to
    is known at the end only."""
    leaf = task.found["tasks"].get(task.name)
    if leaf is None:
        return
    known: Mapping[str, bool] = leaf.higher_is_better()
    for score in wanted:
        metric = score.removeprefix(SCORE).split("/")[1]
        if metric not in known:
            raise UsageError(f"metric {shown(metric)}: not one of task {task.name!r}, which has {', '.join(known)}")
        if known[metric] is not None and known[metric] != (OBJECTIVES[score] == "maximize"):
            raise UsageError(f"metric {shown(metric)} of task {task.name!r}: this version takes it the other way round")


def measured_task(loaded: LoadedModel, what: Configuration, task: TaskAsked) -> dict[str, Any]:
    """The harness' results. Raises UsageError where the task is not the same here as where it was asked for."""
    tokenizer = load_tokenizer(loaded.name)
    prepared = Tasks([task.name], _options(task.options), tokenizer, resolve_model(loaded.name)).prepared(task.name)
    if prepared.digest != json.loads(task.key)["task_digest"]:
        raise UsageError(f"task {task.name!r}: its files or documents differ between this node and the sweep's")
    conventions = _CONVENTIONS if is_evaluated(what.method, loaded.dtype_name) else Conventions()
    return results_of(StreamingLM(loaded, tokenizer, what, conventions), prepared)


def _options(put: str) -> TaskOptions:
    values = json.loads(put)
    folder = values.pop("folder", None)
    return TaskOptions(folder=None if folder is None else Path(folder), **values)
