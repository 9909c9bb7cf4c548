"""Confirming: which trials are timed again after the search, and what the rounds say of them.

A search picks lucky noise; what it measured does not count here. Fronts are made of what can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from streamllm.measuring.certainty import front_probabilities, not_told_from, time_draws
from streamllm.measuring.draws import PAIRED, candidate_times, equally_long, objective_draws
from streamllm.measuring.quality import QualityComparison
from streamllm.measuring.reference_time import WORKER
from streamllm.measuring.store import Arrays
from streamllm.results.front import objective_values, pareto_front
from streamllm.results.schema import AnyRow, Row
from streamllm.results.study import HARDLY

from .rounds import Round

OTHERS = 4
"""Candidates at most besides those on the front and those of earlier confirmations."""
FEWEST = 2
"""Rounds that all candidates are in; what after them is hardly on the front is in no more."""


def candidates(
    rows: Sequence[AnyRow], objectives: Mapping[str, str], earlier: Collection[str] = (), others: int = OTHERS
) -> list[AnyRow]:
    """The front; the `earlier` candidates, so that none leaves the front unmeasured; and the `others` nearest to it
    among the trials that no row of the front beats for certain: in some objective, the two intervals overlap."""
    paired = dict(PAIRED.get(name, (name, direction)) for name, direction in objectives.items())
    fit = [row for row in rows if objective_values(row, paired) is not None]
    front = pareto_front(fit, paired)
    rest = [row for row in fit if row not in front]
    reach = [(max((_reach(row, better, paired) for better in front), default=0.0), row) for row in rest]
    near = [row for _, row in sorted((pair for pair in reach if pair[0] <= 1), key=lambda pair: pair[0])][:others]
    kept = [row for row in rest if row not in near and str(row["trial"]) in earlier]
    return [*front, *near, *kept]


def comparable(
    rows: Sequence[AnyRow], losses_of: Callable[[AnyRow], np.ndarray], note: Callable[[str], None]
) -> list[AnyRow]:
    """Those whose losses can be read; `note` is told of the others."""
    found = []
    for row in rows:
        try:
            losses_of(row)
        except (OSError, KeyError) as error:
            note(f"warning: trial {row['trial']} cannot be confirmed: its losses cannot be read ({error})")
        else:
            found.append(row)
    return found


def unconfirmed_better(rows: Sequence[AnyRow], objectives: Mapping[str, str]) -> list[AnyRow]:
    """Trials that were not confirmed, and that are better than each confirmed one in some objective for certain, by
    their intervals: they are to be confirmed too. One that may be no better than one of those adds nothing."""
    paired = dict(PAIRED.get(name, (name, direction)) for name, direction in objectives.items())
    fit = [row for row in rows if objective_values(row, paired) is not None]
    confirmed = [row for row in fit if row.get("rounds")]
    return [
        row
        for row in fit
        if not row.get("rounds") and all(_is_better_for_certain(row, other, paired) for other in confirmed)
    ]


def _is_better_for_certain(row: AnyRow, other: AnyRow, objectives: Mapping[str, str]) -> bool:
    """In some objective, their intervals apart."""
    for name, direction in objectives.items():
        sign, worst, best = (-1, "low", "high") if direction == "maximize" else (1, "high", "low")
        if sign * row.get(f"{name}_{worst}", row[name]) < sign * other.get(f"{name}_{best}", other[name]):
            return True
    return False


def next_rounds(
    rows: Sequence[AnyRow], known: Mapping[str, AnyRow], most: int, fewest: int = FEWEST
) -> tuple[list[AnyRow], int]:
    """Those of the candidates to be timed next, and in how many rounds; none where all are settled. known: what the
    rounds so far say, by trial. New ones are timed together with those that may be on the front."""

    def said(row: AnyRow) -> AnyRow:
        return known.get(str(row["trial"]), {})

    def rounds(row: AnyRow) -> int:
        return int(said(row).get("rounds", 0))

    open_ones = [row for row in rows if said(row).get("front_probability", 1.0) >= HARDLY or rounds(row) < fewest]
    for enough in (min(fewest, most), most):
        if (least := min(map(rounds, open_ones), default=most)) < enough:
            return open_ones, enough - least
    return [], 0


def confirmed_rows(
    rounds: Sequence[Round],
    rows: Sequence[AnyRow],
    baseline: AnyRow,
    comparison: QualityComparison,
    losses_of: Callable[[AnyRow], np.ndarray],
    objectives: Mapping[str, str],
    arrays_of: Callable[[AnyRow], Arrays] = lambda _: {},
) -> list[Row]:
    """The values that replace the search's in the rows of the baseline and the candidates: time and speedup with their
    intervals; for candidates also the probability of being on the front, and the others that they cannot be told apart
    from (`not_told_from`: those that they are better than in no objective for certain). `round_lines` names the rounds,
    by their lines in the file, all from one kind of worker.

    What scatters re-computation, which waits for arithmetic, is no measure of what scatters decoders, which wait for
    memory: the baseline's time is by itself."""
    names = [str(row["trial"]) for row in (baseline, *rows)]
    of_each = [[one for one in rounds if name in one.ratios] for name in names]
    logs, draws = time_draws([equally_long([one.ratios[names[0]] for one in of_each[0]])])
    if rows:
        own_logs, own_draws = candidate_times(
            [{one.line: one.ratios[name] for one in own} for name, own in zip(names[1:], of_each[1:], strict=True)]
        )
        logs, draws = np.append(logs, own_logs), np.hstack((draws, own_draws))
    added = [
        Row.of(
            {
                "trial": row["trial"],
                "rounds": len(own),
                "round_lines": [one.line for one in own],
                **_raw([one.times[name] for one in own]),
                **_estimate("time_ratio", logs[index], draws[:, index]),
                **(
                    _estimate("speedup", logs[0] - logs[index], draws[:, 0] - draws[:, index])
                    if index
                    else {"speedup": 1.0}
                ),
            }
        )
        for index, (row, name, own) in enumerate(zip((baseline, *rows), names, of_each, strict=True))
    ]
    if not rows:
        return added
    points = np.stack(
        [
            objective_draws(name, direction, rows, draws[:, 1:], comparison, losses_of, arrays_of)
            for name, direction in objectives.items()
        ],
        axis=-1,
    )
    beside = zip(added[1:], front_probabilities(points), not_told_from(points), strict=True)
    return added[:1] + [
        values | {"front_probability": float(probability), "not_told_from": [rows[other]["trial"] for other in others]}
        for values, probability, others in beside
    ]


