"""`python -m dashboards.figures STUDY`: figures for people who would rather look than read, as PNG, PDF and
SVG."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from streamllm.results.front import hypervolume
from streamllm.results.schema import AnyRow, knobs_in_short, number
from streamllm.results.study import StudyResults, is_study
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.printing import say
from streamllm.terminal.program import command, program

from .attainment import band
from .drawing.ablations import KNOBS, ablation
from .drawing.comparisons import BASELINE_LABEL, backends, comparison, runtime
from .drawing.expectations import expectations
from .drawing.importance import importance
from .drawing.kv_length import kv_length
from .drawing.planes import planes
from .drawing.style import (
    BLUE,
    GREY,
    LABELS,
    PAPER,
    SCREEN,
    SHAPES,
    SKY,
    VERMILLION,
    Medium,
    NoDataError,
    interval_errors,
    medium,
    new_figure,
    save,
    style,
)
from .loading import load_all
from .recommendation import QUALITIES, recommended
from .tables.columns import BY_KEY
from .tables.evaluations import read_results

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ON_FRONT, _OTHERS, _ONCE, _RECOMMENDED, _STRICT, _BAND, _HALF = (
    "Pareto front",
    "other trials",
    "measured once, in the search",
    "recommended",
    "strict StreamingLLM (reference)",
    "nine of ten drawn fronts",
    "half of them attain this",
)
_LISTED = 16
_APART = (36, 18)
"""Pixels, of which there are a hundred to the inch, between numbered points, across and upwards."""
_OF_TITLE = 88
"""Letters in a line above the axes."""
_NOTHING = 1e4
"""What is so many times smaller than the largest value of an axis is no value that an axis is bent for: a policy's
own distance to itself, such as 0."""
_WITH_INTERVALS = 300
"""Dominated trials; of more, intervals would cover everything."""


def pareto(study: StudyResults) -> Figure:
    """All trials in the plane of the first two objectives, with intervals, methods by their shapes; the front joined,
    numbered and, but on paper, listed, with its hypervolume. Where the front is confirmed, the band is behind it that
    nine of ten drawn fronts lie in, and what is not confirmed is hollow: it was measured once, in the search. Raises
    NoDataError if nothing is on the front."""
    x, y = list(study.objectives)[:2]
    front = study.front
    if not front:
        raise NoDataError("a matrix has no front" if study.is_matrix else "no trial is complete and feasible")
    on_front = {row["trial"] for row in front}
    others = [row for row in study.trials if row["state"] == "complete" and row["trial"] not in on_front]
    others = [row for row in others if number(row, x) is not None and number(row, y) is not None]
    figure = new_figure(11, 5.5)
    axes = figure.subplots()
    few = len(others) <= _WITH_INTERVALS
    once = [row for row in others if "rounds" not in row] if any("rounds" in row for row in front) else []
    _scatter(axes, once, x, y, GREY, _ONCE, intervals=few, hollow=True)
    _scatter(axes, [row for row in others if row not in once], x, y, GREY, _OTHERS, intervals=few)
    _scatter(axes, front, x, y, BLUE, _ON_FRONT, intervals=True)
    if len(study.objectives) == 2:
        steps = [row[x] for row in front], [row[y] for row in front]
        axes.plot(*steps, color=BLUE, linewidth=1, drawstyle="steps-post")
    _mark_recommended(axes, study, x, y)
    _limit(axes, [*front, *others], x, y)
    words = [f"{study.configuration['summary']}.", _draw_band(axes, study), _volume(study, [*front, *others])]
    _mark_baselines(axes, study, y)
    _number(axes, front[:_LISTED], x, y)
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel(LABELS[y])
    if any(f"{name}_low" in row for row in front for name in (x, y)):
        words[-1] += " Lines are 95% intervals."
    _legend(figure, axes, study)
    _caption(figure, axes, [word for word in words if word])
    return figure


def _legend(figure: Figure, axes: Axes, study: StudyResults) -> None:
    """What the marks are, their shapes included; on a screen the front is listed above."""
    from matplotlib.lines import Line2D

    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    marks = {_ON_FRONT: (BLUE, BLUE), _OTHERS: (GREY, GREY), _ONCE: (GREY, "none")}
    for label, (edge, face) in marks.items():
        if label in handles:
            handles[label] = Line2D([], [], color=edge, marker="o", linestyle="", markerfacecolor=face)
    order = (_ON_FRONT, _OTHERS, _ONCE, _RECOMMENDED, _BAND, _HALF, BASELINE_LABEL, _STRICT)
    named = {label: handles[label] for label in order if label in handles}
    for method in dict.fromkeys(row["method"] for row in study.trials if row["state"] == "complete"):
        shape = SHAPES.get(method, "*")
        named[method] = Line2D([], [], color="0.3", marker=shape, linestyle="", fillstyle="none")
    if medium().is_paper:
        words = [label.partition(" (")[0] for label in named] if medium().is_narrow else [*named]
        figure.legend(
            named.values(),
            words,
            loc="outside lower center",
            ncols=2 if medium().is_narrow else 4,
            handlelength=1.5,
            columnspacing=1,
        )
        return
    front, (x, y) = study.front, list(study.objectives)[:2]
    listing = "\n".join(_describe(row, (x, y)) for row in front[:_LISTED])
    more = f"\n… and {len(front) - _LISTED} more" if len(front) > _LISTED else ""
    title = f"{listing}{more}\n"
    legend = figure.legend(named.values(), [*named], loc="outside right upper", title=title, alignment="left")
    legend.get_title().set(fontsize=8, family="monospace")


def _caption(figure: Figure, axes: Axes, words: Sequence[str]) -> None:
    """What the figure says of itself: on a screen its title, on paper for what is written below it."""
    figure.set_label(_unlocated(" ".join(words)))
    if not medium().is_paper:
        axes.set_title("\n".join(line for word in words for line in wrap(word, _OF_TITLE)))


def _unlocated(text: str) -> str:
    """Without the folders of this machine: of paths, their last part."""
    return re.sub(r"(?<![\w.-])(?:~|\.{1,2})?/[^\s,]*/", "", text)


def pareto_figure(study: StudyResults, path: Path) -> Path:
    """`pareto`, as a file."""
    with style():
        return save(pareto(study), path.with_suffix(""), [path.suffix[1:]])[0]


STUDY_FIGURES: dict[str, Callable[[StudyResults], Figure]] = {
    "pareto": pareto,
    "planes": planes,
    "importance": importance,
    "expectations": expectations,
    "kv_length": kv_length,
}
"""Figures of one study, by file name."""

ROW_FIGURES: dict[str, Callable[[Sequence[AnyRow]], Figure]] = {
    "main_comparison": partial(comparison, metrics=("speedup", "perplexity")),
    "results_summary": partial(comparison, metrics=("speedup", "tpot_ms", "perplexity", "ppl_increase_percent")),
    "fixed_eval_speedup": partial(comparison, metrics=("speedup",)),
    "fixed_eval_ppl_comparison": partial(comparison, metrics=("perplexity",)),
    "fixed_eval_ppl_increase": partial(comparison, metrics=("ppl_increase_percent",)),
    "fixed_eval_runtime": runtime,
    "fixed_eval_first_token_latency": partial(comparison, metrics=("first_token_latency_sec",)),
    "decode_loop_runtime_comparison": partial(comparison, metrics=("runtime_sec",), protocols=("decode-loop",)),
    "decode_loop_ppl_comparison": partial(comparison, metrics=("perplexity",), protocols=("decode-loop",)),
    "backend_comparison": backends,
    **{f"ablation_{knob}": partial(ablation, knob=knob) for knob in KNOBS},
}
"""Figures of the rows of studies and evaluations together, by file name; named as in the source documents where those
have one."""


@dataclass(frozen=True)
class Written:
    paths: list[Path]
    left_out: dict[str, str]
    """Figure -> why."""
    captions: dict[str, str]
    """Figure -> what it says of itself, if anything."""


def write_figures(
    studies: Sequence[StudyResults],
    folder: Path,
    suffixes: Sequence[str] = ("png", "pdf"),
    evaluations: Sequence[AnyRow] = (),
    only: Collection[str] | None = None,
    media: Sequence[Medium] = (SCREEN,),
) -> Written:
    """Writes the figures that there is data for, for each of the media. Of several studies, each has those of a study
    under its own name.

    evaluations: rows of `read_results`; only: names of figures."""
    drawn: dict[str, Callable[[], Figure]] = {}
    for study in studies:
        for name, draw in STUDY_FIGURES.items():
            drawn[name if len(studies) == 1 else f"{name}-{study.name}"] = partial(draw, study)
    rows = [*(row for study in studies for row in _rows(study)), *evaluations]
    drawn |= {name: partial(draw, rows) for name, draw in ROW_FIGURES.items()}
    written = Written([], {}, {})
    of = ", ".join(study.name for study in studies)
    for made_for in media:
        with style(made_for):
            for name, draw_it in drawn.items():
                if only is None or name in only:
                    try:
                        figure = draw_it()
                        written.paths.extend(save(figure, folder / name, suffixes, f"{name} of {of}" if of else name))
                        written.captions[name] = str(figure.get_label())
                    except NoDataError as reason:
                        written.left_out[name] = str(reason)
    return written


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        studies = load_all([name for name in arguments.study if is_study(name) or not Path(name).is_dir()])
        evaluations = []
        for name in arguments.study:
            if not is_study(name) and Path(name).is_dir():
                rows, problems = read_results(Path(name))
                evaluations += rows
                for problem in problems:
                    print(f"warning: left out {problem}", file=sys.stderr)
        folder = arguments.output or (studies[0].folder if len(arguments.study) == len(studies) == 1 else Path())
        folder.mkdir(parents=True, exist_ok=True)
        formats = tuple(arguments.format or (("pdf", "svg") if arguments.paper else ("png", "pdf")))
        media = PAPER if arguments.paper else (SCREEN,)
        written = write_figures(studies, folder, formats, evaluations, media=media)
    except OSError as error:
        print(f"error: output {error.filename!r}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    for path in written.paths:
        say(f"written {path}")
    for name, reason in written.left_out.items():
        say(f"left out {name}: {reason}")
    for name, caption in written.captions.items():
        if arguments.paper and caption:
            say(f"caption of {name}: {caption}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog=program("dashboards.figures"),
        description="Draw the figures of studies, and of folders of JSON results of `streamllm evaluate`.",
    )
    parser.add_argument(
        "study",
        nargs="+",
        metavar="STUDY",
        help="a name under sweeps/, or the path of an output folder or of a folder of results",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where files are written (the study's folder; of several, here)"
    )
    parser.add_argument(
        "--paper",
        action="store_true",
        help="3.3 and 7 inches wide, text of 7 and 8 points, captions printed instead of drawn; PDF and SVG",
    )
    parser.add_argument(
        "--format", nargs="+", choices=("png", "pdf", "svg"), metavar="FORMAT", help="of png, pdf, svg (png pdf)"
    )
    return parser.parse_args(argv)


def _rows(study: StudyResults) -> list[AnyRow]:
    """The study's as the search measured them, all alike, the recommended one marked."""
    found = recommended(study, study.front)
    best, mark = found.row, {"recommended": found.kind}
    return [{**row, **(mark if best and row["trial"] == best["trial"] else {})} for row in study.searched]


