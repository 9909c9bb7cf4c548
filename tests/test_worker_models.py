"""A worker with a model per quantization: what it keeps, what it lets go, and what its records say."""

from collections import OrderedDict
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from orchestrator.driver import Driver, _unquantized
from orchestrator.workers.messages import TrialMeasurement, TrialSpec, WorkerSetup
from orchestrator.workers.worker import Worker
from search_spaces import load_space
from streamllm.configuration import Configuration
from streamllm.engine import loading as models
from streamllm.errors import UsageError
from streamllm.measuring import measurements
from streamllm.measuring.reference_time import ReferencePool, kind
from streamllm.measuring.store import MeasurementStore
from streamllm.measuring.text import TextSource
from streamllm.policy import EvictionPolicy
from streamllm.results.schema import Row

from .conftest import GOLDEN

POLICY = EvictionPolicy(window_size=44)
QUANTIZATIONS = ("none", "int8_weight_only")


def spec(quantization, **how):
    number = how.pop("round", 0)
    return TrialSpec(Configuration("ring", POLICY, "math", quantization=quantization, **how), round=number)


@pytest.fixture
def loads(monkeypatch):
    """Every load of a model, by its quantization."""
    seen = []
    load = models.load_model

    def counted(name, dtype, quantization="none"):
        seen.append(quantization)
        return load(name, dtype, quantization=quantization)

    monkeypatch.setattr(models, "load_model", counted)
    return seen


@pytest.fixture
def worker_of(tmp_path, monkeypatch, loads):
    def claim(self):
        self.cores = []
        return []

    def make(quantization="none"):
        source = TextSource(token_ids=GOLDEN / "tokens.json", max_eval_tokens=100)
        setup = WorkerSetup(str(GOLDEN / "neox-tiny"), source, "float32", quantization, tmp_path / "store", 48)
        one = Worker(setup, 1, "")
        one.load()
        return one

    monkeypatch.setattr(Worker, "_claim", claim)
    return make


def test_each_quantization_is_a_model_of_its_own_beside_one_reference(worker_of, loads):
    pytest.importorskip("torchao")
    worker = worker_of()
    found = {name: worker.measure(spec(name)) for name in (None, *QUANTIZATIONS)}
    digest = worker.loaded.digest
    assert loads == [*QUANTIZATIONS], "each once, the unquantized one when the worker began"
    assert "quantization" not in found[None].record and "reference_digest" not in found[None].record
    for name in QUANTIZATIONS:
        record = found[name].record
        assert (record["quantization"], record["reference_digest"]) == (name, digest)
        assert record["model_digest"] == (digest if name == "none" else f"{digest} {name}")
        assert _unquantized(record["model_digest"]) == digest
    losses = [found[name].losses[:, 1].mean() for name in QUANTIZATIONS]
    assert len(set(losses)) == 2 and max(losses) - min(losses) < 0.5
    assert found["none"].losses.tolist() == found[None].losses.tolist()
    assert not found["none"].measured_speed, "it is what the sweep without the knob measured"
    assert {kind(of.record) for of in found.values()} == {kind(found[None].record)}, "one unit for all milliseconds"
    references = {id(worker._models[name].reference) for name in QUANTIZATIONS}
    assert references == {id(worker.measurements.reference)}
    assert worker.measure(spec("int8_weight_only", round=1)).ratios
    assert len(loads) == 2


def test_timings_beside_another_models_reference_are_kept_apart(worker_of):
    """The same weights, quantized in all of a sweep or by its space: the ratios are to other references."""
    pytest.importorskip("torchao")
    searched = worker_of()._measurements_of(spec("int8_weight_only"))
    fixed = worker_of("int8_weight_only").measurements
    what = Configuration("ring", POLICY, "math")
    assert searched._quality_key(Configuration("ring", POLICY)) == fixed._quality_key(Configuration("ring", POLICY))
    assert searched._speed_key(what) == fixed._speed_key(what) | {"reference_digest": searched.beside.loaded.digest}


