"""A study's findings in words: for people who decide, not for people who measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamllm.results.schema import AnyRow, unusual_words
from streamllm.results.study import HARDLY, StudyResults

from .recommendation import COSTS, cost_of, least_cost, recommended
from .tables.columns import interval_decimals


@dataclass(frozen=True, slots=True)
class Findings:
    asked: str
    found: tuple[str, ...]
    recommended: AnyRow | None
    """A row of the front."""
    why: str
    certainty: tuple[str, ...]

    @property
    def paragraphs(self) -> tuple[str, ...]:
        return tuple(text for text in (self.asked, *self.found, self.why, *self.certainty) if text)


def findings(study: StudyResults, front: Sequence[AnyRow]) -> Findings:
    """front: the study's, which is computed only once."""
    found = recommended(study, front)
    chosen = found.row
    return Findings(
        _asked(study),
        _found(study, front),
        chosen,
        found.why if chosen is None else f"Recommended: {configuration_words(chosen)}. {found.why}",
        _certainty(study, chosen),
    )


def costs_nothing(row: AnyRow) -> bool:
    """Whether the interval of the row's perplexity increase, over strict StreamingLLM where that is known, reaches down
    to none."""
    return least_cost(row) <= 0


def configuration_words(row: AnyRow) -> str:
    """For people who know the knobs."""
    return (
        f"trial {row['trial']}: {row['method']}, {row.get('backend', row['backend_requested'])} attention, "
        f"{row['n_sink']} sink{'s' * (row['n_sink'] != 1)}, window {row['window_size']}, "
        f"prune every {row['compress_every']}, slack {row['cache_slack']}, max drop {row['max_drop']}"
        f"{''.join(f', {word}' for word in unusual_words(row))}"
    )


def _asked(study: StudyResults) -> str:
    settings = study.configuration
    kept = f"last {study.baseline['n_sink'] + study.baseline['window_size']} tokens" if study.baseline else "window"
    return (
        f"How fast can {settings['model']} stream, and what does that cost in quality? {len(study.trials)} "
        f"configurations were tried, each holding the model's memory of the text at {settings['cap']} tokens or close "
        f"to it. They are compared with re-computing: running the {kept} through the model again for every new token."
    )


def _found(study: StudyResults, points: Sequence[AnyRow]) -> tuple[str, ...]:
    if not points:
        return ("No configuration is on the front: none was measured and feasible.",)
    return (*_best(points), *_left(study))


def _best(points: Sequence[AnyRow]) -> tuple[str, ...]:
    if not all("speedup" in point and "ppl_increase_percent" in point for point in points):
        return (f"{len(points)} configurations are on the front: no other beats one of them in every objective.",)
    fastest = max(points, key=lambda row: row["speedup"])
    said = [f"{_speed(fastest)} {cost_words(fastest)} (trial {fastest['trial']}): the fastest."]
    free = [point for point in points if costs_nothing(point)]
    if free and not costs_nothing(fastest):
        other = max(free, key=lambda row: row["speedup"])
        said.append(f"{_speed(other)} {cost_words(other)} (trial {other['trial']}).")
    if not free:
        said.append("No configuration on the front is free: each costs some quality, by more than its interval.")
    return tuple(said)


def _left(study: StudyResults) -> tuple[str, ...]:
    """What the search has not found yet, as far as its sampler knows."""
    known = study.configuration.get("completeness")
    if known is None:
        return ()
    share, chance, rest = f"{100 * known['share']:g}%", known["chance"], known["points"] - known["timed"]
    if not rest:
        return (f"All {known['points']} configurations of the space were tried.",)
    tried = f"after {known['timed']} of {known['points']:,} configurations"
    if chance < HARDLY:
        return (
            f"The front is complete to {share}, {tried}: the others would add so much to its hypervolume, the area "
            f"that it dominates, with a probability of {100 * chance:.0f}%.",
        )
    return (
        f"The front may not be complete, {tried}: the others would add {share} or more to its hypervolume, the area "
        f"that it dominates, with a probability of {100 * chance:.0f}%. The same command with more --trials, or with "
        f"--until {known['share']:g}, goes on.",
    )


def _speed(row: AnyRow) -> str:
    return f"{row['speedup']:.1f} times as fast as re-computing"


def cost_words(row: AnyRow) -> str:
    name = cost_of(row) or COSTS[-1]
    value = row[name]
    low, high = row.get(f"{name}_low", value), row.get(f"{name}_high", value)
    places = interval_decimals(low, high, 1)
    interval = f" [{low:+.{places}f}, {high:+.{places}f}]" if low != high else ""
    than = " than strict StreamingLLM" if name == "ppl_vs_strict_percent" else ""
    if high < 0:
        return f"with {-value:.{places}f}% less perplexity{interval}{than}"
    if costs_nothing(row):
        beside = " beside strict StreamingLLM" if than else ""
        return f"at no measurable cost in quality: {value:+.{places}f}% perplexity{interval}{beside}"
    return f"for {value:.{places}f}% more perplexity{interval}{than}"


def _certainty(study: StudyResults, chosen: AnyRow | None) -> tuple[str, ...]:
    said = []
    if chosen is not None and chosen.get("rounds"):
        said.append(_confirmed_words(chosen))
    elif chosen is not None:
        said.append(
            "Its speed was measured once, in the search, and not confirmed: a search picks lucky measurements. The "
            "same sweep command with --confirm 3, the default, measures the front again."
        )
    if chosen is not None and chosen.get("warning"):
        said.append(f"A warning about the recommended point: {chosen['warning']}.")
    if chosen is not None and chosen.get("foreign_processes"):
        said.append("Other processes used the same accelerator while it was measured.")
    failed = sum(row["state"] != "complete" for row in study.trials)
    if failed:
        said.append(f"{failed} of {len(study.trials)} configurations failed; the reasons are at the end.")
    status, _ = study.files.read_outcome()
    if status != "FINISHED":
        words = {
            None: "has not finished",
            "": "ended in a way that is not known",
            "KILLED": "was interrupted",
            "FAILED": "ended with an error",
        }
        said.append(f"The sweep {words[status]}: what it would have found is not in here.")
    return tuple(said)


def _confirmed_words(chosen: AnyRow) -> str:
    text = f"After the search its speed was measured again, {chosen['rounds']} times, in turn with the other candidates"
    if "speedup_low" in chosen:
        text += f": between {chosen['speedup_low']:.1f} and {chosen['speedup_high']:.1f} times re-computing, with 95% "
        text += "confidence"
    text += "."
    if "front_probability" in chosen:
        text += (
            f" In {100 * chosen['front_probability']:.0f}% of the draws from all these measurements no other candidate "
            f"beats it."
        )
    return text
