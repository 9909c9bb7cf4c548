import math

import numpy as np
import pytest

from streamllm.measuring.quality import (
    NonFiniteLossError,
    QualityComparison,
    check_finite,
    median_interval,
    paired_increase,
    perplexity,
)
from streamllm.measuring.sample import sample_positions


def table(losses, positions=None):
    return np.column_stack((np.arange(len(losses)) if positions is None else positions, losses))


def correlated(random, texts, tokens, length):
    """(texts, tokens): standard normal values whose correlation falls to 1/e over `length` tokens."""
    memory = math.exp(-1 / length)
    values = random.normal(size=(texts, tokens))
    values[:, 1:] *= math.sqrt(1 - memory**2)
    for token in range(1, tokens):
        values[:, token] += memory * values[:, token - 1]
    return values


def coverage(intervals, truth):
    return np.mean([estimate.low <= truth <= estimate.high for estimate in intervals])


def test_perplexity_is_exp_of_the_mean_and_lies_in_its_interval():
    losses = np.random.default_rng(1).exponential(2.0, 5000)
    estimate = perplexity(losses)
    assert estimate.value == pytest.approx(math.exp(losses.mean()))
    assert estimate.low < estimate.value < estimate.high
    reference = QualityComparison(table(losses - 0.5))
    assert reference.perplexity(table(losses)).value == pytest.approx(estimate.value)
    assert reference.perplexity(table(losses)).low == pytest.approx(estimate.low)


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(2)
    baseline = rng.exponential(2.0, 500)
    worse = baseline + math.log(1.05) + rng.normal(0, 0.02, 500)
    spread = np.arange(0, 5000, 10)
    increase = paired_increase(table(worse, spread), table(baseline, spread))
    assert increase.low < 5.0 < increase.high
    assert increase.high - increase.low < 1.0, "unpaired, the interval would be wider than 10"


def test_only_tokens_that_both_have_are_compared():
    own = np.array([[0, 9.0], [1, 1.0], [2, 2.0], [3, 9.0]])
    baseline = np.array([[1, 1.0], [2, 1.0], [5, 0.0]])
    assert paired_increase(own, baseline).value == pytest.approx(100 * (math.exp(0.5) - 1))
    with pytest.raises(ValueError, match="no token"):
        paired_increase(own[:1], baseline)
    with pytest.raises(ValueError, match="no token"):
        QualityComparison(own).vs_strict(baseline[2:])
    with pytest.raises(ValueError, match="no baseline"):
        QualityComparison(own).increase(own)


def made_text(tokens=4000, every=40):
    """Losses at every token of a reference and a policy 2% worse, and of a baseline 3% better at every 40th."""
    random = np.random.default_rng(9)
    reference = random.exponential(3.0, tokens)
    policy = reference + math.log(1.02) + random.normal(0, 0.05, tokens)
    baseline = reference - math.log(1.03) + random.normal(0, 0.3, tokens)
    return table(reference), table(policy), table(baseline), table(baseline)[::every]


def test_policies_are_beside_the_baseline_over_all_tokens_though_it_is_known_at_few():
    reference, policy, everywhere, sample = made_text()
    comparison = QualityComparison(reference, sample)
    expected = (policy - reference)[:, 1].mean() + (reference[::40] - sample)[:, 1].mean()
    increase = comparison.increase(policy)
    assert increase.value == pytest.approx(100 * math.expm1(expected))
    assert increase.low < 100 * (1.02 * 1.03 - 1) < increase.high
    strict = comparison.vs_strict(policy)
    assert strict.low < 2.0 < strict.high and strict.high - strict.low < 0.1 * (increase.high - increase.low)
    own = comparison.increase(sample)
    assert own.value == own.low == own.high == 0.0
    assert comparison.perplexity(sample).value == pytest.approx(
        math.exp(reference[:, 1].mean() + (sample - reference[::40])[:, 1].mean())
    )
    complete = QualityComparison(reference, everywhere).increase(policy)
    assert complete.value == pytest.approx(paired_increase(policy, everywhere).value, rel=1e-9)
    assert complete.low == pytest.approx(paired_increase(policy, everywhere).low, rel=1e-9)


