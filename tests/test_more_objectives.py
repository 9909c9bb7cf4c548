"""Time to first token and joules per token as objectives and constraints of a sweep, and of an evaluation."""

import numpy as np
import pytest

import streamllm
from dashboards.recommendation import recommend
from dashboards.tables.columns import shown_columns
from orchestrator.search.front_sampler import of_policy
from orchestrator.workers.kinds import Kinds
from streamllm.errors import UsageError
from streamllm.measuring import bench, energy
from streamllm.measuring.reference_time import with_times
from streamllm.results.schema import Row

from .made_studies import row
from .pretended import PretendPool, description
from .test_confirm import OBJECTIVES, confirmed
from .test_confirm import row as candidate
from .test_driver import drive  # noqa: F401
from .test_energy import SteppingCounter

MORE = {"ttft_ms": ("ttft_ratio", "first_token"), "joules_per_token": ("energy_ratio", "energy")}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("more", ["objectives: [tpot_ms, ppl_vs_strict_percent, {}]", "constraints: [{} <= 6.5]"])
def test_a_search_goes_by_it(name, more, drive):  # noqa: F811
    (ratio, kind), pool = MORE[name], PretendPool(2)
    study, log = drive(pool, 5, more.format(name) + "\n")
    for found in study.rows:
        assert found[ratio] == pytest.approx(1.0 + found["n_sink"] / 10)
        assert found["speed_sec"] == 0.75, "what it took is counted"
        if "constraints" in more:
            assert found["feasible"] == (5.0 * found[ratio] <= 6.5)
    assert all(ratio in one for one in log.rows if one["trial"] in ("strict", "baseline"))
    (shown, *_) = with_times(study.rows)
    assert shown[name] == pytest.approx(5.0 * shown[ratio]), "in the reference's own unit"
    assert shown[f"{name}_high"] == pytest.approx(5.0 * shown[f"{ratio}_high"])
    asked = [job.what for job in pool.submitted if job.kind == kind]
    assert len(asked) == len(set(asked)) and len(asked) >= 6
    assert not of_policy(ratio) and not of_policy(name), "a look at a quality does not know it"


def test_what_nobody_asked_for_is_not_measured(drive):  # noqa: F811
    pool = PretendPool(2)
    drive(pool, 3, "objectives: [tpot_ms, ppl_vs_strict_percent, peak_memory_mb]\n")
    assert not [job for job in pool.submitted if job.kind in ("first_token", "energy")]


def test_milliseconds_are_in_one_unit():
    alike = {"model": "m", "time_ratio": 1.0, "reference_tpot_ms": 2.0}
    rows = [Row.of(alike | {"ttft_ratio": 2.0, "reference_ttft_ms": ms}) for ms in (4.0, 6.0, 80.0)]
    found = with_times([*rows, Row.of(alike)])
    assert [row.get("ttft_ms") for row in found] == [12.0, 12.0, 12.0, None]
    assert "joules_per_token" not in found[0]


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize(("factor", "is_certain"), [(1.01, True), (4.0, False)])
def test_a_front_doubts_it_by_its_interval(name, factor, is_certain):
    """Of two that are as good otherwise, one has twice as much of it, for certain or not."""
    ratio, _ = MORE[name]
    values = {0: 1.0, 1: 2.0}
    of = [
        candidate(n, 1.0 + n, 1.0) | {ratio: value, f"{ratio}_low": value / factor, f"{ratio}_high": value * factor}
        for n, value in values.items()
    ]
    times, shifts = {0: [1.0] * 3, 1: [2.0] * 3}, {0: 0.0, 1: 0.0}
    _, better, worse = confirmed(of, times, shifts, OBJECTIVES | {name: "minimize"})
    assert better["front_probability"] == 1.0
    assert worse["front_probability"] < 0.01 if is_certain else worse["front_probability"] > 0.1


def test_a_worker_without_a_counter_is_refused_where_energy_is_asked_for():
    worker = description() | {"uncounted": "energy: no counter: because"}
    assert Kinds([], print).check(0, worker)
    with pytest.raises(UsageError, match="here: energy: no counter: because"):
        Kinds([], print, counts_energy=True).check(0, worker)
    assert Kinds([], print, counts_energy=True).check(0, description())


def test_tables_show_it_where_it_is_an_objective():
    rows = [row(0, 2.0, 9.0, ttft_ms=3.0, joules_per_token=0.2)]
    names = {column.key for column in shown_columns(rows)}
    assert not names & set(MORE)
    assert {column.key for column in shown_columns(rows, MORE)} >= set(MORE)


def test_the_most_frugal_is_recommended():
    rows = [
        row(0, 2.0, -1.0, joules_per_token=0.4),
        row(1, 2.0, -1.0, joules_per_token=0.2),
    ]
    found = recommend(rows, {"joules_per_token": "minimize", "ppl_vs_strict_percent": "minimize"})
    assert found.row is rows[1] and "the most frugal" in found.why


def test_an_evaluation_measures_it_when_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "LEAST_SEC", 0.02)
    monkeypatch.setattr(energy, "LEAST_STEPS", 3)
    monkeypatch.setattr(bench, "energy_counter", lambda _: SteppingCounter(0.001))
    what = streamllm.Configuration("ring", streamllm.EvictionPolicy(n_sink=4, window_size=60))
    text = streamllm.TextSource(max_eval_tokens=200)
    how = streamllm.Measuring(more=("first_token", "energy"))
    row = streamllm.evaluate(what, source=text, how=how, store=tmp_path / "store").row
    assert row["ttft_prompt_tokens"] == 64 and row["energy_of"] == "a made-up device"
    for name, (ratio, _) in MORE.items():
        assert row[name] == pytest.approx(row[f"measured_{name}"], rel=0.5), "of one timing, much the same"
        assert np.isfinite(row[f"{ratio}_low"])
    with pytest.raises(UsageError, match="energy with protocol 'decode-loop': it is measured by protocol fast;"):
        streamllm.Measuring(protocol="decode-loop", more=("energy",))
