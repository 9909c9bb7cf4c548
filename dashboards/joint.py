"""One front of several studies, whose qualities and times can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streamllm.errors import UsageError
from streamllm.measuring.reference_time import WORKER, ReferencePool
from streamllm.results.schema import KNOBS, AnyRow, Row
from streamllm.results.study import StudyResults

from .tables.columns import BY_KEY
from .tables.content import Table
from .tables.table import names_of, pareto_table

_RANKED_BY = {"ppl_increase_percent": "ppl_vs_strict_percent", "speedup": "tpot_ms"}
"""Objectives that are over a study's own baseline -> measures in the same order that are over the reference, which the
studies share."""
_SAME = ("model_digest", "dtype", "quantization", "text_digest", *WORKER)
"""Keys of the reference's row that have to be the same."""
_CALLED = {"model_digest": "model", "text_digest": "text", "threads": "number of threads"}
_SHORT = 40
"""Characters of a value that are said; of a digest the first."""


def joint_table(
    studies: Sequence[StudyResults],
    everything: bool = False,
    where: str | None = None,
    max_ppl_increase: float | None = None,
) -> Table:
    """The table of one front of all the studies, with a column that says which study a row is of. As `pareto_table`."""
    joint = joined(studies)
    table = pareto_table([joint], everything, where, max_ppl_increase)
    own = {of[0]: of[1:] for of in _owners(studies)}
    rows: list[AnyRow] = [{**row, "study": own[row["trial"]][0], "trial": own[row["trial"]][1]} for row in table.rows]
    baselines: list[AnyRow] = [
        {**row, "study": name}
        for name, study in zip(names_of(studies), studies, strict=True)
        for row in ([study.baseline] if study.baseline is not None else [])
    ]
    return replace(
        table,
        columns=(BY_KEY["study"], *table.columns),
        data_columns=(BY_KEY["study"], *table.data_columns),
        rows=rows,
        baselines=[*([joint.strict] if joint.strict is not None else []), *baselines],
        notes=(*table.notes, *_notes(studies, joint)),
    )


def joined(studies: Sequence[StudyResults]) -> StudyResults:
    """The studies as one, whose trials are called "STUDY NUMBER"; its milliseconds are in one unit. Of a configuration
    that several have measured, the trial with the most rounds of confirming counts.

    Its front is of confirmed trials where there are any, as every study's. Raises UsageError for studies that cannot be
    compared."""
    _check(studies)
    first = studies[0]
    measured = [*(row for study in studies for row in (*study.searched, *study.fixed, *study.trials))]
    model = first.configuration["model"]
    pool = ReferencePool(row | {"model": model} for row in measured)
    names = names_of(studies)
    trials = [
        pool.with_time(_renamed(row, name) | {"model": model})
        for name, study in zip(names, studies, strict=True)
        for row in study.trials
    ]
    strict = first.strict
    assert strict is not None
    objectives = dict.fromkeys(_RANKED_BY.get(name, name) for name in first.objectives)
    ways = {name: first.objectives.get(name, "minimize") for name in objectives}
    return StudyResults(
        name=" + ".join(names),
        folder=first.folder,
        configuration={**first.configuration, "objectives": ways, "summary": f"{' and '.join(names)}, as one"},
        baseline=first.baseline,
        trials=_once_each(trials),
        strict=pool.with_time(strict | {"model": model}),
        references=pool.times(),
    )


def _owners(studies: Sequence[StudyResults]) -> list[tuple[str, str, Any]]:
    """Of each trial its name in the joint study, its study's and its own."""
    of = zip(names_of(studies), studies, strict=True)
    return [(f"{name} {row['trial']}", name, row["trial"]) for name, study in of for row in study.trials]


def _renamed(row: Row, study: str) -> Row:
    others: Mapping[str, object] = (
        {"not_told_from": [f"{study} {trial}" for trial in row.not_told_from]} if row.not_told_from else {}
    )
    return row | {"trial": f"{study} {row.trial}"} | others


def _once_each(trials: Sequence[Row]) -> list[Row]:
    best: dict[tuple[Any, ...], Row] = {}
    for row in trials:
        what = tuple(row.get(field.name) for field in KNOBS if field.name != "backend")
        if what not in best or (row.rounds or 0) > (best[what].rounds or 0):
            best[what] = row
    return list(best.values())


def _check(studies: Sequence[StudyResults]) -> None:
    """Raises UsageError."""
    if len(studies) < 2:
        raise UsageError("joint: one front of several studies, one is given; name another")
    first, *others = studies
    for study in studies:
        if study.is_matrix:
            raise UsageError(f"study {study.name!r}: a matrix has no front to be joined; leave it out")
        if study.strict is None:
            raise UsageError(f"study {study.name!r}: its reference is not measured yet; wait for it, or leave it out")
    for study in others:
        if (found := _difference(first, study)) is not None:
            what, one, other = found
            raise UsageError(
                f"study {study.name!r}: its {what} ({other}) is not that of {first.name!r} ({one}), so their fronts do "
                f"not compare; leave one of them out"
            )


def _difference(first: StudyResults, study: StudyResults) -> tuple[str, str, str] | None:
    """What the two were measured with or for that differs, and both values."""
    compared: dict[str, list[object]] = {"total KV": [of.configuration["cap"] for of in (first, study)]}
    compared["set of objectives"] = [" and ".join(sorted(of.objectives)) for of in (first, study)]
    for key in _SAME:
        what = _CALLED.get(key, key)
        compared[what] = [None if of.strict is None else of.strict.get(key) for of in (first, study)]
    for what, (one, other) in compared.items():
        if one != other:
            return what, _short(one), _short(other)
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHORT or " " in text else f"{text[:12]}..."


def _notes(studies: Sequence[StudyResults], joint: StudyResults) -> list[str]:
    said = [
        "One front of several studies: trials of different studies, which were not timed in the same rounds, are "
        "compared by their values; of a configuration that several measured the trial with the most rounds counts. "
        "P(front) is among the candidates of its own study; speedup and PPL increase % are over its own baseline."
    ]
    if joint.is_confirmed:
        said += [
            f"Nothing of {study.name} was confirmed, so none of it is on the joint front: measured once, in the "
            "search, it does not beat what was confirmed."
            for study in studies
            if not study.is_confirmed
        ]
    return said
