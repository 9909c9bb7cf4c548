import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine import execution
from streamllm.measuring import bench, pairing, timing
from streamllm.measuring.bench import Bench, Leases
from streamllm.measuring.evaluation import times_summary
from streamllm.measuring.jobs import Job
from streamllm.measuring.pairing import between_references, in_turn, take_pairs
from streamllm.measuring.reference_time import ReferencePool, speedup, with_times
from streamllm.measuring.text import TokenStream
from streamllm.measuring.timing import measure_speed
from streamllm.policy import EvictionPolicy, strict_policy
from streamllm.results.schema import Row


@pytest.fixture
def quick_timings():
    """They take their time here."""


class Clock:
    """A machine whose speed changes: `slowness(now)` is what a second's work takes. Replaces `time.perf_counter`."""

    def __init__(self, slowness):
        self.now, self.slowness = 0.0, slowness

    def __call__(self):
        return self.now

    def work(self, seconds):
        took = seconds * self.slowness(self.now)
        self.now += took
        return 1e3 * took


def test_the_order_turns_round_from_round_to_round():
    said = []
    rounds = in_turn([lambda name=name: said.append(name) or len(said) for name in "abc"])
    assert [next(rounds) for _ in range(3)] == [(1, 2, 3), (6, 5, 4), (7, 8, 9)]
    assert "".join(said) == "abccbaabc"


@pytest.mark.parametrize(
    "slowness",
    [lambda now: 1.0, lambda now: 2.0 - now / 20, lambda now: 3.0 if now > 0.4 else 1.0],
    ids=["steady", "becoming quieter", "suddenly busy"],
)
def test_a_machine_that_changes_moves_the_times_and_not_the_ratio(slowness, monkeypatch):
    clock = Clock(slowness)
    monkeypatch.setattr(pairing.time, "perf_counter", clock)
    times = take_pairs(lambda: clock.work(0.03), lambda: clock.work(0.02))
    assert times.ratio.value == pytest.approx(1.5, rel=0.002)
    assert times.ratio.low <= 1.5 <= times.ratio.high
    assert len(times.ms) >= pairing.LEAST_PAIRS


def test_pairs_are_taken_until_the_ratio_is_known_or_time_is_up(monkeypatch):
    clock, random = Clock(lambda now: 1.0), np.random.default_rng(0)
    monkeypatch.setattr(pairing.time, "perf_counter", clock)
    quiet = take_pairs(lambda: clock.work(0.03), lambda: clock.work(0.02))
    noisy = take_pairs(lambda: clock.work(0.03 * random.uniform(1, 3)), lambda: clock.work(0.02))
    slow = take_pairs(lambda: clock.work(4.0), lambda: clock.work(0.02))
    slowest = take_pairs(lambda: clock.work(400.0), lambda: clock.work(0.02))
    assert len(quiet.ms) == pairing.LEAST_PAIRS
    assert pairing.LEAST_PAIRS < len(noisy.ms) <= pairing.MOST_PAIRS
    assert len(slow.ms) == len(slowest.ms) == pairing.FEWEST_PAIRS, "an interval of 95% needs as many"


def test_a_segment_between_two_of_the_reference_is_beside_their_mean():
    times = between_references([10.0, 30.0], [4.0, 6.0, 14.0], 0.0, 1.0)
    assert times.ratios.tolist() == [2.0, 3.0]


def test_the_reference_is_strict_streamingllm_and_as_fast_as_itself(golden_model, golden_tokens):
    loaded = golden_model("neox-tiny")
    reference = timing.Reference.start(loaded, 32, golden_tokens)
    times = timing.measure_times(loaded, Configuration("ring", strict_policy(32)), golden_tokens, reference)
    assert reference.decoder.decoder.schedule.policy == EvictionPolicy(n_sink=4, window_size=28)
    assert times.ratio.low < 1.1 and times.ratio.high > 0.9, "whatever else runs"


def test_segments_have_as_many_tokens_as_time_allows_in_whole_cycles(golden_model, golden_tokens):
    policy = EvictionPolicy(n_sink=2, window_size=30, compress_every=6)
    run = timing.TimedDecoder(golden_model("neox-tiny"), Configuration("ours", policy), golden_tokens)
    lengths = {}
    for run.pace in (1e-4, 2.5e-3, 0.02, 0.1, 8.0):
        lengths[run.pace] = run.segment_length()
    assert lengths == {1e-4: 1002, 2.5e-3: 42, 0.02: 12, 0.1: 6, 8.0: 6}
    run.period = 1
    assert (run.segment_length(), run.segment_length(1e9)) == (1, 1), "a token at a time"


def row(ratio, reference, **more):
    ends = {"time_ratio_low": 0.9 * ratio, "time_ratio_high": 1.1 * ratio}
    known = {"time_ratio": ratio, "reference_tpot_ms": reference, "device": "cpu", "threads": 1}
    return Row.of(known | ends | more)


