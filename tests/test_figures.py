import json
import re
import shutil
import subprocess

import pytest

from dashboards.drawing import ablations, comparisons
from dashboards.drawing.comparisons import Series, comparable, comparison
from dashboards.drawing.expectations import expectations
from dashboards.drawing.importance import importance, main_effects
from dashboards.drawing.kv_length import keys_attended, kv_length
from dashboards.drawing.style import HATCHES, PAPER, NoDataError, style
from dashboards.figures import ROW_FIGURES, STUDY_FIGURES, bent_ticks, main, pareto, write_figures
from streamllm.policy import EvictionPolicy, peak_kv
from streamllm.results.schema import told_name
from streamllm.results.study import load_study

from .made_studies import BASELINE, failed, row, write_study

KNEE = row(3, 3.0, 2.0, n_sink=32, compress_every=32)
TRIALS = [
    row(0, 2.0, 30.0, method="ring"),
    KNEE,
    row(4, 9.0, -1.0, method="mit"),
    row(1, 6.0, 1.5),
    row(2, 7.0, 1.5, backend="math"),
    row(6, 1.0, -9.0, n_sink=8, feasible=False),
    failed(8),
    row(9, 2.5, float("nan")),
]


def load(tmp_path, trials=TRIALS, name="s", **settings):
    return load_study(str(write_study(tmp_path, trials, name, **settings)))


def texts(figure):
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def heights(axes):
    return {
        bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")
    }


def test_the_front_with_all_trials_intervals_knee_and_hypervolume(tmp_path):
    with style():
        figure = pareto(load(tmp_path))
    axes = figure.axes[0]
    drawn = {bars.get_label(): bars for bars in axes.containers}
    front, others = drawn["Pareto front"], drawn["other trials"]
    assert front.lines[0].get_xydata().tolist() == [[2.0, 30.0], [3.0, 2.0], [6.0, 1.5], [9.0, -1.0]]
    assert others.lines[0].get_xydata().tolist() == [[7.0, 1.5], [1.0, -9.0]], "complete, whatever they are"
    horizontal, vertical = (lines.get_segments() for lines in front.lines[2])
    assert horizontal[1].ravel().tolist() == pytest.approx([2.7, 2.0, 3.3, 2.0])
    assert vertical[1].tolist() == [[3.0, 1.0], [3.0, 3.0]]
    assert "recommended" in texts(figure)
    # up to (9, 30): (9-3)(30-2) + (9-6)(2-1.5), the ends being no better than the corner in one of them
    assert (
        axes.get_title(loc="left")
        .replace("\n", " ")
        .endswith(
            "Hypervolume 169.5 up to the reference point (ms/token 9.00, PPL increase % 30.0), the worst of each. "
            "Lines are 95% intervals."
        )
    )
    assert {text.get_text() for text in axes.texts} == {"0", "3", "1", "4"}


def test_of_confirmed_trials_the_confirmed_values_are_drawn(tmp_path):
    added = {"trial": 3, "tpot_ms": 4.0, "tpot_ms_low": 3.5, "tpot_ms_high": 4.25, "rounds": 3}
    figure = pareto(load(tmp_path, confirmed=[added | {"front_probability": 1.0}]))
    front = next(bars for bars in figure.axes[0].containers if bars.get_label().startswith("Pareto"))
    assert front.lines[0].get_xydata().tolist() == [[4.0, 2.0]]
    assert front.lines[2][0].get_segments()[0].tolist() == [[3.5, 2.0], [4.25, 2.0]]


def test_bars_are_what_was_measured_at_the_policy_that_most_share(tmp_path):
    study = load(tmp_path)
    rows = [study.baseline, *(one | {"recommended": "knee"} if one is KNEE else one for one in TRIALS)]
    figure = comparison(rows, ("speedup", "ppl_increase_percent"))
    speedup, increase = figure.axes
    assert heights(speedup) == {
        "re-computation (baseline)": [1.0],
        "MIT (flash)": [40 / 9],
        "StreamingLLM (math)": [40 / 7],
        "StreamingLLM (flash)": [40 / 6],
        "ring (flash)": [20.0],
        "recommended": [40 / 3],
    }
    assert "re-computation (baseline)" not in heights(increase) and heights(increase)["ring (flash)"] == [30.0]
    assert texts(figure) == list(heights(speedup)), "in the same order"
    (tick,) = speedup.get_xticklabels()
    assert tick.get_text() == "d\nS=4 W=252 R=1\nrecommended: ours flash\nS=32 W=252 R=32"