def test_draws_have_the_intervals_of_single_policies_and_pair_their_differences():
    reference, policy, _, sample = made_text()
    hardly_worse = policy + np.array([0, 1e-4])
    comparison = QualityComparison(reference, draws=40_000)
    drawn = comparison.draws([policy, hardly_worse, sample])
    for column, losses in zip(drawn.T, (policy, hardly_worse, sample), strict=True):
        alone, low, high = comparison.vs_strict(losses), *(100 * np.expm1(np.quantile(column, (0.025, 0.975))))
        assert high - low == pytest.approx(alone.high - alone.low, rel=0.04), "normal draws are 17% narrower"
        assert (low + high) / 2 == pytest.approx(alone.value, abs=0.05 * (high - low))
    assert np.allclose(drawn[:, 1] - drawn[:, 0], 1e-4)
    assert comparison.draws([]).shape == (40_000, 0)


@pytest.mark.parametrize("tokens", [1, 2, 10, 200])
def test_texts_of_a_few_tokens(tokens):
    reference, policy, baseline, _ = made_text(tokens)
    comparison = QualityComparison(reference, baseline[::3])
    estimates = comparison.perplexity(policy), comparison.vs_strict(policy), comparison.increase(policy)
    for estimate in (*estimates, perplexity(policy[:, 1]), paired_increase(policy, baseline)):
        assert estimate.low <= estimate.value <= estimate.high or (math.isnan(estimate.low) and tokens <= 2)
    assert comparison.draws([policy, baseline[::3]]).shape == (2000, 2)


def test_intervals_cover_what_few_blocks_let_them_know():
    """Without Student's t, 91% of them would; without the correction for the mean that is estimated, 93.7%."""
    random = np.random.default_rng(6)
    nothing = table(np.zeros(1000))
    comparison = QualityComparison(nothing)
    texts = correlated(random, 6000, 1000, length=2)
    assert 0.943 <= coverage([comparison.vs_strict(table(0.1 * text)) for text in texts], 0.0) <= 0.96


def test_intervals_cover_correlated_losses_and_a_sampled_baseline():
    """Of one-token blocks 60% would cover the first, those that leave out one of the two parts as few the second."""
    random = np.random.default_rng(7)
    texts, tokens = 1000, 2000
    policies = np.exp(correlated(random, texts, tokens, 10) / 2) - math.exp(1 / 8)
    gaps = 3 * correlated(random, texts, tokens, 3)
    chosen = sample_positions(tokens + 1, 1, 128)
    reference = table(np.zeros(tokens))
    strict, increases = [], []
    for policy, gap in zip(policies / 10, gaps / 10, strict=True):
        comparison = QualityComparison(reference, table(gap[chosen], chosen))
        strict.append(comparison.vs_strict(table(policy)))
        increases.append(comparison.increase(table(policy)))
    assert 0.93 <= coverage(strict, 0.0) <= 0.97
    assert 0.93 <= coverage(increases, 0.0) <= 0.97


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(3)
    hits = sum((e := median_interval(rng.normal(0, 1, 12))).low <= 0 <= e.high for _ in range(2000))
    assert 0.945 <= hits / 2000 <= 0.98, "the exact coverage of [x3, x10] is 96.1%"


def test_median_of_few_values_has_the_whole_range():
    estimate = median_interval(np.array([3.0, 1.0, 2.0]))
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 1.0, 3.0)


def test_a_loss_that_is_no_number_names_token_and_cure():
    with pytest.raises(NonFiniteLossError, match=r"token 2 .*float16.*bfloat16"):
        check_finite(np.array([1.0, np.inf, np.nan]), "torch.float16")
