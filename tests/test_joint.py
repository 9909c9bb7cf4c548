"""One front of several studies: of what can be compared, each configuration once, nothing twice."""

import csv
import json
from pathlib import Path

import pytest

from dashboards.joint import joined
from dashboards.pareto import main
from streamllm.results.study import load_study

from .made_studies import BASELINE, row, write_study

OBJECTIVES = {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"}
ALIKE = {"model_digest": "da7a", "text_digest": "7e47", "reference_total": 256, "device": "CPU", "software": "torch 2"}


def timed(trial, ratio, increase, reference=2.0, **more):
    """A trial that takes `ratio` times the reference, which took `reference` ms beside it."""
    times = {"time_ratio": ratio, "time_ratio_low": 0.9 * ratio, "time_ratio_high": 1.1 * ratio}
    return row(trial, reference * ratio, increase, **times, reference_tpot_ms=reference, **ALIKE | more)


def strict(reference=2.0, **more):
    return timed("strict", 1.0, 0.0, reference, method="ring", **more)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, trials, fixed=(), objectives=OBJECTIVES, confirmed=(), **settings):
        fixed = fixed or [strict()]
        return write_study(tmp_path, [*fixed, *trials], name, objectives, confirmed, BASELINE | ALIKE, **settings)

    return write


def table(*arguments):
    assert main([*arguments, "--joint", "--format", "csv"]) == 0
    with Path("pareto_joint.csv").open() as file:
        return [(line["study"], line["trial"]) for line in csv.DictReader(file)]


def test_the_front_of_both_in_one_unit_with_the_study_of_each_row(write, capsys):
    write("a", [timed(0, 0.5, 4.0), timed(1, 0.9, 1.0, compress_every=2)])
    slower = [timed(n, ratio, increase, 6.0, compress_every=2**n) for n, ratio, increase in
              ((2, 0.6, 2.0), (3, 0.7, 5.0), (4, 1.5, 0.5))]  # fmt: skip
    write("b", slower, [strict(6.0)])
    assert table("a", "b") == [("a", "0"), ("b", "2"), ("a", "1"), ("b", "4")]
    printed = capsys.readouterr().out
    assert "a and b, as one: 4 of 5 trials are on the front" in printed
    assert "baseline of a:" in printed and "baseline of b:" in printed
    assert "Trial b 2 is recommended" in printed
    joint = joined([load_study("a"), load_study("b")])
    ((reference),) = joint.references
    times = {trial["trial"]: trial["tpot_ms"] for trial in joint.trials}
    assert times["b 2"] == pytest.approx(0.6 * reference.ms) and times["a 0"] == pytest.approx(0.5 * reference.ms)
    assert table("a", "b", "--all")[-1] == ("b", "3")


def test_a_configuration_of_several_studies_counts_once_by_the_most_rounds(write):
    """Else the luckier of two measurements of the same thing would be on the front."""
    write("a", [timed(0, 0.5, 1.0)], confirmed=[timed(0, 0.6, 1.0, rounds=3)])
    write("b", [timed(5, 0.4, 1.0)], confirmed=[timed(5, 0.5, 1.0, rounds=2)])
    assert table("a", "b") == table("b", "a") == [("a", "0")]


def test_what_was_measured_once_does_not_beat_what_was_confirmed(write, capsys):
    write("a", [timed(0, 0.5, 1.0)], confirmed=[timed(0, 0.6, 1.0, rounds=3)])
    write("b", [timed(5, 0.1, 0.5, compress_every=8)])
    assert table("a", "b") == [("a", "0")]
    assert "Nothing of b was confirmed, so none of it is on the joint front" in capsys.readouterr().out


def test_objectives_over_each_studys_own_baseline_are_ranked_over_the_reference(write):
    """Of b's baseline's sample it is known only that its perplexity is far lower."""
    objectives = {"speedup": "maximize", "ppl_increase_percent": "minimize"}
    write("a", [timed(0, 0.5, 1.0, speedup=2.0, ppl_increase_percent=50.0)], objectives=objectives)
    write("b", [timed(1, 0.6, 2.0, speedup=9.0, ppl_increase_percent=2.0, compress_every=8)], objectives=objectives)
    assert table("a", "b") == [("a", "0")]


@pytest.mark.parametrize(
    ("more", "settings", "said"),
    [
        ({"model_digest": "5" * 64}, {}, "its model (555555555555...) is not that of 'a' (da7a)"),
        ({"text_digest": "another"}, {}, "its text (another) is not that of 'a' (7e47)"),
        ({"device": "H100"}, {}, "its device (H100) is not that of 'a' (CPU)"),
        ({"threads": 2}, {}, "its number of threads (2) is not that of 'a' (1)"),
        ({"software": "torch 3"}, {}, "its software (torch 3) is not that of 'a' (torch 2)"),
        ({"dtype": "bfloat16"}, {}, "its dtype (bfloat16) is not that of 'a' (float32)"),
        ({}, {"cap": 128}, "its total KV (128) is not that of 'a' (256)"),
        (
            {},
            {"objectives": {"tpot_ms": "minimize", "kl": "minimize"}},
            "its set of objectives (kl and tpot_ms) is not",
        ),
    ],
)
def test_studies_that_do_not_compare_are_refused_with_what_differs(write, capsys, more, settings, said):
    write("a", [timed(0, 0.5, 1.0)])
    write("b", [timed(0, 0.5, 1.0, **more)], [strict(**more)], **settings)
    assert main(["a", "b", "--joint"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: study 'b': {said}") and error.count("\n") == 1
    assert error.endswith("leave one of them out\n")


def test_what_has_no_front_to_join_is_refused(write, capsys):
    write("a", [timed(0, 0.5, 1.0)])
    write("early", [timed(0, 0.5, 1.0)], [timed(9, 1.0, 1.0)])
    matrix = write("matrix", [timed(0, 0.5, 1.0)])
    settings = json.loads((matrix / "sweep.json").read_text())
    (matrix / "sweep.json").write_text(json.dumps(settings | {"space": {"name": "m", "columns": {}}}))
    for studies, said in (
        (["a"], "joint: one front of several studies, one is given; name another"),
        (["a", "early"], "study 'early': its reference is not measured yet"),
        (["a", "matrix"], "study 'matrix': a matrix has no front to be joined"),
    ):
        assert main([*studies, "--joint"]) == 2
        assert said in capsys.readouterr().err


def test_a_study_that_is_named_twice_counts_once(write, capsys):
    write("a", [timed(0, 0.5, 1.0)])
    assert main(["a", "sweeps/a", "--format", "csv"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "warning: study 'sweeps/a': named twice, counts once\n"
    assert printed.out.count("1 of 1 trials are on the front") == 1
    assert Path("sweeps/a/pareto.csv").is_file() and not Path("pareto.csv").exists(), "it is one study"
    assert main(["a", "a", "--joint"]) == 2