def test_protocols_models_and_data_sets_are_kept_apart():
    rows = [
        *(row(i, i + 1.0, 0.0, protocol=protocol, dataset=dataset, method=method)
          for i, (protocol, dataset, method) in enumerate([
              ("fast", "a", "ours"), ("decode-loop", "a", "ours"), ("chunked", "a", "kvpress"),
              ("chunked", "b", "kvpress"), ("chunked", "b", "recompute"), ("fast", "c", "recompute"),
          ])),
    ]  # fmt: skip
    groups = comparable(rows, ("fast", "chunked", None), "tpot_ms")
    assert [[one["trial"] for one in group.rows.values()] for group in groups] == [[0], [4, 3]]
    assert [group.title.split("\n")[0] for group in groups] == ["a", "b"]
    (group,) = comparable(rows, ("decode-loop",), "runtime_sec")
    assert [one["trial"] for one in group.rows.values()] == [1]
    two = comparable([row(0, 1.0, 1.0, model="x/m1"), row(1, 1.0, 1.0, model="x/m2")], ("fast",), "tpot_ms")
    assert [group.title.split("\n")[0] for group in two] == ["m1, d", "m2, d"]
    with pytest.raises(NoDataError, match="no result with runtime_sec by protocol decode-loop"):
        comparable(rows[:1], ("decode-loop",), "runtime_sec")
    with pytest.raises(NoDataError):
        comparable([BASELINE], ("fast",), "tpot_ms")


def test_runtime_where_results_have_no_time_per_token():
    theirs = [
        {"state": "complete", "dataset": "a", "method": m, "runtime_sec": s} for m, s in (("mit", 3.0), ("ours", 2.0))
    ]
    assert heights(comparisons.runtime(theirs).axes[0]) == {"MIT": [3.0], "StreamingLLM": [2.0]}
    assert heights(comparisons.runtime([*theirs, row(0, 7.0, 0.0)]).axes[0]) == {"StreamingLLM (flash)": [7.0]}


def test_labels_of_series():
    names = [Series("ours", "math"), Series("ours", "flash"), Series("ring", "flash", "compile"), Series("kvpress", "")]
    assert [series.label for series in names] == [
        "StreamingLLM (math)", "StreamingLLM (flash)", "ring (flash, compile)", "kvpress"
    ]  # fmt: skip
    assert Series("ours", "eager").label == "StreamingLLM (eager)"
    assert sorted(names[:2], key=lambda series: series.order) == names[:2]


def test_math_beside_flash_where_nothing_else_differs():
    figure = comparisons.backends(TRIALS)
    assert heights(figure.axes[0]) == {"StreamingLLM (math)": [7.0], "StreamingLLM (flash)": [6.0]}
    assert texts(figure) == ["StreamingLLM (math)", "StreamingLLM (flash)"]
    with pytest.raises(NoDataError):
        comparisons.backends([row(0, 1.0, 1.0), row(1, 1.0, 1.0, backend="math", n_sink=8)])


