"""What a dry run says of the cost: its parts against what really happens."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.estimate import _baseline_timing_sec, estimate, timing_sec
from orchestrator.sweep import parser, resolve
from streamllm.engine.loading import configuration_of
from streamllm.measuring import pairing
from streamllm.measuring.pace import Pace, measure_pace
from streamllm.measuring.pairing import LONGEST_REFERENCE_SEC, seconds_of_pairs, take_pairs
from streamllm.policy import EvictionPolicy

from .conftest import GOLDEN

PACE = Pace(block_sec=1.0, key_sec=0.001, token_sec=0.05, total=512)


@pytest.fixture
def quick_timings():
    """They take their time here."""


@pytest.mark.parametrize("segment_sec", [0.01, 0.1, 0.24, 0.5, 1.5, 8.0])
def test_pairs_take_as_long_as_is_said(segment_sec, monkeypatch):
    now, random = [0.0], np.random.default_rng(0)

    def segment(seconds):
        def timed():
            now[0] += seconds
            return random.uniform(1, 2)  # never known well

        return timed

    monkeypatch.setattr(pairing.time, "perf_counter", lambda: now[0])
    take_pairs(segment(segment_sec), segment(min(segment_sec, LONGEST_REFERENCE_SEC)))
    assert now[0] == pytest.approx(seconds_of_pairs(segment_sec), rel=0.2)


def test_longer_cycles_take_longer_to_time():
    times = [timing_sec(PACE, EvictionPolicy(window_size=508, compress_every=r)) for r in (1, 8, 32, 128)]
    assert times == sorted(times) and times[-1] > 2 * times[0]


def test_a_round_takes_the_baseline_about_as_long_as_others():
    """A window a token; of 20 ms, a segment is of several, and twelve pairs are longer than three seconds."""
    assert _baseline_timing_sec(0.02) == pytest.approx((1 + 3 * 13) * 0.02 + 12 * 2 * 8 * 0.02)
    assert _baseline_timing_sec(2.0) == pytest.approx(4 * 2 + 7 * 3)


def configuration(*more):
    what = ("--model", str(GOLDEN / "llama-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--cap", "128")
    return resolve(parser().parse_args([*what, *more]))


def test_the_parts_of_an_estimate():
    found = estimate(PACE, 8192, configuration("--trials", "4", "--confirm", "0"), workers=2, like=())
    assert 0 < found.losses <= PACE.losses(8192) == pytest.approx(32 * 1.512), "policies share their losses"
    assert found.confirming == 0
    assert found.seconds > 4 * (found.timing + found.losses / 2) + found.baseline
    more = estimate(PACE, 8192, configuration("--trials", "4"), workers=2, like=())
    assert more.seconds - found.seconds == pytest.approx(more.confirming) and more.confirming > 0
    assert more.confirming > 3 * 6 * more.timing, "three rounds of seven, and the baseline"
    assert "if it is of 7 candidates" in str(more)
    few, many = (
        estimate(PACE, 8192, configuration("--trials", "4", "--baseline-tokens", n), 2, ()) for n in ("8", "1008")
    )
    assert many.baseline - few.baseline == pytest.approx(1000 * PACE.window() / 2)


def test_what_else_is_measured_takes_its_time(tmp_path):
    def timing(*objectives):
        space = tmp_path / "space.yaml"
        space.write_text(f"objectives: [{', '.join(objectives)}]\nparameters: {{method: ours, n_sink: [0, 4]}}\n")
        return estimate(PACE, 8192, configuration("--space", str(space), "--trials", "2"), 1, ()).timing

    prompt, usual = PACE.losses(128), timing("tpot_ms", "perplexity")
    assert timing("tpot_ms", "perplexity", "joules_per_token") - usual == pytest.approx(14), "seven pairs of a second"
    assert timing("perplexity", "ttft_ms") - usual == pytest.approx(4 * prompt + seconds_of_pairs(prompt))


def test_what_was_measured_is_believed_more():
    like = [{"quality_sec": 3.0, "speed_sec": seconds} for seconds in (5.0, 7.0, 100.0)]
    found = estimate(PACE, 8192, configuration(), 1, like)
    assert (found.losses, found.timing) == (3.0, 7.0)
    assert "medians of 3 trials" in str(found)


def test_pace_is_that_of_all_layers(monkeypatch):
    """Of 2 and of 4 layers by what 1 and 3 take: exactly, if a layer takes a second and the rest a half."""
    from streamllm.measuring import pace

    def fastest(loaded, total):
        return np.array([1.0, 0.1, 0.01]) * (loaded.config.num_hidden_layers + 0.5)

    monkeypatch.setattr(pace, "_fastest", fastest)
    config = configuration_of(str(GOLDEN / "llama-tiny"))
    for layers in (2, 4):
        config.num_hidden_layers = layers
        found = measure_pace(config, torch.float32, 64)
        assert (found.block_sec, found.key_sec, found.token_sec) == pytest.approx(
            (layers + 0.5, 0.1 * (layers + 0.5), 0.01 * (layers + 0.5))
        )


@pytest.mark.parametrize("name", ["llama-tiny", "neox-tiny"])
def test_pace_of_a_model(name):
    found = measure_pace(configuration_of(str(Path(GOLDEN / name))), torch.float32, 64)
    assert 0 < found.token_sec < 5 and found.key_sec >= 0 and found.losses(1000) > 0
    assert all(a <= b for a, b in itertools.pairwise(found.losses(n) for n in (10, 100, 1000)))