def _raw(times: Sequence[AnyRow]) -> AnyRow:
    """The clock's own readings, over the rounds."""
    own = [one["measured_tpot_ms"] for one in times]
    return {
        "measured_tpot_ms": float(np.median(own)),
        "measured_tpot_ms_low": min(own),
        "measured_tpot_ms_high": max(own),
        "reference_tpot_ms": float(np.median([one["reference_tpot_ms"] for one in times])),
        "pairs": sum(one["pairs"] for one in times),
        "timed_at": times[-1]["timed_at"],
        "load": max(one["load"] for one in times),
        **{name: times[-1][name] for name in (*WORKER, "timing") if name in times[-1]},
    }


def _estimate(name: str, log: float, draws: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    values = np.exp([log, min(low, log), max(high, log)])
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True))


def _reach(row: AnyRow, better: AnyRow, objectives: Mapping[str, str]) -> float:
    """How much of their intervals' half-widths the row is from being as good as `better` in some objective: 0 if it is,
    up to 1 if intervals overlap."""
    needed = []
    for name, direction in objectives.items():
        sign, end, other_end = (-1, "high", "low") if direction == "maximize" else (1, "low", "high")
        gap = sign * (row[name] - better[name])
        if gap < 0:
            return 0.0
        width = abs(row[name] - row.get(f"{name}_{end}", row[name]))
        width += abs(better.get(f"{name}_{other_end}", better[name]) - better[name])
        needed.append(gap / width if gap and width else np.inf)  # equal ones are the same policy's, and stay equal
    return min(needed)
