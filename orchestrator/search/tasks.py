"""Scores of tasks beside a configuration's quality and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamllm.configuration import Configuration
from streamllm.errors import UsageError
from streamllm.results.schema import SCORE, STDERR

if TYPE_CHECKING:
    from search_spaces import SearchSpace
    from streamllm.measuring.jobs import Plan, TaskAsked
    from streamllm.measuring.plans import Evaluated


def tasks_of(space: SearchSpace, model: str) -> tuple[TaskAsked, ...]:
    """The tasks that a space's objectives and constraints are of, with their documents read. Raises UsageError."""
    if not space.scores:
        return ()
    from streamllm.harness import check_installed

    check_installed()
    from streamllm.harness.jobs import tasks_asked

    return tasks_asked(space.scores, space.tasks, model)


def with_tasks(
    plan: Plan[Evaluated], what: Configuration, tasks: Sequence[TaskAsked], scores: Sequence[str]
) -> Plan[Evaluated]:
    """What the plan finds out, with these scores and their standard errors. Raises UsageError for one that the harness
    did not give."""
    from streamllm.measuring.jobs import Job

    known = yield from plan
    if not tasks:
        return known
    done = yield [Job("task", what, task=task) for task in tasks]
    found: dict[str, float] = {}
    for one in done:
        found |= {f"{SCORE}{name}": value for name, value in one.measurement.record["scores"].items()}
    if lacking := [name for name in scores if name not in found]:
        raise UsageError(f"{lacking[0].removeprefix(SCORE)}: no such score; there are {', '.join(_named(found))}")
    wanted: dict[str, Any] = {
        name: found[name] for score in scores for name in (score, score + STDERR) if name in found
    }
    return replace(
        known,
        record=known.record | wanted,
        is_fresh=known.is_fresh or any(one.is_fresh for one in done),
        seconds=known.seconds + sum(one.seconds for one in done),
        worker=done[-1].worker,
    )


def _named(found: dict[str, float]) -> list[str]:
    return [name.removeprefix(SCORE) for name in found if not name.endswith(STDERR)]