def test_an_ablation_joins_what_differs_in_one_knob_at_the_same_total():
    rows = [
        row(0, 5.0, 9.0, n_sink=0, window_size=256),
        row(1, 6.0, 1.0, n_sink=16, window_size=240),
        row(2, 5.5, 2.0, n_sink=4, window_size=252),
        row(3, 1.0, 2.0, n_sink=8, window_size=100),  # another total
        row(4, 2.0, 2.0, n_sink=8, window_size=248, method="ring"),
        row(5, 2.0, 2.0, n_sink=8, window_size=248, compress_every=2),
        row(6, 7.0, 2.0, n_sink=4, window_size=236, cache_slack=16),
        failed(7, n_sink=32),
        BASELINE,
    ]
    ((label, line),) = ablations.ablation_lines(rows, "n_sink")
    assert label == "ours flash R=1 σ=0 δ=0"
    assert [one["trial"] for one in line] == [0, 2, 1]
    assert [[one["trial"] for one in line] for _, line in ablations.ablation_lines(rows, "cache_slack")] == [[2, 6]]
    assert [[one["trial"] for one in line] for _, line in ablations.ablation_lines(rows, "compress_every")] == []
    windows = [row(0, 1.0, 1.0), row(1, 2.0, 0.5, window_size=508)]
    assert [[one["trial"] for one in line] for _, line in ablations.ablation_lines(windows, "window_size")] == [[0, 1]]
    figure = ablations.ablation(rows, "n_sink")
    data = [axes.containers[0].lines[0].get_xydata().tolist() for axes in figure.axes]
    assert data == [[[0, 5.0], [4, 5.5], [16, 6.0]], [[0, 9.0], [4, 2.0], [16, 1.0]]]
    with pytest.raises(NoDataError, match="no two trials that differ in max_drop alone"):
        ablations.ablation(rows, "max_drop")


def test_importance_of_knobs_whose_effects_are_known(tmp_path):
    """Time is decided by the method alone, the logarithm of quality half by sinks and half by pruning."""
    rows = [
        row(i, {"ours": 2.0, "ring": 1.0}[method], 100 * (1.1**a * 1.1**b - 1), method=method, n_sink=a,
            compress_every=b + 1, cache_slack=c)
        for i, (method, a, b, c) in enumerate((m, a, b, c) for m in ("ours", "ring") for a in (0, 1) for b in (0, 1)
                                              for c in range(8))
    ]  # fmt: skip
    time, quality = (main_effects(rows, name) for name in ("tpot_ms", "ppl_increase_percent"))
    assert time["method"] == pytest.approx(1.0) and time["n_sink"] == time["cache_slack"] == 0
    assert quality["n_sink"] == pytest.approx(0.5, abs=0.01) == quality["compress_every"]
    assert quality["method"] == quality["cache_slack"] == 0
    assert "max_drop" not in quality, "it has one value"
    assert main_effects(rows[:11], "tpot_ms") == {}
    assert main_effects([*rows, failed(99), row(98, 1.0, float("nan"))], "ppl_increase_percent") == pytest.approx(
        quality
    )
    bars = heights_across(importance(load(tmp_path, rows)).axes[0])
    assert bars["time per output token"][-1] == pytest.approx(100.0), "the most important on top"
    with pytest.raises(NoDataError):
        importance(load(tmp_path, rows[:3], "few"))


def test_importance_over_the_whole_space_where_the_sampler_knows_it(tmp_path):
    rows = [row(i, 1.0 + i % 2, 0.1 * i, method=("ours", "ring")[i % 2], compress_every=1 + i % 3) for i in range(24)]
    study = load(tmp_path, rows)
    by_knob = {"method": 0.7, "attn_backend": 0.1}
    known = {told_name(name): by_knob for name in study.objectives}
    study.configuration["effects"] = known
    axes = importance(study).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["backend", "method"]
    assert heights_across(axes)["time per output token"] == pytest.approx([10.0, 70.0])
    assert "over the whole space" in axes.get_xlabel()
    known.popitem()
    assert "chance" in importance(study).axes[0].get_xlabel(), "where it knows one objective only, of the trials"


def heights_across(axes):
    return {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}


