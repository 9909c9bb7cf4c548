"""A worker with a model per quantization: what it keeps, what it lets go, and what its records say."""

from collections import OrderedDict
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from orchestrator.workers import worker as worker_module
from orchestrator.workers.kinds import Kinds, unquantized
from orchestrator.workers.messages import Assignment, Subject, Variant, WorkerSetup
from orchestrator.workers.worker import Worker
from streamllm.configuration import Configuration
from streamllm.engine import loading as models
from streamllm.errors import UsageError
from streamllm.measuring import bench
from streamllm.measuring.bench import NO_LEASES
from streamllm.measuring.jobs import Job
from streamllm.measuring.keys import Keys
from streamllm.measuring.reference_time import ReferencePool
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import EvictionPolicy
from streamllm.results.schema import Row

from .conftest import GOLDEN
from .pretended import TEXT, description

POLICY = EvictionPolicy(window_size=44)
QUANTIZATIONS = ("none", "int8_weight_only")
PLAIN, INT8 = (Variant("float32", name) for name in QUANTIZATIONS)


def what(quantization, **how):
    return Configuration("ring", POLICY, "math", quantization=quantization, **how)


def assignment(quantization, kind="speed", text="t", **how):
    return Assignment.of(Subject(text, PLAIN, 48), Job(kind, what(quantization), **how))


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
        one = Worker(WorkerSetup(str(GOLDEN / "neox-tiny"), Variant("float32", quantization), tmp_path), 1, "")
        one.load()
        return one

    monkeypatch.setattr(Worker, "_claim", claim)
    return make


@pytest.fixture(scope="module")
def text():
    return load_tokens(TextSource(token_ids=GOLDEN / "tokens.json", max_eval_tokens=100), None, 10**6)


def test_each_quantization_is_a_model_of_its_own_beside_one_reference(worker_of, loads, text):
    pytest.importorskip("torchao")
    worker, names = worker_of(), (None, *QUANTIZATIONS)
    asked = {name: assignment(name, "quality", text.digest) for name in names}
    found = {name: worker.measure(asked[name], text) for name in names}
    assert loads == [*QUANTIZATIONS], "each once, the unquantized one when the worker began"
    digests = {name: worker.conditions(asked[name].subject.variant).model_digest for name in names}
    assert digests == {
        None: digests[None],
        "none": digests[None],
        "int8_weight_only": f"{digests[None]} int8_weight_only",
    }
    assert unquantized(digests["int8_weight_only"]) == digests[None]
    losses = [found[name].losses[:, 1].mean() for name in QUANTIZATIONS]
    assert len(set(losses)) == 2 and max(losses) - min(losses) < 0.5
    assert asked["none"].subject == asked[None].subject, "it is what the sweep without the knob measured"
    benches = [worker._bench(asked[name].subject) for name in names]
    assert {id(of.reference) for of in benches} == {id(benches[0].reference)}
    assert worker.measure(assignment("int8_weight_only", "times", text.digest, run=1), text).record["ratios"]
    assert len(loads) == 2


def test_the_driver_says_whether_others_are_timed_meanwhile(worker_of, monkeypatch, text):
    """On cores the lease is the same; see `leases_on`."""
    leases = []
    monkeypatch.setattr(worker_module, "leases_on", lambda *of: leases.append(of) or NO_LEASES)
    worker, one = worker_of(), assignment(None, "quality", text.digest)
    for asked in (one, one._replace(side_by_side=True)):
        worker.measure(asked, text)
    assert leases == [("cpu", False), ("cpu", True)]


def test_timings_beside_another_models_reference_are_kept_apart(worker_of, text):
    """The same weights, quantized in all of a sweep or by its space: the ratios are to other references."""
    pytest.importorskip("torchao")
    conditions = {variant: worker_of().conditions(variant) for variant in (PLAIN, INT8)}
    searched = Keys(conditions[INT8], text, 48, conditions[PLAIN].model_digest)
    fixed = Keys(conditions[INT8], text, 48)
    quality, speed = (Job(kind, what(None)) for kind in ("quality", "speed"))
    assert searched.of(quality) == fixed.of(quality)
    assert searched.of(speed) == fixed.of(speed) | {"reference_digest": conditions[PLAIN].model_digest}


