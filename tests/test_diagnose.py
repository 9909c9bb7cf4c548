"""Losses around prunes: what is compared with what, and what counts as a spike."""

import argparse
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamllm.commands import diagnose
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.errors import UsageError
from streamllm.explain.diagnosis import check_prunes, find_spike, in_words, reference_policy, token_table
from streamllm.policy import EvictionPolicy, evicted_before, prune_starts

from .conftest import GOLDEN

POLICY = EvictionPolicy(n_sink=1, window_size=3, compress_every=4, max_drop=2)
"""By hand: 8 tokens are held after token 8, of which two go after each of tokens 8, 9 and 10, and two after 12."""

policies = st.builds(
    EvictionPolicy,
    n_sink=st.integers(0, 4),
    window_size=st.integers(1, 12),
    compress_every=st.integers(1, 9),
    cache_slack=st.integers(0, 6),
    max_drop=st.integers(0, 5),
)


def test_a_prune_that_goes_on_starts_once():
    assert evicted_before(POLICY, 14) == [0, 0, 0, 0, 0, 0, 0, 0, 2, 4, 6, 6, 8, 8]
    assert prune_starts(POLICY, 14) == [8, 12]
    assert prune_starts(POLICY, 12) == [8]


@given(policies)
@settings(max_examples=50)
def test_without_a_limit_every_eviction_is_a_start(policy):
    policy = EvictionPolicy(n_sink=policy.n_sink, window_size=policy.window_size, compress_every=policy.compress_every)
    assert prune_starts(policy, 80) == [*np.flatnonzero(np.diff(evicted_before(policy, 80))) + 1]


@given(policies)
@settings(max_examples=50)
def test_the_reference_sees_all_that_the_policy_sees(policy):
    reference = reference_policy(policy, 100, None)
    assert reference.compress_every == 1 and reference.n_sink == policy.n_sink
    own, theirs = evicted_before(policy, 100), evicted_before(reference, 100)
    assert all(a >= b for a, b in zip(own, theirs, strict=True))
    largest = max(t + 1 - evicted for t, evicted in enumerate(own))
    assert max(t + 1 - evicted for t, evicted in enumerate(theirs)) == largest, "and no more than its most"


@pytest.mark.parametrize(("trained", "total"), [(None, 287), (256, 256), (280, 280), (300, 287), (100, 256)])
def test_the_reference_stays_where_the_model_was_trained(trained, total):
    policy = EvictionPolicy(n_sink=4, window_size=252, compress_every=32)
    assert reference_policy(policy, 1000, trained).kept == total


def test_a_row_per_token():
    losses = np.arange(14.0)
    table = token_table(POLICY, losses, losses / 2)
    assert table["token"].tolist() == [*range(1, 15)]
    assert table["excess"].tolist() == [*(losses / 2)]
    assert table["evicted"].tolist() == evicted_before(POLICY, 14)
    assert table["keys"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 6, 5, 6]
    assert table.index[table["prune"]].tolist() == [8, 12]
    assert table["since_prune"].isna().sum() == 8
    assert table["since_prune"].dropna().tolist() == [0, 1, 2, 3, 0, 1]


def made_excess(shape, noise=0.1, prunes=400, seed=0):
    """`shape` after each prune over and over, in noise."""
    starts = [*range(20, 20 + prunes * len(shape), len(shape))]
    excess = np.zeros(starts[-1] + len(shape))
    for start in starts:
        excess[start : start + len(shape)] = shape
    return excess + np.random.default_rng(seed).normal(0, noise, len(excess)), starts


def test_a_known_spike_is_found():
    """0.3 nats, two tokens after the prune, for four tokens; a level of 0.2 all the time."""
    shape = np.full(32, 0.2)
    shape[2:6] += 0.3
    spike = find_spike(*made_excess(shape))
    assert (spike.interval, spike.before, spike.peak_tokens, spike.peak_at) == (32, 8, 4, 2)
    assert spike.prunes == 400
    for estimate, truth in (
        (spike.level, 0.2),
        (spike.jump, 0.0),
        (spike.peak, 0.3),
        (spike.area, 1.2),
        (spike.width, 4.0),
    ):
        assert estimate.low <= truth <= estimate.high
        assert estimate.value == pytest.approx(truth, rel=0.1, abs=0.02)
    assert spike.offsets.tolist() == [*range(-8, 32)]
    np.testing.assert_allclose(spike.curve[8:], shape, atol=0.02)
    assert ((spike.low <= spike.curve) & (spike.curve <= spike.high)).all()
    assert in_words(spike, 96, 256).startswith("A spike: a prune costs 1.16 nats")