def test_expectations_beside_measurements_and_what_is_left(tmp_path):
    def expectation(ratio, cost, **more):
        ends = {"time_ratio_low": ratio - 0.1, "time_ratio_high": ratio + 0.1}
        return {"timed": False, "gain": 0.0, "time_ratio": ratio, "ppl_vs_strict_percent": cost, **ends, **more}

    def timed(measured, expected):
        about = {"expected": expected, "expected_low": expected - 0.1, "expected_high": expected + 0.1}
        return expectation(measured, 1.0, timed=True, measured=measured, **about)

    rows = [timed(1.0 + 0.1 * n, 1.0 + 0.1 * n + 0.15 * (n == 3)) for n in range(6)]
    rows += [expectation(0.9, 2.0, gain=0.02), expectation(2.0, 9.0), expectation(1.5, 9.0)]
    rows += [{"gain": 0.0}, {"timed": 1}]
    study = load(tmp_path)
    study.files.expected.write_text("".join(json.dumps(one) + "\n" for one in rows))
    left, right = expectations(study).axes
    assert left.get_title() == "5 of 6 within their interval of 95%"
    assert right.get_legend_handles_labels()[1] == ["rest: 2", "may add most: 1", "timed: 6"]
    assert right.get_xlim()[0] < 0.9 < 1.5 < 2.0 and right.get_ylim()[1] < 9.0, "it shows where the front is"
    study.files.expected.write_text("".join(json.dumps(one) + "\n" for one in rows[:5]))
    with pytest.raises(NoDataError, match="fewer than 6 trials"):
        expectations(study)


def test_kv_length_is_that_of_the_policy(tmp_path):
    policy = EvictionPolicy(n_sink=4, window_size=20, compress_every=8, cache_slack=3, max_drop=2)
    tokens, keys = keys_attended(policy, 60)
    assert (tokens[0], tokens[-1], keys[0], max(keys)) == (1, 60, 1, peak_kv(policy, 60))
    knobs = {"n_sink": 4, "window_size": 20, "compress_every": 8, "cache_slack": 3, "max_drop": 2}
    trials = [row(0, 1.0, 1.0, **knobs), row(1, 2.0, 0.5, **knobs | {"method": "mit"}), row(2, 3.0, 0.1, window_size=9)]
    figure = kv_length(load(tmp_path, trials, cap=27))
    assert texts(figure) == ["S=4 W=20 R=8 σ=3 δ=2", "S=4 W=9 R=1 σ=0 δ=0"], "a policy once"
    lines = figure.axes[0].get_lines()
    assert list(lines[0].get_ydata()[:60]) == keys and lines[0].get_xdata()[0] == 1
    with pytest.raises(NoDataError):
        kv_length(load(tmp_path, [row(0, 1.0, 1.0, compress_every=0)], "dense"))


def test_what_there_is_data_for_is_written_and_the_rest_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load(tmp_path)
    loops = tmp_path / "results"
    loops.mkdir()
    pair = {"baseline": BASELINE | {"protocol": "decode-loop"}, "streaming": KNEE | {"protocol": "decode-loop"}}
    (loops / "a.json").write_text(json.dumps(pair))
    (loops / "torn.json").write_text("{")
    assert main(["s", "results", "--output", "figures", "--format", "png"]) == 0
    output = capsys.readouterr()
    missing = {"importance", "ablation_window_size", "ablation_cache_slack", "ablation_max_drop"}
    missing |= {"ablation_compress_every", "expectations", "planes"}
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {f"{name}.png" for name in {*STUDY_FIGURES, *ROW_FIGURES} - missing}
    assert {line.split(":")[0] for line in output.out.splitlines() if "left out" in line} == {
        f"left out {name}" for name in missing
    }
    assert "warning: left out torn.json" in output.err
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "figures").iterdir())


def test_files_are_the_same_again_and_those_of_several_studies_apart(tmp_path):
    studies = [load(tmp_path), load(tmp_path, TRIALS[:3], "other")]
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        written = write_figures(studies, folder, only=("pareto-s", "pareto-other", "fixed_eval_speedup"))
        names = [
            f"{name}.{end}" for name in ("pareto-s", "pareto-other", "fixed_eval_speedup") for end in ("png", "pdf")
        ]
        assert [path.name for path in written.paths] == names and written.left_out == {}
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert (folders[0] / "pareto-s.pdf").read_bytes().startswith(b"%PDF")


def test_a_study_without_a_front_has_no_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load(tmp_path, [failed(0)])
    assert main(["s"]) == 0
    output = capsys.readouterr().out
    assert "written" not in output and "left out pareto: no trial is complete and feasible" in output
    assert main(["nowhere"]) == 2
    assert main(["s", "--output", "/dev/null/x"]) == 2