def test_memory_of_the_other_models_does_not_count(worker_of, monkeypatch):
    pytest.importorskip("torchao")
    worker = worker_of()
    size = sum(p.nbytes for p in worker.loaded.model.parameters()) / 2**20
    assert worker._megabytes_beside("none") == 0
    worker._measurements_of(spec("int8_weight_only"))
    assert worker._models["int8_weight_only"].neighbours() >= size > worker.measurements.neighbours() > 0
    monkeypatch.setattr(measurements, "measure_speed", lambda *_: None)
    monkeypatch.setattr(measurements, "speed_summary", lambda *_: {"peak_memory_mb": 100.0})
    measured, _ = worker.measurements.speed(Configuration("ring", POLICY, "math"))
    assert measured.record["peak_memory_mb"] == 100.0 - worker.measurements.neighbours()


class Small(Worker):
    """So many models fit; loading one more, or measuring beside them, runs out of memory."""

    fits = 2

    def _measure(self, spec):
        self._measurements_of(spec)
        self.seen.append(list(self._models))
        if len(self._models) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return TrialMeasurement(Row(), np.empty((0, 2)), True, True)


@pytest.fixture
def small(tmp_path, monkeypatch):
    loaded = SimpleNamespace(device=torch.device("cpu"), model=torch.nn.Linear(2, 2), digest="d")
    monkeypatch.setattr(models, "load_model", lambda name, dtype, quantization="none": loaded)
    worker = Small(WorkerSetup("m", TextSource(), "float32", "none", tmp_path, 48), 1, "")
    worker.loaded, worker.stream, worker.seen = loaded, None, []
    from streamllm.measuring.measurements import Measurements

    worker.measurements = Measurements(MeasurementStore(tmp_path), loaded, None, 48)
    worker._models = OrderedDict(none=worker.measurements)
    return worker


def test_the_model_used_longest_ago_goes_first_where_memory_is_short(small):
    small.fits = 3
    for name in ("a", "b", "a", "c"):
        small.measure(spec(name))
    assert small.seen[-2:] == [["none", "b", "a", "c"], ["none", "a", "c"]]
    small.fits = 2
    small.measure(spec("c"))
    assert small.seen[-1] == ["none", "c"]
    small.fits = 1
    small.measure(spec("none"))
    assert small.seen[-1] == ["none"]


def test_where_nothing_can_be_spared_memory_is_short(small):
    small.fits = 1
    with pytest.raises(MemoryError, match="out of accelerator memory: CUDA out of memory"):
        small.measure(spec("a"))
    assert small.seen == [["none", "a"]], "the reference's model and the trial's stay"


def test_a_study_goes_on_whose_first_row_is_quantized(tmp_path):
    (tmp_path / "space.yaml").write_text("parameters: {n_sink: 4}")
    study = SimpleNamespace(
        rows=[{"model_digest": "d int8_weight_only"}], space=load_space(str(tmp_path / "space.yaml"))
    )
    driver = Driver(study, None, 48, 1, [])
    driver._check_same({"host": "here", "model_digest": "d"})
    with pytest.raises(UsageError, match="model on here: e"):
        driver._check_same({"host": "here", "model_digest": "e"})


def test_a_round_confirms_what_was_measured():
    row = {"method": "ring", "backend_requested": "math", "execution": "compile", **asdict(POLICY)}
    again = Configuration.of_row(row | {"quantization": "int8_weight_only"})
    assert again == spec("int8_weight_only", execution="compile").configuration
    assert Configuration.of_row(row).quantization is None


def test_rows_beside_another_reference_are_in_its_unit():
    plain = Row(model_digest="d", device="gpu", reference_tpot_ms=4.0, time_ratio=1.0)
    quantized = plain | {"model_digest": "d int8", "quantization": "int8", "reference_digest": "d", "time_ratio": 0.5}
    pool = ReferencePool([plain, quantized | {"reference_tpot_ms": 8.0}, quantized | {"reference_tpot_ms": 4.0}])
    assert pool.with_time(plain)["tpot_ms"] == 4.0 and pool.with_time(quantized)["tpot_ms"] == 2.0
