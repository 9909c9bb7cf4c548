"""The figure of a front of three objectives."""

import numpy as np
import pytest

from dashboards.drawing.planes import planes
from dashboards.drawing.style import NoDataError, style
from dashboards.figures import write_figures
from streamllm.results.study import load_study

from .made_studies import row, write_study

THREE = {"tpot_ms": "minimize", "ppl_increase_percent": "minimize", "ttft_ms": "minimize"}
POINTS = {0: (1.0, 9.0, 5.0), 1: (2.0, 5.0, 5.0), 2: (3.0, 3.0, 5.0), 3: (2.5, 6.0, 1.0), 4: (3.5, 8.0, 6.0)}
"""Trial -> ms/token, PPL increase, TTFT: 3 is on the front by its third alone, 4 behind all."""


@pytest.fixture
def study(tmp_path):
    def study(objectives=THREE, **more):
        rows = [row(trial, time, cost, ttft_ms=first, **more.get(str(trial), {})) for trial, (time, cost, first) in
                POINTS.items()]  # fmt: skip
        return load_study(str(write_study(tmp_path, rows, objectives=objectives)))

    return study


def drawn(study):
    with style():
        figure = planes(study)
        figure.draw_without_rendering()
    return figure.axes[:3]


def test_each_two_objectives_have_a_plane(study):
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in drawn(study())]
    time, cost, first = (
        "time per output token, ms",
        "perplexity increase over re-computation, %",
        "time to first token, ms",
    )
    assert labels == [(time, cost), (time, first), (cost, first)]


def test_steps_join_what_is_best_in_a_plane_alone(study):
    steps = [
        [*zip(*line.get_data(), strict=True)]
        for axes in drawn(study())
        for line in axes.lines
        if line.get_drawstyle() == "steps-post"
    ]
    assert steps[0] == [(1.0, 9.0), (2.0, 5.0), (3.0, 3.0)]
    assert steps[1] == [(1.0, 5.0), (2.5, 1.0)]
    assert steps[2] == [(3.0, 5.0), (6.0, 1.0)]


def test_shades_are_the_third_objective_dark_where_it_is_best(study):
    def darkness(study):
        first, *_ = drawn(study)
        (points,) = first.collections
        light = points.get_facecolors()[:, :3] @ (0.2126, 0.7152, 0.0722)
        return dict(zip([row["trial"] for row in study.front], 1 - light, strict=True))

    found = darkness(study())
    assert found[3] > found[0] == found[1] == found[2]


def test_more_is_better_of_some(tmp_path):
    rows = [row(0, 1.0, 9.0, ttft_ms=4.0), row(1, 2.0, 5.0, ttft_ms=3.0)]
    objectives = {"speedup": "maximize", "ppl_increase_percent": "minimize", "ttft_ms": "minimize"}
    (first, *_) = drawn(load_study(str(write_study(tmp_path, rows, objectives=objectives))))
    (steps,) = [line for line in first.lines if line.get_drawstyle() == "steps-pre"]
    assert [*zip(*steps.get_data(), strict=True)] == [(20.0, 5.0), (40.0, 9.0)]


def test_numbers_do_not_cover_one_another(study, monkeypatch):
    monkeypatch.setitem(POINTS, 5, (1.01, 8.99, 4.99))
    (first, *_) = drawn(study())
    assert {text.get_text() for text in first.texts} in ({"0", "1", "2", "3"}, {"5", "1", "2", "3"})


def test_what_is_far_behind_is_said_to_be_out_of_sight(study, monkeypatch):
    monkeypatch.setitem(POINTS, 4, (3.5, 80.0, 6.0))
    with style():
        figure = planes(study())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["on the front, ours", "behind it; 1 out of sight", "recommended", "best in this plane alone"]
    assert figure.axes[0].get_ylim()[1] < 10


def test_methods_have_shapes_of_their_own(study):
    (first, *_) = drawn(study(**{"3": {"method": "ring"}}))
    one, other = (np.round(points.get_paths()[0].vertices, 3) for points in first.collections)
    assert one.shape != other.shape or not np.allclose(one, other)


def test_a_front_of_two_objectives_has_no_planes(study, tmp_path):
    two = study({name: THREE[name] for name in list(THREE)[:2]})
    with pytest.raises(NoDataError, match="needs three objectives"):
        planes(two)
    written = write_figures([two], tmp_path / "out", ("png",), only={"planes"})
    assert written.left_out == {"planes": "needs three objectives"}
