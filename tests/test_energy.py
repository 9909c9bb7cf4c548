import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.energy import GpuCounter, PackageCounter, energy_counter
from streamllm.errors import UnavailableError
from streamllm.measuring import energy
from streamllm.measuring.timing import Reference
from streamllm.policy import EvictionPolicy

from .refusals import command, refusal

WATTS = 40.0


class Clock:
    """Stands still but for what is decoded, a token in 3 ms."""

    device, period = torch.device("cpu"), 8

    def __init__(self):
        self.now, self.tokens = 5.017, 0

    def perf_counter(self):
        return self.now

    def step(self):
        self.now += 0.003
        self.tokens += 1


class SteppingCounter:
    """As if the device drew 40 W, and its counter told so every `period` seconds only."""

    covers = "a made-up device"

    def __init__(self, period, clock=time):
        self.period, self.clock = period, clock

    def joules(self):
        return WATTS * self.period * (self.clock.perf_counter() // self.period)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(energy, "time", clock)
    return clock


@pytest.mark.parametrize(("period", "lasts"), [(0.02, energy.LEAST_SEC), (0.3, 9 * 0.3)])
def test_joules_per_token_are_power_times_time(period, lasts, clock):
    """Of a counter that moves seldom, over longer segments."""
    joules, seconds = energy.segment_joules(clock, SteppingCounter(period, clock))
    assert joules == pytest.approx(WATTS * 0.003, rel=0.008), "a step is seen 6 ms late at most"
    assert lasts <= seconds <= lasts + 2 * period
    assert seconds == pytest.approx(0.003 * clock.tokens)
    assert clock.tokens % clock.period == 0, "whole prune cycles"


def test_a_counter_that_hardly_moves_is_refused(clock):
    with pytest.raises(UnavailableError, match="energy: the counter moved 7 times in 20 s: it takes 10"):
        energy.segment_joules(clock, SteppingCounter(3.0, clock))


def test_energy_is_a_ratio_to_the_references(golden_model, golden_tokens, monkeypatch):
    monkeypatch.setattr(energy, "LEAST_SEC", 0.05)
    monkeypatch.setattr(energy, "LEAST_STEPS", 3)
    loaded = golden_model("neox-tiny")
    reference = Reference.start(loaded, 32, golden_tokens)
    what = Configuration("recompute", EvictionPolicy(n_sink=0, window_size=32))
    found = energy.measure_energy(loaded, what, golden_tokens, reference, SteppingCounter(0.002))
    assert len(found.joules) == len(found.reference_joules) == energy.FEWEST_PAIRS
    summary = found.summary()
    assert summary["energy_ratio"] == pytest.approx(np.median(np.divide(found.joules, found.reference_joules)))
    assert summary["energy_ratio_low"] <= summary["energy_ratio"] <= summary["energy_ratio_high"]
    assert summary["energy_of"] == "a made-up device"
    assert summary["energy_segment_sec"] >= 0.05


def zone(folder, name, microjoules, most=1000):
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_packages_are_added_up_and_counted_past_their_range(tmp_path):
    first = zone(tmp_path / "intel-rapl:0", "package-0", 900)
    second = zone(tmp_path / "intel-rapl:1", "package-1", 100)
    zone(tmp_path / "intel-rapl:2", "psys", 5)
    zone(tmp_path / "intel-rapl:0:0", "core", 5)
    counter = PackageCounter.found(tmp_path)
    assert counter.covers.startswith("CPU package-0 and package-1 with")
    assert counter.joules() == 0.0
    second.write_text("400\n")
    assert counter.joules() == pytest.approx(300e-6)
    first.write_text("50\n")  # past 1000
    assert counter.joules() == pytest.approx(450e-6)


def test_without_a_counter_there_is_no_energy(tmp_path, monkeypatch):
    with pytest.raises(UnavailableError, match="energy: no counter: this CPU shows none"):
        PackageCounter.found(tmp_path)
    zone(tmp_path / "intel-rapl:0", "package-0", 900)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UnavailableError, match="may be read by root only; take energy out"):
        PackageCounter.found(tmp_path)
    with pytest.raises(UnavailableError, match="of mps we know no counter"):
        energy_counter(torch.device("mps"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UnavailableError, match="pip install nvidia-ml-py"):
        GpuCounter.of("1")


def test_a_command_says_so_before_anything_is_loaded(monkeypatch):
    def none(device):
        raise UnavailableError(f"energy: no counter of {device.type}")

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("streamllm.engine.energy.energy_counter", none)
    monkeypatch.setattr("streamllm.evaluating.load_model_and_texts", loaded)
    assert refusal(command("evaluate", "--energy")).startswith("energy: no counter of ")
    with pytest.raises(AssertionError, match="was loaded"):
        command("evaluate")


class NVMLError(Exception):
    pass


def nvml(handles, parts=lambda _: (0, 0)):
    def handle(name):
        if name not in handles:
            raise NVMLError("Not Found")
        return name

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=lambda of: handles[of],
        nvmlDeviceGetMigMode=parts,
    )


def test_the_gpus_own_counter_is_in_millijoules(monkeypatch):
    def knows_no_parts(_):
        raise NVMLError("Not Supported")

    for parts in (lambda _: (0, 0), knows_no_parts):
        monkeypatch.setitem(sys.modules, "pynvml", nvml({"GPU-a": 7, "GPU-b": 2500}, parts))
        assert GpuCounter.of("b").joules() == 2.5
    with pytest.raises(UnavailableError, match="NVML says of GPU-c: Not Found"):
        GpuCounter.of("c")
    monkeypatch.setitem(sys.modules, "pynvml", nvml({"GPU-a": 7}, lambda _: (1, 1)))
    with pytest.raises(UnavailableError, match="shared out"):
        GpuCounter.of("a")
