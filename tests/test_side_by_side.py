"""Whether accelerators are timed side by side: by the pretended workers and the simulated time of the benchmark."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest

from orchestrator.command_line import matrix_request, parser, resolve
from orchestrator.configuration import WorkerSettings
from orchestrator.timing import Calibration, Timing
from orchestrator.workers import cluster
from orchestrator.workers.pool import Finished
from streamllm.errors import UsageError
from streamllm.results.study_folder import StudyFolder

from .benchmarks import side_by_side as benchmark
from .pretended import KIND, PretendPool, description, scheduler

NODE = (("device", "d"), ("threads", None), ("software", None))


def calibrated(quotients):
    """None where more repetitions are needed."""
    return Calibration.of(NODE, 8, [2.0] * len(quotients), [2.0 * one for one in quotients])


def test_side_by_side_is_what_the_whole_interval_says():
    steady = [0.997, 1.004, 1.001, 0.996, 1.003, 1.0]
    found = calibrated(steady)
    assert (found.mode, found.is_sure, found.repetitions) == ("concurrent", True, 6)
    assert (found.quotient.low, found.quotient.high) == (0.996, 1.004)
    assert str(found) == (
        "timing on 8 x d of a node: 2 times the reference alone, 2.001 beside the others, 1.0005 [0.9960, 1.0040] as "
        "much over 6 repetitions: side by side"
    )
    assert Calibration.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert [calibrated([1.0] * count) is None for count in (1, 5, 6, 7, 11, 12)] == [True, True, False] + [True] * 2 + [
        False
    ], "it is looked at twice: who looks all the time waits for luck"
    for factor in (1.05, 1 / 1.05):
        disturbed = calibrated([factor * one for one in steady])
        assert (disturbed.mode, disturbed.is_sure) == ("exclusive", True)


@pytest.mark.parametrize("lucky", [1.0, 1.019])
def test_what_is_not_sure_is_repeated_and_then_one_at_a_time(lucky):
    """The median alone would do."""
    quotients = [lucky] * 8 + [1.03] * 4
    for count in range(1, 12):
        assert calibrated(quotients[-count:]) is None, "too few, or on both sides"
    found = calibrated(quotients)
    assert (found.mode, found.is_sure, found.quotient.value) == ("exclusive", False, lucky)
    assert "which is not sure to be within 2%: one at a time" in str(found)
    quiet = calibrated([lucky] * 11 + [1.3])
    assert (quiet.mode, quiet.is_sure) == ("concurrent", True), "one that was disturbed is not believed"
    assert Calibration.from_json(found.to_json()) == found


@pytest.fixture
def without_noise(monkeypatch):
    monkeypatch.setattr(benchmark, "_OF_PAIRS", 0.0)
    monkeypatch.setattr(benchmark, "_OF_TIMINGS", 0.0)


@pytest.mark.parametrize(("disturbed", "mode"), [(0.0, "concurrent"), (0.05, "exclusive"), (-0.05, "exclusive")])
def test_auto_finds_out_whether_workers_disturb_one_another_once(disturbed, mode, tmp_path, without_noise):
    found = benchmark.run(tmp_path, 4, 48, "auto", disturbed)
    (line,) = found["notes"]
    known = json.loads(StudyFolder(tmp_path).timing.read_text())["nodes"]
    assert [(one["workers"], one["timing"], one["device"]) for one in known] == [(4, mode, "simulated")]
    assert known[0]["quotient"] == pytest.approx(1 + disturbed), "all others time, from its beginning to its end"
    assert known[0]["alone"] == pytest.approx(1.0) and f"{1 + disturbed:.4f} [" in line
    assert set(found["trials_by_timing"]) <= {mode, "exclusive"} and found["trials_by_timing"][mode] > 24
    again = benchmark.run(tmp_path, 4, 96, "auto", disturbed)
    assert [note.partition(" (after")[0] for note in again["notes"]] == [f"known: {line.partition(' (after')[0]}"]
    assert again["trials_by_timing"][mode] >= found["trials_by_timing"][mode] + 48
    assert again["timings_at_once"] == (4 if mode == "concurrent" else 1), "and nobody is tried again"


@pytest.mark.parametrize(("asked", "workers", "at_once"), [("auto", 1, 1), ("exclusive", 4, 1), ("concurrent", 4, 4)])
def test_nobody_is_tried_where_there_is_no_question(asked, workers, at_once, tmp_path):
    found = benchmark.run(tmp_path, workers, 24, asked, 0.0)
    assert not found["notes"] and not StudyFolder(tmp_path).timing.exists()
    assert found["timings_at_once"] == at_once


def test_nodes_of_a_kind_are_tried_once_and_as_much_is_timed_elsewhere_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PER_NODE", 2)
    found = benchmark.run(tmp_path, 6, 120, "auto", 0.0)
    assert len(found["notes"]) == 1 and found["trials_by_timing"]["exclusive"] > 10, "of the other nodes"


def test_fewer_than_were_found_not_to_disturb_one_another_do_not_either(tmp_path):
    def timing():
        return Timing("auto", StudyFolder(tmp_path), lambda _: None)

    assert not timing().side_by_side(NODE, 8)
    one = calibrated([1.0] * 6)
    other = replace(calibrated([1.1] * 6), workers=6)
    StudyFolder(tmp_path).timing.write_text(json.dumps({"nodes": [one.to_json(), other.to_json()]}))
    of = timing()
    assert [of.side_by_side(NODE, count) for count in (1, 5, 6, 7, 8, 9)] == [True, True, False, True, True, False]
    assert not of.side_by_side(NODE[1:], 8), "of another kind"


_NO_KIND = json.dumps({"nodes": [calibrated([1.0] * 6).to_json() | {"software": ["x"]}]})


@pytest.mark.parametrize("content", ["{", "[]", '{"nodes": [{"timing": "maybe"}]}', _NO_KIND])
def test_what_was_found_out_and_is_damaged_is_found_out_anew(content, tmp_path, capsys):
    folder = StudyFolder(tmp_path)
    folder.timing.write_text(content)
    assert not Timing("auto", folder, print).side_by_side(NODE, 8)
    assert "timing.json" in capsys.readouterr().err and not folder.timing.exists()
    assert (tmp_path / "timing.json.damaged-1").read_text() == content


class Mortal(benchmark.SimulatedPool):
    """Worker 1 dies whenever it times beside others, to see what that does."""

    deaths: ClassVar[list[float]] = []

    def wait(self, timeout):
        for finished in super().wait(timeout):
            dies = finished.worker == 1 and finished.measurement and "ratios" in finished.measurement.record
            if dies:
                self.deaths.append(self.clock)
                self._later(benchmark.LOADING_SEC, 1, None)
            yield Finished(1, error="boom", died=True) if dies else finished


def test_workers_that_die_when_they_are_tried_are_timed_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SimulatedPool", Mortal)
    Mortal.deaths.clear()
    found = benchmark.run(tmp_path, 4, 60, "auto", 0.0)
    assert [note.partition(" (after")[0] for note in found["notes"]] == [
        "warning: whether 4 workers of a node disturb one another could not be measured (quarantined: 2 workers ended "
        "on it: boom): they are timed one at a time"
    ]
    assert len(Mortal.deaths) == 2, "tried once more, and not again"
    assert found["trials_by_timing"] == {"exclusive": 60} and not StudyFolder(tmp_path).timing.exists()


def test_cores_are_timed_one_at_a_time_whatever_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "resources_here", lambda _: {"CPU": 2, "GPU": 0})
    for asks, space in ((resolve, "default"), (matrix_request, "comprehensive")):
        with pytest.raises(UsageError, match=r"timing concurrent: must be auto or exclusive here, .*; leave it out"):
            asks(parser().parse_args(["--space", space, "--timing", "concurrent"]))
        assert asks(parser().parse_args(["--space", space, "--timing", "exclusive"])).workers.timing == "exclusive"
    with pytest.raises(UsageError, match="timing 'both': must be one of auto, exclusive, concurrent"):
        WorkerSettings(timing="both")
    notes = []
    for host, device, expected in (("a", "cpu", 1), ("b", "cuda", 0)):
        notes.clear()
        of = scheduler(PretendPool(descriptions=[description(host, KIND, device)]), tmp_path)
        while not of.ready:
            of.step()
        timing = Timing("concurrent", StudyFolder(tmp_path), notes.append)
        timing.look(of)
        timing.look(of)
        assert len(notes) == expected
