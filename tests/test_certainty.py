import numpy as np
import pytest
from numpy.testing import assert_allclose

from streamllm.measuring.certainty import front_probabilities, not_told_from, time_draws, told_apart_front
from streamllm.measuring.quality import median_interval


def measured(random, logarithms, pairs=18, rounds=3, between=0.01, noise=0.03, bursts=0.0):
    """Ratios (rounds, pairs) per candidate, by a clock that drifts by up to 2 in a round, a reference beside it, and
    segments of which a share `bursts` takes up to 3 times as long."""
    found = []
    for own in logarithms:
        shape = (rounds, 2 * pairs)
        segments = np.linspace(0, random.uniform(-0.7, 0.7, rounds), 2 * pairs, axis=-1)
        segments += np.cumsum(random.normal(0, 0.01, shape), axis=1) + random.normal(0, noise, shape)
        segments += np.where(random.random(shape) < bursts, np.log(random.uniform(1, 3, shape)), 0)
        own_round = own + random.normal(0, between, (rounds, 1))
        found.append(np.exp(own_round + segments[:, ::2] - segments[:, 1::2]))
    return found


def test_the_ratio_of_a_measurement_is_its_median():
    estimate = median_interval(np.array([1.0, 1.1, 1.2, 1.3, 9.0, 1.15, 1.25]))
    assert (estimate.value, estimate.low, estimate.high) == (1.2, 1.0, 9.0)


@pytest.mark.parametrize(("bursts", "between", "count"), [(0.0, 0.02, 8), (0.3, 0.01, 8), (0.3, 0.0, 1)])
def test_intervals_of_times_cover_the_truth(bursts, between, count):
    random = np.random.default_rng(1)
    truth = np.linspace(0, 0.5, count)
    hits = []
    for _ in range(1200 // count):
        _, drawn = time_draws(measured(random, truth, between=between, bursts=bursts), draws=1000)
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        hits.append((low <= truth) & (truth <= high))
    assert 0.93 <= np.mean(hits) <= 0.97


def test_a_noisy_candidate_does_not_blur_a_quiet_one():
    random = np.random.default_rng(2)
    quiet = measured(random, [0.0] * 4, between=0)
    noisy = measured(random, [0.0] * 4, between=0, noise=0.12)
    _, drawn = time_draws(quiet + noisy)
    spread = drawn.std(axis=0)
    assert 2 < spread[4:].mean() / spread[:4].mean() < 6
    assert_allclose(time_draws(quiet)[0], [np.log(np.median(one, axis=1)).mean() for one in quiet], rtol=1e-12)


def test_one_round_is_believed_within_some_percent():
    _, drawn = time_draws([np.ones((1, 12))])
    assert drawn.std() == pytest.approx(0.02, rel=0.1)
    estimates, drawn = time_draws([np.ones((3, 12)), np.full((2, 12), 2.0)])
    assert_allclose(estimates, [0, np.log(2)])
    assert_allclose(drawn, np.broadcast_to(estimates, drawn.shape), atol=0.01)  # of one degree of freedom


def drawn(values, spread, draws=4000, seed=0):
    return np.array(values) + np.array(spread) * np.random.default_rng(seed).normal(size=(draws, len(values)))


def test_a_point_is_on_the_front_where_no_other_dominates_it():
    points = np.stack((drawn([1, 1, 2], 0.01), np.tile([1.0, 1.0, 3.0], (4000, 1))), axis=-1)
    one, other, never = front_probabilities(points)
    assert one + other == pytest.approx(1) and 0.4 < one < 0.6, "of the same policy only the faster is on the front"
    assert never == 0.0


def test_what_cannot_be_told_apart():
    times = drawn([1.0, 1.005, 1.2, 1.0], 0.01)
    quality = drawn([0.0], 0.1) + np.array([1.0, 1.0, 1.0, 0.5])
    assert not_told_from(np.stack((times, quality), axis=-1)) == [[1, 3], [0, 3], [0, 1, 3], []]
    assert not_told_from(times[:, :1, None]) == [[]]


def test_members_of_a_front_are_told_apart():
    estimates = np.array([[1.0, 1.0], [1.005, 0.99], [2.0, 0.5], [3.0, 0.6], [0.5, 2.0]])
    not_told = [[1], [0], [], [2], []]
    assert told_apart_front(estimates, not_told, np.array([0.4, 0.6, 1, 0, 1])) == [1, 2, 4]
    assert told_apart_front(estimates, not_told, np.array([0.5, 0.5, 1, 0, 1])) == [0, 2, 4], "the first of equals"
    assert told_apart_front(np.ones((3, 2)), [[1, 2], [0, 2], [0, 1]], np.ones(3)) == [0]
    assert told_apart_front(np.empty((0, 2)), [], np.empty(0)) == []


def confirmed(random, times, quality, policies, between=0.01):
    """The confirmed front, and whom each is not told from, of candidates whose policies' quality is known to 0.1."""
    rounds, seed = measured(random, times, between=between), int(random.integers(2**31))
    estimates, drawn_times = time_draws(rounds, draws=1000, seed=seed)
    error = random.normal(0, 0.1, len(quality))
    drawn_quality = drawn(quality + error, 0.1, 1000, int(random.integers(2**31)))[:, policies]
    points = np.stack((drawn_times, drawn_quality), axis=-1)
    best = np.column_stack((estimates, (quality + error)[policies]))
    not_told = not_told_from(points)
    return told_apart_front(best, not_told, front_probabilities(points)), not_told


def test_false_members_are_rare_where_all_are_nearly_the_same():
    """Of eight of one policy within 0.1%, the one chosen may only be told from those that are slower in truth."""
    random, false = np.random.default_rng(3), 0
    for _ in range(200):
        times = random.uniform(0, 0.001, 8)
        members, not_told = confirmed(random, times, np.array([1.0]), np.zeros(8, int))
        false += any(times[other] < times[i] and other not in not_told[i] for i in members for other in range(8))
    assert false <= 0.05 * 200, "at twice the level it is 6%, at three times 11%"


def test_a_member_with_a_large_advantage_is_hardly_ever_missed():
    random, missed = np.random.default_rng(4), 0
    times = np.array([0.0, 0.08, 0.08, 0.12, 0.15, 0.2, 0.3, 0.3])
    quality, policies = np.array([3.0, 2.3, 1.5, 0.2]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    for _ in range(100):
        members, _ = confirmed(random, times, quality, policies)
        missed += (0 not in members) + (4 not in members) + (not {6, 7} & set(members))
    assert missed <= 0.03 * 300
