"""Scores of tasks as objectives and constraints of a sweep."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dashboards.tables.columns import BY_KEY, shown_columns
from dashboards.tables.frames import frame
from orchestrator.driver import Driver
from orchestrator.search.study import Study
from search_spaces import load_space
from search_spaces.reader import SpaceError
from streamllm.configuration import Configuration
from streamllm.errors import UsageError
from streamllm.measuring.draws import objective_draws
from streamllm.measuring.jobs import Job, TaskAsked
from streamllm.measuring.keys import Keys
from streamllm.measuring.store import Measurement, MeasurementStore
from streamllm.policy import EvictionPolicy
from streamllm.results.checks import checked_settings
from streamllm.results.front import pareto_front
from streamllm.results.schema import OBJECTIVES, Row, is_score

from .pretended import CONDITIONS, TEXT, VARIANT, PretendPool, measured, scheduler

SPACE = """
cap: 32
parameters: {n_sink: [0, 1, 2, 4], compress_every: [1, 8], method: [ring, ours]}
objectives: [tpot_ms, {task: passkey, metric: acc}]
constraints: [task/passkey/acc >= 0.3, task/story/perplexity/first <= 20]
tasks: {folder: files, limit: 50}
known: [{n_sink: 2, compress_every: 8}]
"""
SCORE = "task/passkey/acc"
TASKS = tuple(TaskAsked(name, "{}", json.dumps({"task": name, "task_digest": "x"})) for name in ("passkey", "story"))


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    return load_space(str(tmp_path / "space.yaml"))


def test_a_space_names_scores(space, tmp_path):
    assert space.objectives == ("tpot_ms", SCORE)
    assert space.scores == (SCORE, "task/story/perplexity/first")
    assert space.tasks == {"folder": str(tmp_path / "files"), "limit": 50}
    assert [OBJECTIVES[name] for name in space.scores] == ["maximize", "minimize"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("metric: acc}", "filter: x}", "needs the task and the metric"),
        ("metric: acc}", "metric: a/b/c}", "needs the task and the metric"),
        ("metric: acc}", "metrics: acc}", "unknown key 'metrics' in objective; allowed: task, metric, filter"),
        ("limit: 50", "limit: 0", "limit 0: must be a whole number >= 1"),
        (
            "task/passkey/acc >=",
            "task/passkey >=",
            "must be METRIC <= NUMBER or >=, METRIC one of .* or task/NAME/METRIC",
        ),
        ("{task: passkey, metric: acc}]\nconstraints:", "perplexity]\nconstraints: [perplexity <= 9]\n#", "is a score"),
    ],
)
def test_what_cannot_be_meant_is_told(tmp_path, before, after, message):
    file = tmp_path / "space.yaml"
    assert before in SPACE
    file.write_text(SPACE.replace(before, after))
    with pytest.raises(SpaceError, match=message):
        load_space(str(file))


def answer(job):
    if job.kind != "task":
        return measured(job)
    if job.task.name == "story":
        return Measurement({"scores": {"story/perplexity/first": 10.0}})
    score = 0.25 * job.what.policy.n_sink
    return Measurement({"scores": {"passkey/acc": score, "passkey/acc_stderr": 0.05, "passkey/other": 1.0}})


class Log(list):
    def trial_finished(self, row):
        self.append(row)


def driven(space, folder, pool, tasks=TASKS, trials=16):
    study, log = Study("s", folder / "journal.log", space, 32, seed=1), Log()
    Driver(study, scheduler(pool, folder), TEXT, VARIANT, trials, [log], tasks=tasks).run()
    return study, log


def test_trials_are_judged_by_scores(space, tmp_path):
    pool = PretendPool(answer=lambda worker, job: answer(job))
    study, log = driven(space, tmp_path, pool)
    assert len(study.rows) == 16
    for row in study.rows:
        assert row.state == "complete" and row[SCORE] == 0.25 * row.n_sink and row[f"{SCORE}_stderr"] == 0.05
        assert row.feasible == (row.n_sink >= 2)
        assert "task/passkey/other" not in row
    assert {row.n_sink for row in pareto_front(study.rows, {"time_ratio": "minimize", SCORE: "maximize"})} == {2, 4}
    (strict,) = [row for row in log if row.trial == "strict"]
    assert strict[SCORE] == 1.0, "the reference is put to them too"
    assert all(SCORE not in row for row in log if row.trial == "baseline")
    asked = [job for job in pool.submitted if job.kind == "task"]
    assert len(asked) == 8 * len(TASKS), "once for each policy, the reference's being one of them"
    assert Study("s", tmp_path / "journal.log", space, 32, seed=1).rows[0][SCORE] == study.rows[0][SCORE]


def test_a_score_that_the_harness_does_not_give_ends_the_sweep(space, tmp_path):
    pool = PretendPool(
        answer=lambda worker, job: (
            answer(replace(job, task=replace(job.task, name="passkey"))) if job.task else measured(job)
        )
    )
    with pytest.raises(UsageError, match="story/perplexity/first: no such score; there are passkey/acc, passkey/other"):
        driven(space, tmp_path, pool)


def test_a_score_is_of_a_policy_unless_the_method_decodes(space):
    keys, at = Keys(CONDITIONS, TEXT, 32), Job("task", space_configuration("ring"), task=TASKS[0])
    assert keys.of(at) == keys.of(replace(at, what=space_configuration("ours")))
    assert keys.of(at) != keys.of(replace(at, what=space_configuration("recompute")))
    assert keys.of(at) != keys.of(replace(at, task=TASKS[1]))
    assert not at.is_timed and "passkey under ring" in str(at)


def space_configuration(method):
    return Configuration(method, EvictionPolicy(n_sink=2, window_size=30))


ROW = {"trial": 1, "state": "complete", "tpot_ms": 2.0, SCORE: 0.75, f"{SCORE}_stderr": 0.04321}


def test_a_score_is_shown_with_its_standard_error():
    row = Row.checked(Row.of(ROW).to_json())
    assert BY_KEY[SCORE].title == "passkey acc" and BY_KEY[SCORE].text(row) == "0.750 ± 0.043"
    keys = [column.key for column in shown_columns([row], [SCORE])]
    assert keys.index(SCORE) > keys.index("perplexity")
    assert frame([row], "s")[f"{SCORE}_stderr"][0] == 0.04321
    assert not is_score(f"{SCORE}_stderr") and not is_score("task/passkey") and not is_score("passkey/acc")
    for wrong in ("task/passkey", "task/passkey/a/b/c", "tasks/passkey/acc"):
        with pytest.raises(ValueError, match="no knob, measure or fact"):
            Row.of({wrong: 1.0})
    with pytest.raises(ValueError, match="no such value"):
        Row.checked({SCORE: "high"})
    settings = {"study": "s", "summary": "", "model": "", "quantization": "", "commit": "", "cap": 1, "seed": 0}
    checked_settings(settings | {"objectives": {"tpot_ms": "minimize", SCORE: "maximize"}})


def test_confirming_draws_scores_by_their_standard_errors():
    rows = [Row.of(ROW), Row.of(ROW | {SCORE: 0.5})]
    draws = objective_draws(SCORE, "maximize", rows, np.zeros((20_000, 2)), None, None, None)
    np.testing.assert_allclose(draws.mean(axis=0), [-0.75, -0.5], atol=0.002)
    np.testing.assert_allclose(draws.std(axis=0), 0.04321, rtol=0.03)


def test_mlflow_has_scores_as_metrics():
    from orchestrator.tracking.row_in_mlflow import metrics_of

    assert metrics_of(Row.of(ROW)) == {"tpot_ms": 2.0, SCORE: 0.75, f"{SCORE}_stderr": 0.04321}


def test_a_worker_measures_what_was_asked(tmp_path):
    """And refuses a task whose documents are others than the sweep's."""
    pytest.importorskip("lm_eval")
    from streamllm.engine.loading import load_model
    from streamllm.harness.jobs import tasks_asked
    from streamllm.measuring.measurements import Measurements

    from .task_files import write_tasks

    folder, wanted = write_tasks(tmp_path / "tasks"), ("task/choice/acc", "task/completion/exact_match/first")
    asked = tasks_asked(wanted, {"folder": str(folder), "limit": 6}, "testbed")
    assert [task.name for task in asked] == ["choice", "completion"]
    loaded = load_model("testbed", "float32")
    stream = replace(TEXT, tokens=TEXT.tokens.copy())
    measurements = Measurements.of(MeasurementStore(tmp_path / "store"), loaded, stream, 32)

    def plan(task, what):
        (done,) = yield [Job("task", what, task=task)]
        return done

    for task, score in zip(asked, wanted, strict=True):
        first = measurements.run(plan(task, space_configuration("ring")))
        assert first.is_fresh and score.removeprefix("task/") in first.measurement.record["scores"]
        assert not measurements.run(plan(task, space_configuration("ours"))).is_fresh
    with pytest.raises(UsageError, match="metric 'f1': not one of task 'choice', which has acc, acc_norm"):
        tasks_asked(("task/choice/f1",), {"folder": str(folder)}, "testbed")
    data = folder / "choice.jsonl"
    data.write_text(data.read_text().replace('"answer": 3', '"answer": 2', 1))
    with pytest.raises(UsageError, match="task 'choice': its files or documents differ"):
        measurements.run(plan(asked[0], space_configuration("dense")))