def test_the_highest_of_noise_is_no_peak():
    """Where the same prunes say where the peak is and how high, it is two standard errors and more, every time."""
    peaks = [find_spike(*made_excess(np.zeros(32), prunes=40, seed=seed)).peak for seed in range(20)]
    standard_error = 0.1 / np.sqrt(4 * 40)
    assert abs(np.mean([peak.value for peak in peaks])) < standard_error
    assert sum(peak.low > 0 for peak in peaks) <= 3
    noise = find_spike(*made_excess(np.zeros(32), seed=1))
    assert noise.width is None
    assert in_words(noise, 96, 256).startswith("No spike to be told from noise")


def test_a_cache_that_outgrows_the_model_is_relieved_by_a_prune():
    spike = find_spike(*made_excess(np.linspace(0, 0.3, 16)))
    assert spike.area.high < 0
    words = in_words(spike, 288, 256)
    assert words.startswith("No spike but a relief") and words.endswith("to 288 keys, the model was trained on 256.")
    assert "trained" not in in_words(spike, 257, 256), "a full cache and the query's own key are meant"


def test_long_intervals_are_drawn_in_means_that_do_not_cross_the_prune():
    excess, starts = made_excess(np.repeat([1.0, 0.0], 75), noise=0)
    spike = find_spike(excess, starts)
    assert spike.before == 37 and spike.interval == 150
    assert len(spike.curve) <= 84
    assert set(spike.curve.round(12)) == {0.0, 1.0}
    assert np.diff(spike.offsets).tolist() == [3.0] * (len(spike.offsets) - 1)
    assert (spike.curve[spike.offsets < 0] == 0).all()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"compress_every": 0}, "0 prunes in 500 tokens"),
        ({"compress_every": 64}, "7 prunes in 500 tokens, at least 10 are needed"),
        ({"compress_every": 8, "max_drop": 1}, "1 prunes in 500 tokens"),
        ({"compress_every": 1}, "give --compress-every >= 2 or --cache-slack >= 1"),
    ],
)
def test_nothing_to_diagnose_is_said(knobs, message):
    with pytest.raises(UsageError, match=message):
        check_prunes(EvictionPolicy(n_sink=2, window_size=10, **knobs), 500)
    check_prunes(EvictionPolicy(n_sink=2, window_size=10, cache_slack=1), 500)


def test_the_command(tmp_path, capsys, golden_model, golden_tokens):
    parser = argparse.ArgumentParser()
    diagnose.add_arguments(parser)
    model = ("--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--dtype", "float32")
    knobs = ("--n-sink", "2", "--window-size", "30", "--compress-every", "16", "--threads", "1")
    output = ("--store", str(tmp_path / "store"), "--output-dir", str(tmp_path / "out"))
    arguments = parser.parse_args([*model, *knobs, *output, "--json"])
    assert diagnose.run(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == record
    assert not any(isinstance(value, dict | list) for value in record.values())
    assert (record["interval"], record["peak_kv"], record["reference_total"]) == (16, 48, 47)

    table = pd.read_parquet(tmp_path / "out" / "losses.parquet")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "losses.csv"), table, check_dtype=False)
    own = EvictionPolicy(n_sink=2, window_size=30, compress_every=16)
    reference = EvictionPolicy(n_sink=2, window_size=45)
    for name, policy in (("loss", own), ("reference_loss", reference)):
        expected = block_parallel_losses(golden_model("neox-tiny"), golden_tokens, policy)
        np.testing.assert_allclose(table[name], expected, atol=1e-6)
    assert record["ppl_increase_percent"] == pytest.approx(100 * np.expm1(table["excess"].mean()))
    assert (tmp_path / "out" / "spike.png").read_bytes().startswith(b"\x89PNG")

    arguments.json = False
    assert diagnose.run(arguments) == 0
    shown = capsys.readouterr().out
    assert record["summary"] in shown and "area until the next prune, nats" in shown