def _scatter(
    axes: Axes, rows: Sequence[AnyRow], x: str, y: str, color: str, label: str, intervals: bool, hollow: bool = False
) -> None:
    """Each method by its shape."""
    if not rows:
        return
    size, face = (6 if intervals else 3), ("none" if hollow else color)
    alpha = 0.6 if hollow else 0.9
    axes.errorbar(
        [row[x] for row in rows],
        [row[y] for row in rows],
        xerr=interval_errors(rows, x) if intervals else None,
        yerr=interval_errors(rows, y) if intervals else None,
        fmt=" ",
        ecolor=color,
        elinewidth=0.4 if hollow else 0.7,
        alpha=alpha,
        rasterized=not intervals,
        label=label,
    )
    look: dict[str, Any] = {"linestyle": "", "color": color, "markerfacecolor": face, "alpha": alpha}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        places = [row[x] for row in own], [row[y] for row in own]
        axes.plot(*places, marker=SHAPES.get(method, "*"), markersize=size, rasterized=not intervals, **look)


def _draw_band(axes: Axes, study: StudyResults) -> str:
    """Behind everything, within the axes' limits. Returns what it says in a sentence; of a front that was confirmed
    and has none, why."""
    import numpy as np

    if not study.is_confirmed:
        return ""
    try:
        found = band(study)
    except NoDataError as reason:
        return f"How sure the front is cannot be drawn: {reason}."
    limits = (axes.get_xlim(), axes.get_ylim())
    lowest, highest = np.sort(limits).T
    worst = np.where([way == "minimize" for way in found.objectives.values()], highest, lowest)
    surely, half, hardly = (_stairs(np.clip(region, lowest, highest), worst) for region in reversed(found.corners))
    axes.fill(*zip(*hardly, *reversed(surely), strict=True), color=SKY, alpha=0.35, linewidth=0, label=_BAND, zorder=0)
    axes.plot(*zip(*half, strict=True), color=SKY, linewidth=1.2, linestyle="-.", label=_HALF, zorder=0.5)
    axes.set(xlim=limits[0], ylim=limits[1])
    return found.words