def test_on_paper_in_two_widths_with_embedded_fonts_and_without_a_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load(tmp_path, summary=f"{tmp_path}/models/mine on ./books/one.txt and EleutherAI/pythia-2.8b, space default")
    assert main(["s", "--paper", "--output", "paper"]) == 0
    said = capsys.readouterr().out
    assert "caption of pareto: mine on one.txt and EleutherAI/pythia-2.8b, space default. Hypervolume" in said
    files = {path.name: path.read_bytes() for path in (tmp_path / "paper").iterdir()}
    assert {"pareto-3.3in.pdf", "pareto-3.3in.svg", "pareto-7in.pdf", "pareto-7in.svg"} <= {*files}
    for name, content in files.items():
        width = 72 * float(re.search(r"-([\d.]+)in", name)[1])
        box = rb"MediaBox \[ 0 0 ([\d.]+)" if name.endswith("pdf") else rb'<svg [^>]*width="([\d.]+)pt"'
        assert float(re.search(box, content)[1]) == pytest.approx(width), name
        assert not re.search(str(tmp_path).encode(), content) and b"streamllm-sweep" in content, name
        assert b"/Type3" not in content.replace(b" ", b""), name
    if shutil.which("pdffonts"):
        fonts = subprocess.run(["pdffonts", "paper/pareto-3.3in.pdf"], capture_output=True, text=True).stdout
        assert {line[-21:-18].strip() for line in fonts.splitlines()[2:]} == {"yes"}, fonts


@pytest.mark.parametrize("medium", PAPER, ids=str)
def test_on_paper_nothing_is_listed_and_text_is_of_7_or_8_points(tmp_path, medium):
    with style(medium):
        study = load(tmp_path)
        figures = [draw(study) for draw in (STUDY_FIGURES["pareto"], STUDY_FIGURES["kv_length"])]
        figures += [draw(TRIALS) for draw in (ROW_FIGURES["results_summary"], ROW_FIGURES["ablation_n_sink"])]
        for figure in figures:
            figure.draw_without_rendering()
            sizes = {text.get_fontsize() for text in figure.findobj(lambda a: hasattr(a, "get_fontsize"))
                     if text.get_text()}  # fmt: skip
            assert sizes <= {7, 8} and figure.get_figwidth() == medium.width
    (legend,) = figures[0].legends
    assert legend.get_title().get_text() == "" == figures[0].axes[0].get_title(loc="left")
    below = [axes.get_position().y0 for axes in figures[1].axes]
    assert (below[0] > below[1] + 0.1) == medium.is_narrow, "of a pair, one stands below the other in a column"


def test_in_grey_series_are_told_apart_by_hatch_and_methods_by_shape(tmp_path):
    axes = comparison([load(tmp_path).baseline, *TRIALS], ("speedup",)).axes[0]
    hatches = [bars.patches[0].get_hatch() or "" for bars in axes.containers if hasattr(bars, "patches")]
    assert len(hatches) == 5 == len({*hatches}) and {*hatches} <= {*HATCHES}
    marks = {}
    for line in pareto(load(tmp_path / "other")).axes[0].get_lines():
        for x, _ in line.get_xydata():
            if line.get_linestyle() == "None" and line.get_marker() not in ("None", "o", " "):
                marks[x] = line.get_marker()
    assert marks == {2.0: "D", 9.0: "^"}, "ring and mit; ours is round"


def test_a_bent_axis_has_labels_where_the_data_are(tmp_path):
    ticks = bent_ticks(-0.4, 0.5, 90.0)
    assert ticks == sorted({*ticks}) and ticks[0] >= -0.4 and {0.0, 1.0, 2.0, 5.0, 10.0, 50.0} <= {*ticks}
    assert 3 <= sum(tick <= 0.5 for tick in ticks) <= 6
    zeros = [row(n, 3.0 + n, 0.0) for n in range(4)]
    assert pareto(load(tmp_path, [row(9, 2.0, 0.2), *zeros])).axes[0].get_yscale() == "linear", "0 bends no axis"
    far = pareto(load(tmp_path, [*TRIALS, row(20, 30.0, 900.0)], "far")).axes[0]
    assert far.get_yscale() == "symlog" and {500.0, 100.0, 0.0} <= {*far.get_yticks()}