def test_all_milliseconds_are_in_one_unit_for_each_kind_of_worker():
    rows = with_times([row(2.0, 1.0), row(3.0, 9.0), row(1.0, 3.0), row(2.0, 8.0, threads=2), Row(state="failed")])
    assert [one.get("tpot_ms") for one in rows] == [6.0, 9.0, 3.0, 16.0, None]
    assert rows[0]["tpot_ms_low"] == pytest.approx(5.4) and rows[0]["decode_toks_per_sec"] == pytest.approx(1e3 / 6)
    most, least = ReferencePool(rows).times()
    assert (most.ms, most.timings, least.ms, least.threads) == (3.0, 3, 8.0, 2)
    assert "3 ms on cpu, 1 thread" in str(most) and "8 ms on cpu" in str(least)


def test_a_speedup_is_a_quotient_of_ratios_with_both_their_intervals():
    found = speedup(row(2.0, 1.0), row(10.0, 7.0))
    assert found["speedup"] == 5.0
    half = math.hypot(math.log(0.9), math.log(1.1))
    assert found["speedup_low"] == pytest.approx(5 * math.exp(-half))
    assert found["speedup_high"] == pytest.approx(5 * math.exp(half))


def test_compiled_and_eager_are_timed_beside_the_same_reference(golden_model, golden_tokens):
    loaded = golden_model("llama-tiny")
    reference = timing.Reference.start(loaded, 32, golden_tokens)
    before = reference.decoder
    policy = EvictionPolicy(n_sink=4, window_size=28)
    speed = timing.measure_speed(loaded, Configuration("mit", policy, "math"), golden_tokens, reference)
    assert reference.decoder is before, "it is kept warm"
    assert speed.backend_used == "math" and len(speed.times.ms) == len(speed.times.reference_ms)
    assert torch.isfinite(torch.tensor(speed.times.ms)).all()


def test_compiling_keeps_nobody_from_timing(golden_model, golden_tokens, monkeypatch, tmp_path):
    """What is compiled is, before the lease of what is timed is asked for; with the same shape found again."""
    held, compiled, timed = [], [], []

    @contextmanager
    def lease(name):
        held.append(name)
        yield
        held.remove(name)

    monkeypatch.setattr(timing, "SEGMENT_SEC", 1e-3)
    monkeypatch.setattr(pairing, "ENOUGH_SEC", 0.1)
    monkeypatch.setattr(torch, "compile", lambda step, **_: compiled.append([*held]) or step)
    monkeypatch.setattr(bench, "measure_speed", lambda *_: timed.append([*held]) or measure_speed(*_))
    execution._compiled.cache_clear()
    stream = TokenStream(golden_tokens[:100], "golden", "digest")
    leases = Leases(lambda: lease("timing"), lambda: lease("computing"))
    what = Configuration("ring", EvictionPolicy(n_sink=2, window_size=30), "auto", "compile")
    Bench(golden_model("llama-tiny"), stream, 32, leases).measure(Job("speed", what))
    assert compiled == [["computing"]] and timed == [["timing"]] and not held
    execution._compiled.cache_clear()


def test_on_a_cuda_device_the_reference_is_captured_where_it_can_be(golden_model, golden_tokens, monkeypatch):
    loaded = golden_model("llama-tiny")
    begun, by = [], timing.Reference.by

    def captured(model, total, tokens, execution):
        begun.append(execution)
        if len(begun) == 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        if len(begun) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return by(loaded, total, tokens, "eager")

    monkeypatch.setattr(timing.Reference, "by", captured)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    with pytest.warns(UserWarning, match=r"eager reference: .*\(operation not permitted when stream is capturing\)"):
        reference = timing.Reference.start(on_gpu, 32, golden_tokens)
    assert begun == ["cudagraph", "eager"]
    with pytest.raises(torch.OutOfMemoryError):
        timing.Reference.start(on_gpu, 32, golden_tokens)
    timing.Reference.start(loaded, 32, golden_tokens)
    assert begun[3:] == ["eager"], "there are no graphs on a CPU"
    on_gpu = replace(reference, execution="cudagraph")
    times = timing.measure_times(loaded, Configuration("ring", strict_policy(32)), golden_tokens, on_gpu)
    assert times_summary(times)["reference_execution"] == "cudagraph"


def test_times_beside_eager_and_captured_references_are_of_two_kinds():
    rows = with_times([row(2.0, 20.0), row(8.0, 5.0, reference_execution="cudagraph"), row(2.0, 22.0)])
    assert [one["tpot_ms"] for one in rows] == [42.0, 40.0, 42.0]
    eager, captured = map(str, ReferencePool(rows).times())
    assert captured == "5 ms on cpu, 1 thread, cudagraph" and "cudagraph" not in eager
