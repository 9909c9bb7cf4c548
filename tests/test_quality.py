import math

import numpy as np
import pytest

from streamllm.quality import (
    NonFiniteLossError,
    baseline_positions,
    check_finite,
    median_interval,
    paired_increase,
    perplexity,
)


def test_perplexity_is_exp_of_the_mean_and_lies_in_its_interval():
    losses = np.random.default_rng(1).exponential(2.0, 5000)
    estimate = perplexity(losses)
    assert estimate.value == pytest.approx(math.exp(losses.mean()))
    assert estimate.low < estimate.value < estimate.high


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(2)
    baseline = rng.exponential(2.0, 500)
    worse = baseline + math.log(1.05) + rng.normal(0, 0.02, 500)
    spread = np.arange(0, 5000, 10)
    increase = paired_increase(np.column_stack((spread, worse)), np.column_stack((spread, baseline)))
    assert increase.low < 5.0 < increase.high
    assert increase.high - increase.low < 1.0, "unpaired, the interval would be wider than 10"


def test_only_tokens_that_both_have_are_compared():
    own = np.array([[0, 9.0], [1, 1.0], [2, 2.0], [3, 9.0]])
    baseline = np.array([[1, 1.0], [2, 1.0], [5, 0.0]])
    assert paired_increase(own, baseline).value == pytest.approx(100 * (math.exp(0.5) - 1))
    with pytest.raises(ValueError, match="no token"):
        paired_increase(own[:1], baseline)


def test_neighbouring_tokens_are_resampled_in_blocks():
    """Differences that come in runs: counted as independent, their interval would be far too narrow."""
    runs = np.repeat(np.random.default_rng(4).normal(0, 0.1, 100), 64)
    baseline = np.column_stack((np.arange(6400), np.ones(6400)))
    increase = paired_increase(baseline + np.column_stack((np.zeros(6400), runs)), baseline)
    assert 3.0 < increase.high - increase.low < 5.0, "4 * 0.1 / sqrt(100) is 4%; of 6400 tokens it would be 0.5%"


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(3)
    hits = sum((e := median_interval(rng.normal(0, 1, 12))).low <= 0 <= e.high for _ in range(2000))
    assert 0.945 <= hits / 2000 <= 0.98, "the exact coverage of [x3, x10] is 96.1%"


def test_median_of_few_values_has_the_whole_range():
    estimate = median_interval(np.array([3.0, 1.0, 2.0]))
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 1.0, 3.0)


def test_baseline_positions_are_spread_over_the_text():
    positions = baseline_positions(1000, 10)
    assert positions[0] == 0
    assert positions[-1] == 998
    assert len(set(positions)) == 10
    assert baseline_positions(5, 10).tolist() == [0, 1, 2, 3]


def test_a_loss_that_is_no_number_names_token_and_cure():
    with pytest.raises(NonFiniteLossError, match=r"token 2 .*float16.*bfloat16"):
        check_finite(np.array([1.0, np.inf, np.nan]), "torch.float16")
