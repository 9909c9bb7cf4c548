import io
import time

import pytest
from rich.console import Console

from orchestrator.screen import display as display_module
from orchestrator.screen.display import Display
from orchestrator.screen.plot import Plot
from streamllm.configuration import Configuration
from streamllm.measuring.jobs import Job
from streamllm.policy import EvictionPolicy

from .pretended import description


class Tracking:
    backlog = 0
    problem = None


def row(trial, tpot, increase, **more):
    words = {"trial": trial, "state": "complete", "method": "ours", "backend": "math", "backend_requested": "math"}
    policy = {"n_sink": 4, "window_size": 44, "compress_every": 1, "cache_slack": 0, "max_drop": 0}
    times = {"time_ratio": tpot / 2, "reference_tpot_ms": 2.0, "speedup": 2.0}
    numbers = times | {"ppl_vs_strict_percent": increase, "perplexity": 15.0, "peak_kv": 48}
    return words | policy | numbers | {"worker": 0, "reused": False} | more


def job(round_number=0):
    what = Configuration("mit", EvictionPolicy(n_sink=4, window_size=44), "flash")
    return Job("times", what, run=round_number) if round_number else Job("speed", what)


def display(rows=(), terminal=True, height=50, tracking=None):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150, height=height, color_system=None)
    return Display(10, list(rows), ("tpot_ms", "ppl_vs_strict_percent"), tracking or Tracking(), console)


def screen(shown):
    with shown.console.capture() as captured:
        shown.console.print(shown.view())
    return captured.get()


def said(shown):
    return shown.console.file.getvalue()


def cells(plot, width=20):
    """The characters between the axis and the right edge, line by line from the top."""
    text = "".join(piece for piece, _ in plot.rows(width))
    return [line.split("┤")[1] for line in text.splitlines() if "┤" in line]


def test_points_lie_where_they_belong_and_axes_say_what_they_are():
    plot = Plot([(1.0, 0.0), (2.0, 10.0), (3.0, 5.0)], [(1.0, 0.0)], "ms/token", "PPL increase %", 5)
    drawn = cells(plot)
    assert drawn[4][0] == "◆", "least time, least perplexity: lower left"
    dots = {(line, column) for line, cell in enumerate(drawn) for column, c in enumerate(cell) if c not in " ◆"}
    assert dots == {(0, 10), (2, 19)}
    text = "".join(piece for piece, _ in plot.rows(40))
    assert "ms/token" in text and "PPL increase %" in text
    assert "0.96" in text and "3.04" in text and "10.2" in text and "-0.2" in text, "the ends of the axes"


def test_far_points_do_not_flatten_the_plot_and_are_counted_unless_on_the_front():
    near = [(float(x), 1.0 + x % 3) for x in range(20)]
    plot = Plot([*near, (5.0, 900.0)], [(0.0, 1.0)], "x", "y", 6)
    assert "1 trials are beyond the edge" in next(plot.rows(20))[0]
    assert "3.04" in "".join(piece for piece, _ in plot.rows(20))
    on_front = Plot([*near, (5.0, 900.0)], [(5.0, 900.0)], "x", "y", 6)
    assert "beyond" not in next(on_front.rows(20))[0]
    assert cells(on_front)[0].count("◆") == 1
    assert "beyond" not in next(Plot(near, [], "x", "y", 6).rows(20))[0]
    single = Plot([(2.0, 3.0)], [(2.0, 3.0)], "x", "y", 5)
    assert sum(line.count("◆") for line in cells(single)) == 1


def test_the_view_shows_workers_counts_front_and_what_mlflow_lacks():
    tracking = Tracking()
    shown = display([row(0, 3.0, 1.0), row(1, 2.0, 2.0, reused=True)], tracking=tracking)
    assert "workers are starting" in screen(shown)
    shown.worker_ready(0, description())
    shown.job_started(0, job())
    assert "worker 0  speed of mit flash S=4 W=44 R=1" in screen(shown)
    shown.worker_idle(0)
    shown.trial_finished(row(2, 4.0, 4.0, state="failed", reason="nope"))
    shown.trial_finished(row(3, 1.0, 3.0))
    shown.trial_finished(row(4, 4.0, 4.0))
    view = screen(shown)
    assert "5/10 trials (1 failed, 1 reused)" in view and " left" in view
    assert "worker 0  idle" in view
    assert "front so far: 3 of 5 trials, hypervolume up to the worst trial 6" in view
    assert view.count("◆") == 3
    assert "MLflow" not in view
    tracking.backlog, tracking.problem = 7, "it is away"
    assert "MLflow: 7 runs behind, still trying: it is away" in screen(shown)


def test_many_workers_are_counted_and_a_low_terminal_does_without_the_plot():
    shown = display([row(0, 3.0, 1.0)], height=20)
    for worker in range(9):
        shown.worker_ready(worker, description() | {"visible_devices": str(worker)})
    shown.job_started(3, job())
    view = screen(shown)
    assert "9 workers  1 measure, 8 idle" in view
    assert "┤" not in view


def test_confirming_is_counted_by_itself():
    shown = display([row(0, 3.0, 1.0)])
    shown.confirming(2, 3)
    for number in (1, 1, 2):
        shown.job_started(0, job(number))
    view = screen(shown)
    assert "2/6 confirmations" in view and "round 2" in view
    assert "confirming: 1 candidate and the baseline, 3 rounds" in said(shown)
    shown.searching_on()
    assert "1/" in screen(shown) and "confirmations" not in screen(shown), "what is left to find is trials"


def test_without_a_terminal_there_are_plain_lines():
    shown = display(terminal=False)
    with shown:
        shown.worker_ready(0, description(kind={"device": "GPU"}) | {"visible_devices": "3", "cores": [0, 1]})
        shown.job_started(0, job())
        shown.trial_finished(row(0, 3.0, 1.0))
        shown.draining(5)
        shown.draining(4)
    assert said(shown).splitlines() == [
        "worker 0: GPU 3, GPU, cores 0,1",
        "[ 1/10] ours math  S=4   W=44   R=1   slack=0  drop=0    3.00 ms/token    2.0x  PPL  15.00 (+1.0%)",
        "MLflow: 5 more runs to log",
    ]


def test_values_that_are_no_numbers_do_not_disturb_the_view():
    shown = display([row(0, float("nan"), 1.0), row(1, 2.0, float("inf"))])
    assert "front so far: 0 of 2 trials" in screen(shown)


@pytest.mark.parametrize("terminal", [False, True])
def test_off_a_terminal_a_quiet_sweep_says_now_and_then_that_it_goes_on(terminal, monkeypatch):
    monkeypatch.setattr(display_module, "LINE_SEC", 0.05)
    shown = display([row(0, 4.0, 1.0)], terminal=terminal)
    with shown:
        shown.job_started(1, job())
        time.sleep(0.5)
    lines = [line for line in said(shown).splitlines() if line.startswith("1/10 trials (0 failed, 0 reused), 0 s")]
    assert bool(lines) == (not terminal)
    assert all(line.endswith("; worker 1: speed of mit flash S=4 W=44 R=1 slack=0 drop=0") for line in lines[-1:])


def test_time_left_is_no_more_than_the_budget(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=150, color_system=None)
    began = time.monotonic()
    shown = Display(4000, [], ("tpot_ms", "ppl_vs_strict_percent"), Tracking(), console, began + 160)
    monkeypatch.setattr(time, "monotonic", lambda: began + 60)
    shown.trial_finished(row(0, 4.0, 1.0))
    assert "1/4000 trials (0 failed, 0 reused), 60 s, about 2 min left" in screen(shown)