def test_memory_of_the_other_models_does_not_count(worker_of, monkeypatch, text):
    pytest.importorskip("torchao")
    worker = worker_of()
    size = sum(p.nbytes for p in worker._models[PLAIN].model.parameters()) / 2**20
    assert worker._megabytes_beside(PLAIN) == 0
    worker.conditions(INT8)
    assert worker._megabytes_beside(INT8) >= size > worker._megabytes_beside(PLAIN) > 0
    monkeypatch.setattr(bench, "measure_speed", lambda *_: None)
    monkeypatch.setattr(bench, "speed_summary", lambda *_: {"peak_memory_mb": 100.0})
    measured = worker.measure(assignment(None, text=text.digest), text)
    assert measured.record["peak_memory_mb"] == 100.0 - worker._megabytes_beside(PLAIN)


class Small(Worker):
    """So many models fit; loading one more, or measuring beside them, runs out of memory."""

    fits = 2

    def _measure(self, assignment, against=()):
        self._bench(assignment.subject)
        self.seen.append([variant.quantization for variant in self._models])
        if len(self._models) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def small(monkeypatch):
    loaded = SimpleNamespace(device=torch.device("cpu"), model=torch.nn.Linear(2, 2), digest="d")
    monkeypatch.setattr(models, "load_model", lambda name, dtype, quantization="none": loaded)
    worker = Small(WorkerSetup("m", PLAIN), 1, "")
    worker.seen, worker._models = [], OrderedDict({PLAIN: loaded})
    return worker


def test_the_model_used_longest_ago_goes_first_where_memory_is_short(small):
    small.fits = 3
    for name in ("a", "b", "a", "c"):
        small.measure(assignment(name), TEXT)
    assert small.seen[-2:] == [["b", "a", "none", "c"], ["a", "none", "c"]]
    small.fits = 2
    small.measure(assignment("c"), TEXT)
    assert small.seen[-1] == ["none", "c"]
    small.fits = 1
    small.measure(assignment("none"), TEXT)
    assert small.seen[-1] == ["none"]


def test_where_nothing_can_be_spared_memory_is_short(small):
    small.fits = 1
    with pytest.raises(MemoryError, match="out of accelerator memory: CUDA out of memory"):
        small.measure(assignment("a"), TEXT)
    assert small.seen == [["none", "a"]], "the reference's model and the trial's stay"


def test_a_study_goes_on_whose_first_row_is_quantized():
    kinds = Kinds([Row(model_digest="d int8_weight_only")], lambda _: None)
    kinds.check(0, description(model_digest="d"))
    with pytest.raises(UsageError, match="model on here: e"):
        kinds.check(0, description(model_digest="e"))


def test_a_model_that_may_not_fit_takes_the_place_of_one_that_was_used_longest_ago(small, monkeypatch):
    small.fits = 9
    monkeypatch.setattr("streamllm.engine.device.free_memory", lambda device: 1)
    for name in ("a", "b"):
        small.measure(assignment(name), TEXT)
    assert small.seen == [["none", "a"], ["none", "b"]]


def test_a_round_confirms_what_was_measured():
    row = {"method": "ring", "backend_requested": "math", "execution": "compile", **asdict(POLICY)}
    assert Configuration.of_row(row | {"quantization": "int8_weight_only"}) == what(
        "int8_weight_only", execution="compile"
    )
    assert Configuration.of_row(row).quantization is None


def test_rows_beside_another_reference_are_in_its_unit():
    plain = Row(model_digest="d", device="gpu", reference_tpot_ms=4.0, time_ratio=1.0)
    quantized = plain | {"model_digest": "d int8", "quantization": "int8", "reference_digest": "d", "time_ratio": 0.5}
    pool = ReferencePool([plain, quantized | {"reference_tpot_ms": 8.0}, quantized | {"reference_tpot_ms": 4.0}])
    assert pool.with_time(plain)["tpot_ms"] == 4.0 and pool.with_time(quantized)["tpot_ms"] == 2.0