def _stairs(region: np.ndarray, worst: np.ndarray) -> list[tuple[float, float]]:
    """The edge of a region with these corners, of which those on the worst edges of the axes say nothing; it ends at
    these edges."""
    edge = [(float(worst[0]), float(worst[1]))]
    for x, y in region[(region != worst).all(axis=1)].tolist():
        edge = [*edge, (x, edge[-1][1]), (x, y)] if len(edge) > 1 else [(x, edge[0][1]), (x, y)]
    return [*edge, (float(worst[0]), edge[-1][1])]


def _number(axes: Axes, rows: Sequence[AnyRow], x: str, y: str) -> None:
    """Trial numbers beside the points; of points so close that they would cover each other, the first one's."""
    said: list[np.ndarray] = []
    for row in rows:
        place = axes.transData.transform((row[x], row[y]))
        if all(abs((place - other) / _APART).max() > 1 for other in said):
            axes.annotate(f"{row['trial']}", (row[x], row[y]), xytext=(5, 5), textcoords="offset points")
            said.append(place)


def _mark_recommended(axes: Axes, study: StudyResults, x: str, y: str) -> None:
    row = recommended(study, study.front).row
    if row is not None:
        size = 10 if medium().is_paper else 14
        axes.plot(row[x], row[y], "o", markersize=size, markerfacecolor="none", color=VERMILLION, label=_RECOMMENDED)


