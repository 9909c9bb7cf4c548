"""From a table's cells back to what was measured: `--trace`."""

import json

import numpy as np
import pytest

from dashboards.pareto import main
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name

from .made_studies import BASELINE, failed, row, write_study

QUALITY = {"kind": "quality of streaming", "code": "c0de", "torch": "2.9", "transformers": "5.3", "n_sink": 4}
SPEED = {"kind": "speed", "code": "5eed", "torch": "2.9", "cuda": "12.8", "driver": "570.1", "device": "H100"}
WORKER = {"device": "H100", "threads": None, "software": "torch 2.9, cuda 12.8, driver 570.1"}
RATIO = {"time_ratio": 0.5, "time_ratio_low": 0.4, "time_ratio_high": 0.6, "reference_tpot_ms": 8.0, "pairs": 12}
MADE = {"model": "m", "model_digest": "d1" * 32, "text_digest": "7e" * 32, "n_tokens": 1501, "commit": "abc123+dirty",
        "finished_at": 1.8e9}  # fmt: skip


@pytest.fixture
def traced(tmp_path, monkeypatch, capsys):
    """What is printed; of a study whose trial 1 was confirmed in the second and third of its rounds."""
    monkeypatch.chdir(tmp_path)
    entries = {f"{what}_entry": entry_name(key) for what, key in (("quality", QUALITY), ("speed", SPEED))}
    measured = MADE | WORKER | RATIO | entries
    trials = [
        row(0, 4.0, 2.0, **measured),
        row(1, 3.0, 2.0, **measured | {"speed_entry": "ab" * 32}),
        row(2, 9.0, 9.0),
        failed(3, commit="abc123", finished_at=1.8e9),
        row("strict", 8.0, 2.5, **measured | {"quality_entry": "57" * 32}),
    ]
    baseline = BASELINE | measured | {"quality_entry": "ba" * 32, "sampled_tokens": 64, "time_ratio": 4.0}
    confirmed = {"trial": 1, "rounds": 2, "round_lines": [2, 3], "time_ratio": 0.25, "front_probability": 1.0}
    folder = write_study(tmp_path, trials, baseline=baseline, confirmed=[confirmed])
    clock = {"measured_tpot_ms": 2.0, "reference_tpot_ms": 8.0, "pairs": 12}
    times = {"timed_at": 1.8e9, "load": 0.25, **clock, **WORKER}
    rounds = [
        {"ratios": {"1": [ratio] * 12}, "times": {"1": times}, "failed": {}, "code": "c0de"}
        for ratio in (9, 0.26, 0.24)
    ]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rounds))
    store = MeasurementStore(folder.parent / ".store")
    store.put(QUALITY, Measurement({}, np.zeros((2, 2))))
    store.put(SPEED, Measurement({}))

    def traced(trial, *more, code=0):
        before = set(tmp_path.rglob("*"))
        assert main(["s", *more, "--trace", trial]) == code
        assert set(tmp_path.rglob("*")) == before, "nothing is written"
        printed = capsys.readouterr()
        assert max(map(len, printed.out.splitlines()), default=0) <= 80
        return " ".join(printed.err.split()) if code else " ".join(printed.out.split())

    return traced


def found(text, tmp_path):
    """The files that the patterns in a trace stand for."""
    patterns = [word.rstrip(",") for word in text.split() if "*.json" in word]
    return [next((tmp_path / "sweeps" / ".store").glob(pattern), None) for pattern in patterns]


def test_a_trial_of_the_search_leads_to_its_entries_versions_hardware_and_commit(traced, tmp_path):
    text = traced("0")
    for said in (
        "trial 0 ours, sinks 4, window 252, prune every 1",
        "commit abc123+dirty",
        "model m, digest d1d1d1d1d1d1d1d1, float32",
        "timed on H100, torch 2.9, cuda 12.8, driver 570.1",
        "quality PPL 15.33, PPL vs strict % 2.00 [1.90, 2.10]",
        "quality of streaming, code c0de torch 2.9, transformers 5.3",
        "speed, code 5eed torch 2.9, cuda 12.8, driver 570.1, device H100",
        "ratio 0.5 [0.4, 0.6] of the reference's time beside it, 12 pairs",
        "beside 57/5757575757575757*.json, of strict, at every token",
        "beside ba/babababababababa*.json, of the baseline, known at 64 tokens",
        "unit 8 ms on H100",
    ):
        assert said in text, said
    files = [json.loads(file.read_text())["key"] for file in found(text, tmp_path) if file is not None]
    assert files[:2] == [QUALITY, SPEED], "the losses' entry and the timing's, to be opened"


def test_a_confirmed_trial_leads_to_its_rounds(traced):
    text = traced("1")
    assert "confirmed sweeps/s/rounds.jsonl, lines 2, 3" in text
    assert (
        "line 2 ratio 0.26 of 12 pairs," in text and "line 3 ratio 0.24 of 12 pairs," in text and "ratio 9" not in text
    )
    assert "load 0.25, code c0de, on H100, torch 2.9, cuda 12.8, driver 570.1" in text
    assert "the search ab/abababababababab*.json, which is in the store no more" in text


def test_what_all_is_compared_with_failures_and_old_rows_are_traced_too(traced):
    assert "baseline recompute" in traced("baseline") and "strict ours" in traced("strict")
    assert "failed MemoryError: no room" in traced("3") and "quality" not in traced("3")
    assert traced("2").count("the entry was not noted when this was measured") == 2


def test_a_trial_that_is_not_there_is_one_line(traced, tmp_path):
    text = traced("17", code=2)
    assert text == "error: trace '17': no such trial; study 's' has 4 trials, up to 3, strict, baseline"
    write_study(tmp_path, [row(0, 1.0, 1.0)], "other")
    assert "of one study, 2 are given; name one" in traced("1", "other", code=2)
