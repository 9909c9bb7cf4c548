"""The page that `serve` begins with: what each study has come to, where to look further, and their fronts together."""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults

from .drawing.fronts_svg import Front, marker, overlay, thumbnail
from .findings import configuration_words, cost_words
from .recommendation import cost_of, recommended
from .study_state import RUNNING, state

_PAGE = Path(__file__).parent / "page"
_OVERLAID = 8
"""Studies in one chart at most: as many as there are colours."""

Links = Callable[[StudyResults], Mapping[str, str]]
"""A study's pages: what they are called -> where they are."""


@dataclass(frozen=True, slots=True)
class Card:
    """What is said of a study."""

    study: StudyResults
    front: Sequence[AnyRow]
    best: AnyRow | None
    """The recommended row."""
    state: str
    series: int | None
    """Its number in the chart of all fronts."""


def landing(studies: Sequence[StudyResults], links: Links, said: Sequence[str] = ()) -> str:
    """The page. All that comes from a study is escaped; it has no script.

    said: sentences about what is not served."""
    cards = _cards(studies)
    return string.Template((_PAGE / "landing.html").read_text(encoding="utf-8")).substitute(
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        style=(_PAGE / "report.css").read_text(encoding="utf-8") + (_PAGE / "landing.css").read_text(encoding="utf-8"),
        count=f"{len(studies)} {'study' if len(studies) == 1 else 'studies'}",
        cards="".join(_card(card, links(card.study)) for card in cards),
        together=_together(cards),
        said="".join(f"<p>{escape(sentence)}</p>" for sentence in said),
        refresh='<meta http-equiv="refresh" content="30">' if any(card.state == RUNNING for card in cards) else "",
    )


def _cards(studies: Sequence[StudyResults]) -> list[Card]:
    cards: list[Card] = []
    with_front = iter(range(_OVERLAID))
    common = _common_objectives(studies)
    for study in studies:
        front = study.front
        best = recommended(study, front).row if front else None
        drawn = bool(front) and [*study.objectives][:2] == common
        cards.append(Card(study, front, best, state(study.files), next(with_front, None) if drawn else None))
    return cards


def _common_objectives(studies: Sequence[StudyResults]) -> list[str]:
    """The two objectives that most studies have: one chart has two axes."""
    pairs = [tuple([*study.objectives][:2]) for study in studies if not study.is_matrix and len(study.objectives) > 1]
    return [*max(pairs, key=pairs.count)] if pairs else []


def _card(card: Card, links: Mapping[str, str]) -> str:
    study = card.study
    pages = " ".join(
        f'<a href="{quote(address, safe="/:#?=&%")}">{escape(what)}</a>' for what, address in links.items()
    )
    mark = f'<span class="mark s{card.series}">{_marker(card.series)}</span> ' if card.series is not None else ""
    picture = "" if study.is_matrix else f'<div class="thumb">{thumbnail(_front_of(card))}</div>'
    return (
        f'<article class="card"><div class="words"><h2>{mark}{escape(study.name)} '
        f'<span class="state {card.state.split()[0]}">{escape(card.state)}</span></h2>'
        f'<p class="quiet">{escape(study.configuration["summary"])}{_age(study)}</p>'
        f"{_found(card)}<p class='pages'>{pages}</p></div>{picture}</article>"
    )


def _found(card: Card) -> str:
    study, best = card.study, card.best
    if study.is_matrix:
        done = sum(row["state"] == "complete" for row in study.trials)
        about = study.configuration.get("space", {}).get("description", "")
        return f"<p><b>{done}</b> of {len(study.trials)} cells measured. {escape(about)}</p>"
    count = f"{len(study.trials)} trials, {len(card.front)} on the front"
    if best is None:
        return f"<p>{count}: nothing is recommended yet.</p>"
    speedup = best.get("speedup")
    faster = f'<b class="speedup">{speedup:.1f}×</b> as fast as re-computing' if speedup is not None else ""
    once = "" if best.get("rounds") else ", measured once, in the search"
    return (
        f'<p class="headline">{" ".join(filter(None, [faster, escape(_cost(best))]))}.</p>'
        f"<p>Recommended: {escape(configuration_words(best))}.</p><p class='quiet'>{count}{once}</p>"
    )


def _cost(row: AnyRow) -> str:
    return cost_words(row) if cost_of(row) else ""


def _age(study: StudyResults) -> str:
    times = [row["finished_at"] for row in study.trials if "finished_at" in row]
    at = study.files.read_outcome()[1] or max(times, default=None)
    return "" if at is None else f". Last result {time.strftime('%Y-%m-%d %H:%M', time.localtime(at))}"


def _front_of(card: Card) -> Front:
    on_front = {row["trial"] for row in card.front}
    others = [row for row in card.study.trials if row["trial"] not in on_front and row["state"] == "complete"]
    return Front(card.study.name, [*card.study.objectives][:2], card.front, others, card.best)


def _together(cards: Sequence[Card]) -> str:
    drawn = [card for card in cards if card.series is not None]
    if len(drawn) < 2:
        return ""
    left = [card.study.name for card in cards if card.series is None and card.front]
    more = f" Not drawn, for other objectives or for room: {escape(', '.join(left))}." if left else ""
    legend = "".join(
        f'<span class="entry"><span class="s{card.series}">{_marker(card.series or 0)}</span> '
        f"{escape(card.study.name)}</span> "
        for card in drawn
    )
    names = " ".join(escape(card.study.name) for card in drawn[:2])
    return (
        f'<section id="together"><h2>All fronts</h2><div class="overlay">{overlay([_front_of(card) for card in drawn])}'
        f'</div><p class="legend">{legend}</p><p class="quiet">Lines through a mark are 95% intervals. Fronts of other '
        f"models, texts, totals or devices do not compare: <code>python -m dashboards.pareto {names} --joint</code> "
        f"says whether two do, and makes one front of them.{more}</p></section>"
    )


def _marker(series: int) -> str:
    return f'<svg class="key-mark" viewBox="-7 -7 14 14" aria-hidden="true">{marker(series, 0, 0)}</svg>'