def _mark_baselines(axes: Axes, study: StudyResults, y: str) -> None:
    """Lines across at the qualities that everything is compared with, where they are in sight."""
    for row, label, line in ((study.baseline, BASELINE_LABEL, "--"), (study.strict, _STRICT, ":")):
        if (
            row is not None
            and y in QUALITIES
            and number(row, y) is not None
            and axes.get_ylim()[0] <= row[y] <= axes.get_ylim()[1]
        ):
            axes.axhline(row[y], color="0.3", linewidth=1, linestyle=line, label=label)


def _volume(study: StudyResults, rows: Sequence[AnyRow]) -> str:
    """With the reference point: the worst that a trial has of each objective."""
    worst = {
        name: (min if direction == "maximize" else max)(row[name] for row in rows if number(row, name) is not None)
        for name, direction in study.objectives.items()
    }
    corner = ", ".join(f"{BY_KEY[name].title} {BY_KEY[name].text({name: value})}" for name, value in worst.items())
    volume = hypervolume(study.front, study.objectives, worst)
    return f"Hypervolume {volume:.4g} up to the reference point ({corner}), the worst of each."


def _limit(axes: Axes, rows: Sequence[AnyRow], x: str, y: str) -> None:
    """The axes span the points, not the widest interval; far points bend the axis instead of flattening it."""
    for values, set_limits in (([row[x] for row in rows], axes.set_xlim), ([row[y] for row in rows], axes.set_ylim)):
        margin = 0.08 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
        set_limits(min(values) - margin, max(values) + margin)
    size = sorted(abs(row[y]) for row in rows)
    usual = next((one for one in size[len(size) // 2 :] if one > size[-1] / _NOTHING), 1.0)
    if size[-1] > 10 * usual:
        from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

        straight, low = 3 * usual, min(min(row[y] for row in rows) - usual, 0)
        axes.set_yscale("symlog", linthresh=straight, linscale=2)
        axes.set_ylim(low, 1.5 * size[-1])
        axes.yaxis.set_major_locator(FixedLocator(bent_ticks(low, straight, 1.5 * size[-1])))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def bent_ticks(low: float, straight: float, high: float) -> list[float]:
    """Ticks of an axis that is straight between -`straight` and `straight` and logarithmic beyond, where the data are:
    round numbers in the straight part; beyond it 1, 2, 5, 10, ..., but for those that would crowd the last one."""
    from matplotlib.ticker import MaxNLocator

    inner = [float(at) for at in MaxNLocator(5).tick_values(max(low, -straight), straight) if low <= at <= straight]
    decades = range(math.floor(math.log10(straight)), math.ceil(math.log10(high)) + 1)
    outer = [first * 10.0**power for power in decades for first in (1, 2, 5)]
    return inner + [at for at in outer if 1.5 * max(inner) < at <= high]


def _describe(row: AnyRow, objectives: Sequence[str]) -> str:
    values = ", ".join(f"{BY_KEY[name].title} {BY_KEY[name].text(row)}" for name in objectives)
    return f"{row['trial']:>3}  {row['method']} {row['backend']}  {knobs_in_short(row, symbols=True)}\n     {values}"


if __name__ == "__main__":
    sys.exit(main())
