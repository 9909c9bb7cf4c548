import os
import shutil

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from orchestrator.options import SAMPLERS
from orchestrator.search import samplers
from orchestrator.search.journal import JournalFile
from orchestrator.search.study import Study
from search_spaces import load_space
from streamllm.results.front import pareto_front
from streamllm.results.schema import Row

SPACE = """
cap: 32
parameters: {n_sink: [0, 1, 2], compress_every: [1, 8]}
known:
  - {n_sink: 2, compress_every: 8}
"""


CONDITIONAL = """
cap: 64
objectives: [tpot_ms, ppl_vs_strict_percent]
constraints: [ppl_increase_percent <= 3]
parameters:
  n_sink: [0, 4]
  cache_slack: [0, 8, 16]
  max_drop: {choices: [8, 32], when: {cache_slack: [8, 16]}}
"""


def as_optuna_reads_it(folder):
    """Any of its own tools, the dashboard for one."""
    return optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))))


@pytest.fixture
def open_study(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    space = load_space(str(tmp_path / "space.yaml"))
    return lambda: Study("s", tmp_path / "journal.log", space, 32, seed=1)


def row_of(trial):
    return Row(
        trial=trial.number,
        state="complete",
        time_ratio=1.0 + trial.params["n_sink"],
        ppl_increase_percent=2.0,
        ppl_vs_strict_percent=1.0,
        feasible=True,
    )


def asked_of(study):
    """Trials until there is none left; a hundred are more than any space here has."""
    for _ in range(100):
        if (trial := study.ask()) is None:
            return
        yield trial
    pytest.fail("it asks for ever")


def test_every_configuration_once_known_ones_first_then_none_is_left(open_study):
    study = open_study()
    asked = []
    for trial in asked_of(study):
        asked.append((trial.params["n_sink"], trial.params["compress_every"]))
        study.tell(trial.number, row_of(trial))
    assert asked[0] == (2, 8)
    assert sorted(asked) == [(s, r) for s in (0, 1, 2) for r in (1, 8)]


def test_the_window_is_what_the_cap_leaves(open_study):
    assert open_study().ask().configuration.policy.window_size == 30


def test_going_on_keeps_finished_trials_and_hands_out_interrupted_ones_again(open_study):
    study = open_study()
    first, second = study.ask(), study.ask()
    study.tell(first.number, row_of(first))
    again = open_study()
    assert again.rows == [row_of(first)]
    resumed = again.ask()
    assert (resumed.number, resumed.params, resumed.configuration) == (
        second.number,
        second.params,
        second.configuration,
    )
    again.tell(resumed.number, row_of(resumed))
    asked = {(t.params["n_sink"], t.params["compress_every"]) for t in asked_of(again)}
    assert len(asked) == 4
    assert len(open_study().rows) == 2


def test_a_torn_journal_tail_and_a_dead_drivers_lock_do_not_matter(open_study, tmp_path):
    study = open_study()
    trial = study.ask()
    study.tell(trial.number, row_of(trial))
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(b'{"op_code": 4, "study')
    (tmp_path / "journal.log.lock").write_text("")
    again = open_study()
    assert again.rows == [row_of(trial)]
    assert again.ask() is not None
    assert open_study().rows == [row_of(trial)]


def test_failed_trials_are_kept_with_their_reason_and_not_tried_again(open_study):
    study = open_study()
    trial = study.ask()
    study.tell(trial.number, Row(trial=trial.number, state="failed", reason="out of memory"))
    again = open_study()
    assert again.rows[0]["reason"] == "out of memory"
    assert trial.params not in [t.params for t in asked_of(again)]


def test_points_that_the_cap_leaves_no_window_are_skipped_with_the_reason(tmp_path):
    (tmp_path / "space.yaml").write_text("cap_accounting: peak\nparameters: {compress_every: [1, 8, 64]}")
    study = Study("s", tmp_path / "journal.log", load_space(str(tmp_path / "space.yaml")), 32, seed=1)
    asked = {trial.params["compress_every"] for trial in asked_of(study)}
    assert asked == {1, 8}
    skipped = [t.user_attrs.get("skipped", "") for t in as_optuna_reads_it(tmp_path).trials]
    assert any("grows past it with any window" in reason for reason in skipped)


@pytest.fixture
def open_conditional(tmp_path):
    (tmp_path / "space.yaml").write_text(CONDITIONAL)
    space = load_space(str(tmp_path / "space.yaml"))
    return lambda sampler="auto": Study("s", tmp_path / "journal.log", space, 64, seed=1, sampler=sampler)


def knobs(trial):
    return trial.params["n_sink"], trial.params["cache_slack"], trial.params["max_drop"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_finds_every_point_of_a_conditional_space_once(open_conditional, sampler):
    study, running, asked = open_conditional(sampler), [], []
    for trial in asked_of(study):
        running.append(trial)
        asked.append(knobs(trial))
        if len(running) == 3:
            done = running.pop(0)
            study.tell(done.number, row_of(done))
    assert sorted(asked) == sorted(
        (sinks, slack, drop) for sinks in (0, 4) for slack in (0, 8, 16) for drop in ((8, 32) if slack else (0,))
    )


def test_what_violates_a_constraint_is_infeasible_in_row_and_study(open_conditional, tmp_path):
    study = open_conditional()
    good, bad = study.ask(), study.ask()
    assert study.tell(good.number, row_of(good))["feasible"] is True
    kept = study.tell(bad.number, row_of(bad) | {"ppl_increase_percent": 3.5, "time_ratio": 0.1})
    assert (kept["feasible"], kept["violated"]) == (False, "ppl_increase_percent <= 3")
    assert study.rows[1] == kept
    assert [trial.number for trial in as_optuna_reads_it(tmp_path).best_trials] == [good.number]
    assert as_optuna_reads_it(tmp_path).trials[bad.number].constraints == {"ppl_increase_percent <= 3": 0.5}
    assert pareto_front(study.rows, {"time_ratio": "minimize"}) == [study.rows[0]]


def test_samplers_are_told_what_is_infeasible(open_conditional):
    study = open_conditional("nsga2")
    trial = study.ask()
    study.tell(trial.number, row_of(trial) | {"ppl_increase_percent": 5.0})
    known = [t.constraints for t in study._sampler._study.trials if t.values is not None]
    assert known == [{"ppl_increase_percent <= 3": 2.0}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_an_objective_that_is_no_number_fails_the_trial(open_study, value):
    study = open_study()
    trial = study.ask()
    kept = study.tell(trial.number, row_of(trial) | {"time_ratio": value})
    assert (kept["state"], kept["reason"]) == ("failed", f"time_ratio is {value}")
    assert open_study().rows[0]["state"] == "failed"


def test_interrupted_trials_of_a_conditional_space_keep_number_and_values(open_conditional):
    study = open_conditional("random")
    running = [study.ask() for _ in range(6)]
    again = open_conditional("random")
    assert [(t.number, t.params, t.configuration) for t in running] == [
        (t.number, t.params, t.configuration) for t in (again.ask() for _ in running)
    ]
    assert not {knobs(t) for t in running} & {knobs(t) for t in asked_of(again)}


def test_a_kill_in_the_middle_of_tell_loses_nothing(open_study, tmp_path):
    study = open_study()
    trial = study.ask()
    study.tell(trial.number, row_of(trial))
    lines = (tmp_path / "journal.log").read_text().splitlines(keepends=True)
    (tmp_path / "journal.log").write_text("".join(lines[:-1]))  # the row is there, the state is not
    again = open_study()
    assert again.rows == [row_of(trial)]
    assert trial.params not in [t.params for t in asked_of(again)]
    assert [t.values for t in as_optuna_reads_it(tmp_path).best_trials] == [[trial.params["n_sink"] + 1.0, 1.0]]


def test_the_sampler_may_change_when_a_study_goes_on(open_conditional):
    asked = []
    for sampler in SAMPLERS:
        study = open_conditional(sampler)
        trial = study.ask()
        asked.append(knobs(trial))
        study.tell(trial.number, row_of(trial))
    assert len(set(asked)) == len(SAMPLERS)


@pytest.fixture
def wide(tmp_path):
    (tmp_path / "wide.yaml").write_text(
        "cap: 256\nparameters: {n_sink: {low: 0, high: 64}, cache_slack: {low: 0, high: 99}}"
    )
    return load_space(str(tmp_path / "wide.yaml"))


def test_a_trial_is_two_writes_and_what_samplers_remember_is_bounded(wide, tmp_path, monkeypatch):
    writes = []
    append = JournalFileBackend.append_logs
    monkeypatch.setattr(JournalFileBackend, "append_logs", lambda *given: (writes.append(1), append(*given)))
    study = Study("s", tmp_path / "journal.log", wide, 256, seed=1, sampler="nsga2")
    before, remembered = len(writes), []
    for _ in range(900):
        trial = study.ask()
        study.tell(trial.number, row_of(trial))
        remembered.append(len(study._sampler._study.get_trials(deepcopy=False)))
    assert len(writes) - before == 2 * 900
    assert 400 < max(remembered) <= 800 and min(remembered[450:]) < 450  # of the 1800 suggestions and results


def test_nsga2_goes_on_from_what_was_found_after_a_restart(wide, tmp_path):
    def run(trials):
        study = Study("s", tmp_path / "journal.log", wide, 256, seed=1, sampler="nsga2")
        rows = []
        for _ in range(trials):
            trial = study.ask()
            row = row_of(trial) | {"ppl_vs_strict_percent": float(trial.params["cache_slack"])}
            rows.append(study.tell(trial.number, row))
        return [row["time_ratio"] + row["ppl_vs_strict_percent"] for row in rows]

    first = run(200)
    assert sum(run(50)) < 0.9 * sum(first[:50])


def test_milliseconds_are_told_as_ratios_and_limited_by_the_reference_as_it_is_known(tmp_path):
    """A pooled reference time that moves must not move what a search was told; a limit in milliseconds is on both."""
    (tmp_path / "space.yaml").write_text(f"constraints: [tpot_ms <= 25]\n{SPACE}")
    study = Study("s", tmp_path / "journal.log", load_space(str(tmp_path / "space.yaml")), 32, seed=1)
    kept = []
    for ratio, reference in ((2.0, 10.0), (2.0, 20.0)):  # 20 ms, then 2 times a median of 15
        trial = study.ask()
        kept.append(study.tell(trial.number, row_of(trial) | {"time_ratio": ratio, "reference_tpot_ms": reference}))
    assert [row["feasible"] for row in kept] == [True, False]
    assert [trial.values[0] for trial in as_optuna_reads_it(tmp_path).trials] == [2.0, 2.0]
    assert as_optuna_reads_it(tmp_path).metric_names == ["time_ratio", "ppl_vs_strict_percent"]
    assert not any("tpot_ms" in row for row in kept), "what those are in is known when all are measured"


def test_a_journal_whose_folder_goes_while_it_is_written_says_so_as_a_file(tmp_path, monkeypatch):
    """Not that Optuna "did not possess lock"."""
    (tmp_path / "s").mkdir()
    file = JournalFile(str(tmp_path / "s/journal.log"))
    file.append_logs([{"one": 1}])
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: shutil.rmtree(tmp_path / "s") or real(number))
    with pytest.raises(FileNotFoundError), file.together():
        file.append_logs([{"two": 2}])


def test_auto_is_front_at_first_and_nsga2_once_there_are_many_trials(open_conditional, monkeypatch):
    monkeypatch.setattr(samplers, "AUTO_FRONT_TRIALS", 6)
    study = open_conditional("auto")
    for number, trial in zip(range(7), asked_of(study), strict=False):
        assert (study.chance_of(0.01) is None) == (number >= 5), "who asked for the last knows no more"
        study.tell(trial.number, row_of(trial))
    again = open_conditional("auto")
    assert again.chance_of(0.01) is None and again.expectations() == [] and again.effects() == {}
    assert len(again._sampler._others._recent) == 7, "and its successor has learned from all"
    assert again.ask() is not None
    assert open_conditional("front").chance_of(0.01) is not None


def test_what_was_timed_again_is_what_the_sampler_goes_by(open_conditional):
    study = open_conditional("front")
    for _, trial in zip(range(8), asked_of(study), strict=False):
        study.tell(trial.number, row_of(trial) | {"time_ratio": 2.0 + 0.1 * trial.number, "reference_tpot_ms": 1.0})
    first = study.rows[0]

    def of_first():
        return next(line for line in study.expectations() if line.get("measured") == pytest.approx(first["time_ratio"]))

    assert of_first()["of"] == "time_ratio"
    study.confirmed([Row(trial=first["trial"], time_ratio=3.5), Row(trial="baseline", time_ratio=9.0)])
    assert 3.5 in [line.get("measured") for line in study.expectations()]
    with pytest.raises(StopIteration):
        of_first()
