import pytest

from orchestrator.study import Study
from search_spaces import load_space

SPACE = """
cap: 32
parameters: {n_sink: [0, 1, 2], compress_every: [1, 8]}
known:
  - {n_sink: 2, compress_every: 8}
"""


@pytest.fixture
def open_study(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    space = load_space(str(tmp_path / "space.yaml"))
    return lambda: Study("s", tmp_path / "journal.log", space, 32, seed=1)


def row_of(trial):
    return {
        "trial": trial.number,
        "state": "complete",
        "tpot_ms": 1.0 + trial.params["n_sink"],
        "ppl_increase_percent": 2.0,
        "feasible": True,
    }


def test_every_configuration_once_known_ones_first_then_none_is_left(open_study):
    study = open_study()
    asked = []
    while (trial := study.ask()) is not None:
        asked.append((trial.params["n_sink"], trial.params["compress_every"]))
        study.tell(trial.number, row_of(trial))
    assert asked[0] == (2, 8)
    assert sorted(asked) == [(s, r) for s in (0, 1, 2) for r in (1, 8)]


def test_the_window_is_what_the_cap_leaves(open_study):
    assert open_study().ask().spec.policy.window_size == 30


def test_going_on_keeps_finished_trials_and_hands_out_interrupted_ones_again(open_study):
    study = open_study()
    first, second = study.ask(), study.ask()
    study.tell(first.number, row_of(first))
    again = open_study()
    assert again.rows == [row_of(first)]
    resumed = again.ask()
    assert (resumed.number, resumed.params, resumed.spec) == (second.number, second.params, second.spec)
    again.tell(resumed.number, row_of(resumed))
    asked = {(t.params["n_sink"], t.params["compress_every"]) for t in iter(again.ask, None)}
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
    study.tell(trial.number, {"trial": trial.number, "state": "failed", "reason": "out of memory"})
    again = open_study()
    assert again.rows[0]["reason"] == "out of memory"
    assert trial.params not in [t.params for t in iter(again.ask, None)]


def test_points_that_the_cap_leaves_no_window_are_skipped_with_the_reason(tmp_path):
    (tmp_path / "space.yaml").write_text("cap_accounting: peak\nparameters: {compress_every: [1, 8, 64]}")
    study = Study("s", tmp_path / "journal.log", load_space(str(tmp_path / "space.yaml")), 32, seed=1)
    asked = {trial.params["compress_every"] for trial in iter(study.ask, None)}
    assert asked == {1, 8}
    skipped = [t.user_attrs.get("skipped", "") for t in study._study.get_trials()]
    assert any("grows past it with any window" in reason for reason in skipped)
