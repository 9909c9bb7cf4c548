"""The schema: knobs, measures and facts, defined once, and the row that has them."""

import copy
import json
import math
import pickle
from dataclasses import fields

import pytest

from dashboards.drawing.style import LABELS
from dashboards.tables.columns import COLUMNS
from orchestrator.tracking.row_in_mlflow import METRICS
from search_spaces.knobs import LEAST, USUAL
from streamllm.errors import UsageError
from streamllm.policy import EvictionPolicy
from streamllm.results.schema import (
    FIELDS,
    FORMAT,
    KNOBS,
    OBJECTIVES,
    POLICY_KNOBS,
    POLICY_WORDS,
    Row,
    number,
    told_name,
)
from streamllm.results.study_folder import append_row, read_rows, write_rows

VALUES = {"trial": 3, "method": "ours", "n_sink": 0, "feasible": False, "tpot_ms": 2.5, "tpot_ms_low": 2.25}


def test_a_row_has_what_it_was_given_as_keys_and_as_attributes():
    row = Row.of(VALUES | {"speedup": None})
    assert dict(row) == VALUES and row == VALUES and (row.n_sink, row.feasible, row.speedup) == (0, False, None)
    assert "speedup" not in row and row.get("speedup", 1.0) == 1.0 and len(row) == len(VALUES)
    again = row | {"tpot_ms_low": None, "rounds": 2}
    assert "tpot_ms_low" not in again and again.rounds == 2 and row["tpot_ms_low"] == 2.25 and row.rounds is None
    assert again != row and pickle.loads(pickle.dumps(row)) == row == copy.deepcopy(row)
    for unknown in ("joy", "joy_low", "tpot_ms_middle"):
        with pytest.raises(ValueError, match=f"key '{unknown}': no knob, measure or fact"):
            row | {unknown: 1.0}


def test_rows_are_versioned_and_unknown_keys_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [Row.of(VALUES)])
    append_row(path, Row.of(VALUES | {"trial": 4}))
    assert json.loads(path.read_text().splitlines()[0]) == {"format": FORMAT} | VALUES
    assert [row.trial for row in read_rows(path)] == [3, 4]
    older = Row.from_json(VALUES | {"of_an_older_version": 1}, "here")
    assert older == VALUES
    with pytest.raises(UsageError, match=rf"here: has rows of format {FORMAT + 1}, this version reads {FORMAT}"):
        Row.from_json(VALUES | {"format": FORMAT + 1}, "here")
    with pytest.raises(UsageError, match="here: has rows of format new"):
        Row.from_json(VALUES | {"format": "new"}, "here")
    with pytest.raises(UsageError, match="here: key 'joy': no knob, measure or fact of a row"):
        Row.from_json(VALUES | {"format": FORMAT, "joy": 1}, "here")


def test_what_an_older_row_calls_its_runtime_is_what_measuring_took():
    """Of protocol fast, which decodes no whole text."""
    older = {**VALUES, "format": 3, "protocol": "fast", "runtime_sec": 9.0, "runtime_sec_std": 1.0}
    row = Row.from_json(older, "here")
    assert row.runtime_sec is None and (row.measuring_sec, row["measuring_sec_std"]) == (9.0, 1.0)
    assert Row.from_json(older | {"protocol": "decode-loop"}, "here").runtime_sec == 9.0
    assert Row.from_json(older | {"format": FORMAT}, "here").runtime_sec == 9.0, "today's are as they are"
    assert Row.from_json(row.to_json(), "here") == row
    with pytest.raises(UsageError, match="here: key 'joy'"):
        Row.from_json(older | {"joy": 1}, "here")


def test_a_number_is_one_that_is_there_and_finite():
    row = {"a": 2, "b": 0.0, "c": math.nan, "d": math.inf, "e": "3", "f": None}
    assert [number(row, name) for name in "abcdefg"] == [2.0, 0.0, None, None, None, None, None]


def test_what_shows_and_searches_follows_from_the_fields():
    of_policy = [*POLICY_KNOBS, *POLICY_WORDS]
    assert [knob.name for knob in of_policy] == [field.name for field in fields(EvictionPolicy)]
    policy = EvictionPolicy()
    assert all(getattr(policy, knob.name) == knob.usual for knob in of_policy if knob.usual is not None)
    assert {knob.parameter for knob in KNOBS} == {*LEAST, *USUAL}
    assert all(FIELDS[told_name(name)].mlflow == "metric" and LABELS[name] for name in OBJECTIVES)
    titles = [column.header for column in COLUMNS]
    assert len(set(titles)) == len(titles) and all(FIELDS[name].header for name in METRICS)
