import subprocess
import sys

import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.cpu_kernels import has_kernels
from streamllm.engine.device import copy_bandwidth
from streamllm.measuring import timing
from streamllm.policy import EvictionPolicy, steady_state

from .tiny_models import tiny_model


class CountingDecoder:
    """Counts what it is fed; what a segment spans is then known without a clock."""

    def __init__(self):
        self.fed = []

    def feed(self, tokens):
        self.fed.append(len(tokens))
        return torch.zeros(1, 3)


def test_segments_are_whole_prune_cycles_of_a_full_cache(golden_model, golden_tokens, monkeypatch):
    decoders, policy = [], EvictionPolicy(n_sink=2, window_size=30, compress_every=8, max_drop=3)
    loaded = golden_model("neox-tiny")
    reference = timing.Reference.start(loaded, 32, golden_tokens)
    monkeypatch.setattr(timing, "make_decoder", lambda *_: decoders.append(CountingDecoder()) or decoders[-1])
    monkeypatch.setattr(timing, "SEGMENT_SEC", 1e-4)
    speed = timing.measure_speed(loaded, Configuration("ours", policy), golden_tokens, reference)
    steady = steady_state(policy)
    _, timed, _ = decoders  # one shows the kernel, one is timed, one shows attention's share
    assert timed.fed[0] == 31, "the prefill stops short of the first eviction"
    assert speed.tokens_per_segment % steady.cycle == 0
    before = sum(timed.fed) - len(speed.times.ms) * speed.tokens_per_segment
    assert before == 31 + speed.warmup_tokens >= steady.start + timing.WARMUP_TOKENS
    assert (before - steady.start) % steady.cycle == 0, "the first segment begins with a cycle"
    assert speed.tpot_ms.low <= speed.tpot_ms.value <= speed.tpot_ms.high


@pytest.mark.parametrize(
    ("paces", "taken"),
    [
        ([9, 5, 3, 2.95, 1], 4),  # 2.95 is no 3% faster than 3
        ([9, 12, 3], 2),  # of what takes seconds a token, two whole cycles and no more
        ([2.0**-i for i in range(40)], timing._MOST_STRETCHES),  # never steady
    ],
)
def test_warming_up_until_steady(paces, taken, golden_model, golden_tokens, monkeypatch):
    policy = EvictionPolicy(n_sink=2, window_size=30, compress_every=24)
    run = timing.TimedDecoder(golden_model("neox-tiny"), Configuration("ours", policy), golden_tokens)
    asked, paces = [], iter(paces)
    monkeypatch.setattr(run, "decode", lambda count: asked.append(count) or (next(paces) if len(asked) > 1 else 0.0))
    tokens, pace = run.warm_up()
    assert asked == [run.growing] + [24] * taken
    assert tokens == run.growing + 24 * taken
    assert pace > 0


def test_attention_is_a_part_of_the_time(golden_model, golden_tokens, monkeypatch):
    monkeypatch.setattr(timing, "SEGMENT_SEC", 1e-3)
    loaded, policy = golden_model("neox-tiny"), EvictionPolicy(n_sink=2, window_size=30)
    reference = timing.Reference.start(loaded, 32, golden_tokens)
    speed = timing.measure_speed(loaded, Configuration("mit", policy), golden_tokens, reference)
    assert speed.avg_attn_ms > 0
    assert 0 < speed.prefill_sec <= speed.first_token_latency_sec
    assert speed.bandwidth_utilization == pytest.approx(
        speed.bytes_per_token / (speed.tpot_ms.value / 1e3) / copy_bandwidth(torch.device("cpu"))
    )


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_per_token_are_weights_and_cache(tied):
    """Counted by hand: a Llama of two layers, hidden 32, 4 heads and 2 KV heads of size 8, MLP 48, vocabulary 61."""
    loaded = tiny_model("Llama", torch.float32, tie_word_embeddings=tied)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    weights = 2 * layer + 32 + 61 * 32  # layers, final norm, the output layer: its own or the embedding
    cache = 2 * 2 * (2 * 8) * (4 + 20 + 1)
    assert timing.bytes_per_token(loaded, EvictionPolicy(n_sink=4, window_size=20)) == 4 * (weights + cache)


def test_peak_memory_sees_what_was_freed():
    code = """
import streamllm, torch
from streamllm.engine.device import peak_memory
with peak_memory(torch.device("cpu")) as nothing:
    pass
with peak_memory(torch.device("cpu")) as memory:
    torch.ones(64 * 2**20 // 4)
print(nothing.megabytes, memory.megabytes)
"""  # in a new process, which has had no higher peak: not every kernel forgets one when asked
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    nothing, memory = map(float, done.stdout.split())
    assert 0 < nothing <= memory - 48


@pytest.mark.parametrize(
    ("backend", "execution", "used"),
    [("auto", "compile", "cpp"), ("auto", "eager", "flash"), ("math", "compile", "math")],
)
def test_the_kernel_of_compiled_steps_is_named(backend, execution, used, golden_model, golden_tokens):
    if not has_kernels():
        used = {"cpp": "fused"}.get(used, used)
    policy = EvictionPolicy(n_sink=2, window_size=30)
    with BACKENDS[backend].active():
        what = Configuration("ring", policy, backend, execution)
        assert timing.used_backend(golden_model("llama-tiny"), what, golden_tokens) == used
