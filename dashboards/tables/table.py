"""The Pareto table of one study or several: which rows, in which order, beaten by whom, and what is said about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from streamllm.errors import UsageError
from streamllm.results.front import dominators, objective_values
from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults

from ..recommendation import advice, recommended
from . import kinds
from .columns import COLUMNS, shown_columns
from .content import Table
from .filters import filtered

_PLACES = ("front", "tied", "no better", "dominated", "unconfirmed", "not finite", "infeasible", "failed")
"""In the order in which they are listed. tied: confirmed, and neither it nor one of the front is better than the other
for certain; no better: the one of the front is; unconfirmed: not dominated, but by what only the search measured."""
_DISPENSABLE = (
    "no_better_than",
    "rounds",
    "kl",
    "perplexity",
    "peak_kv",
    "ppl_increase_percent",
    "front_probability",
    "speedup",
    "tpot_ms",
)
"""Unless it is an objective."""
_REASONS = 8
"""Listed, and trials listed with each."""


def pareto_table(
    studies: Sequence[StudyResults],
    everything: bool = False,
    where: str | None = None,
    max_ppl_increase: float | None = None,
) -> Table:
    """The fronts of the studies, each of those of its trials that meet `where`, with what is recommended; with
    `everything` the other trials as well, each with the one of the front that dominates it. Raises UsageError.

    max_ppl_increase: of what is recommended, over re-computation, in percent."""
    chosen = [filtered(study, where) for study in studies]
    if where is not None and not any(study.trials for study in chosen):
        raise UsageError(f"where {where!r}: none of the {sum(len(study.trials) for study in studies)} trials meets it")
    fronts = [study.front for study in chosen]
    shown = [study.trials if everything else front for study, front in zip(chosen, fronts, strict=True)]
    timed_on = kinds.letters([[*rows, *study.fixed] for study, rows in zip(studies, shown, strict=True)])
    rows: list[AnyRow] = []
    baselines: list[AnyRow] = []
    advised: list[str] = []
    for study, front, name in zip(chosen, fronts, names_of(studies), strict=True):
        more = {"study": name} if name else {}
        found = recommended(study, front, max_ppl_increase)
        marked = found.row["trial"] if found.row is not None else None
        for row in kinds.marked(_placed(study, front) if everything else front, timed_on):
            rows.append({**row, **more, **({"recommended": found.kind} if row["trial"] == marked else {})})
        advised += [f"{name}: {text}" if name and text == found.why else text for text in advice(study, found)]
        baselines += [{**row, **more} for row in kinds.marked(study.fixed, timed_on)]
    objectives = {name for study in studies for name in study.objectives}
    return Table(
        title=f"{'Trials' if everything else 'Pareto front'} of {', '.join(dict.fromkeys(s.name for s in studies))}",
        summary=tuple(_summary(*of, where) for of in zip(studies, chosen, fronts, strict=True)),
        columns=(*shown_columns(rows, objectives), *([kinds.TIMED_ON] if timed_on else [])),
        rows=rows,
        baselines=baselines,
        notes=(*_notes(rows, studies), *kinds.notes(timed_on), *_reasons(rows), *advised),
        data_columns=(
            *(tuple(c for c in COLUMNS if any(c.key in row for row in rows)) or COLUMNS),
            *((kinds.TIMED_ON, *kinds.SPELLED_OUT) if timed_on else ()),
        ),
        dispensable=dispensable(objectives),
    )


def dispensable(objectives: Collection[str]) -> tuple[str, ...]:
    """Keys of columns that a narrow terminal can do without, the first first."""
    return tuple(name for name in _DISPENSABLE if name not in objectives)


def _placed(study: StudyResults, front: Sequence[AnyRow]) -> list[AnyRow]:
    """All trials, each with its `place` and, where there is one, what it is `dominated_by`; the best first."""
    objectives = study.objectives
    on_front = {row["trial"] for row in front}
    others = [row for row in study.trials if row["trial"] not in on_front]
    placed: list[AnyRow] = [{**row, "place": "front"} for row in front]
    ranked: list[tuple[int, tuple[float, ...], int, AnyRow]] = []
    confirmed = [row for row in others if row.get("rounds")]
    by_front, by_confirmed = (dominators(others, rows, objectives) for rows in (front, confirmed))
    for row, member, candidate in zip(others, by_front, by_confirmed, strict=True):
        values = objective_values(row, objectives) or ()
        better = member or (candidate if not row.get("rounds") else None)
        place = "dominated" if better is not None else _place(row, values, front)
        more = {"place": place} | ({"dominated_by": better["trial"]} if better is not None else {})
        if place in ("tied", "no better"):
            more["no_better_than"] = ", ".join(str(t) for t in row.get("not_told_from", ()) if t in on_front)
        ranked.append((_PLACES.index(place), values, len(ranked), {**row, **more}))
    return [*placed, *(row for *_, row in sorted(ranked, key=lambda entry: entry[:3]))]


def _place(row: AnyRow, values: tuple[float, ...], front: Sequence[AnyRow]) -> str:
    """The place of a row that nothing dominates and that is not on the front."""
    if row.get("state") != "complete":
        return "failed"
    if not row.get("feasible", True):
        return "infeasible"
    if not values:
        return "not finite"
    if not row.get("rounds"):
        return "unconfirmed"
    tied = any(row["trial"] in member.get("not_told_from", ()) for member in front
               if member["trial"] in row.get("not_told_from", ()))  # fmt: skip
    return "tied" if tied else "no better"


def names_of(studies: Sequence[StudyResults]) -> list[str]:
    """Names that tell the studies apart; empty if there is only one."""
    if len(studies) < 2:
        return [""] * len(studies)
    distinct = len({study.name for study in studies}) == len(studies)
    return [study.name if distinct else str(study.folder) for study in studies]


def _summary(whole: StudyResults, study: StudyResults, front: Sequence[AnyRow], where: str | None) -> str:
    few = f"; of its {len(whole.trials)} trials only the {len(study.trials)} where {where}" if where else ""
    return f"{study.configuration['summary']}: {len(front)} of {len(study.trials)} trials are on the front{few}"


def _notes(rows: Sequence[AnyRow], studies: Sequence[StudyResults]) -> list[str]:
    notes = ["Intervals are 95%. PPL vs strict % is the increase over strict StreamingLLM, at every token of the text;"
             " PPL increase % that over re-computation, which is known at a sample."]  # fmt: skip
    for study in studies:
        if study.references:
            unit = "; ".join(str(reference) for reference in study.references)
            of = f" of {study.name}" * (len(studies) > 1)
            notes.append(f"Milliseconds{of} are ratios to strict StreamingLLM, timed in turn with it, times {unit}.")
    if any(row.get("rounds") for row in rows):
        notes.append(
            f"Times of {'rows with' if any(not row.get('rounds') for row in rows) else 'all rows are of'} rounds"
            f"{' are of those,' if any(not row.get('rounds') for row in rows) else ''} after the search; P(front) is "
            "the share of draws, over rounds and tokens, in which no other candidate is better."
        )
    if any(row.get("place") in ("tied", "no better") for row in rows):
        notes.append(
            "Tied: of it and one of the front, neither is better than the other for certain. No better: for certain it "
            "is better in nothing than one of the front, which is better in something."
        )
    for study in studies:
        notes += _stand_ins(study, len(studies) > 1)
    if any(row.get("place") == "unconfirmed" for row in rows):
        notes.append("Unconfirmed: not dominated by what the search measured, which was not measured again.")
    return notes


def _stand_ins(study: StudyResults, several: bool) -> list[str]:
    """Which other candidates may be as good as a member of the front: of the two neither is better for certain."""
    front, of = study.front, f" of {study.name}" * several
    members = {row["trial"] for row in front}
    said = []
    for member in front:
        alike = [row["trial"] for row in study.trials if row["trial"] in member.get("not_told_from", ())
                 and member["trial"] in row.get("not_told_from", ()) and row["trial"] not in members]  # fmt: skip
        if alike:
            numbers = f"trial{'s' * (len(alike) > 1)} {', '.join(map(str, alike))}"
            said.append(f"Trial {member['trial']}{of} stands for {numbers} too, which cannot be told from it.")
    return said


def _reasons(rows: Sequence[AnyRow]) -> list[str]:
    """Why trials failed or are infeasible, each reason once; of a listing of all trials."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        place = row.get("place")
        why = {"failed": row.get("reason"), "infeasible": row.get("violated")}.get(str(place))
        if why:
            lines.setdefault(f"{place}: {' '.join(str(why).split())}", []).append(_trial(row))
    said = [f"{text} ({'trials' if trials[1:] else 'trial'} {_some(trials)})" for text, trials in lines.items()]
    more = [f"{len(said) - _REASONS} other reasons"] if len(said) > _REASONS else []
    return [f"{text[0].upper()}{text[1:]}" for text in said[:_REASONS]] + more


def _trial(row: AnyRow) -> str:
    return f"{row['study']} {row['trial']}" if "study" in row else str(row["trial"])


def _some(trials: Sequence[str]) -> str:
    return ", ".join(trials[:_REASONS]) + (f" and {len(trials) - _REASONS} more" if trials[_REASONS:] else "")
