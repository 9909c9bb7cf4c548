import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamllm.policy import (
    EvictionPolicy,
    PolicyError,
    Schedule,
    evicted_before,
    peak_kv,
    steady_state,
    with_derived_window,
)

policies = st.builds(
    EvictionPolicy,
    n_sink=st.integers(0, 8),
    window_size=st.integers(1, 40),
    compress_every=st.integers(0, 20),
    cache_slack=st.integers(0, 10),
    max_drop=st.integers(0, 10),
)


def held_tokens(policy, n_tokens):
    """The design's pseudo-code, taken at its word, on a list of token numbers: what each query finds in the cache."""
    cache, found, pruning = [], [], False
    for t in range(1, n_tokens + 1):
        found.append(list(cache))
        cache.append(t - 1)
        n = len(cache)
        limit = policy.n_sink + policy.window_size
        if policy.compress_every > 0 and t % policy.compress_every == 0 and n > limit + policy.cache_slack:
            pruning = True
        if pruning:
            drop = n - limit
            if policy.max_drop > 0:
                drop = min(drop, policy.max_drop)
            del cache[policy.n_sink : policy.n_sink + drop]
            pruning = len(cache) > limit
    return found


@given(policies, st.integers(1, 200))
def test_schedule_is_the_pseudo_code(policy, n_tokens):
    found = held_tokens(policy, n_tokens)
    evicted = evicted_before(policy, n_tokens)
    assert len(evicted) == n_tokens
    for t, (kept, e) in enumerate(zip(found, evicted, strict=True)):
        assert kept == [j for j in range(t) if j < policy.n_sink or j >= policy.n_sink + e]
    assert peak_kv(policy, n_tokens) == max(len(kept) + 1 for kept in found)


@given(policies)
def test_steady_state_repeats(policy):
    steady = steady_state(policy)
    if policy.compress_every == 0:
        assert steady is None
        return
    schedule = Schedule(policy)
    drops = [schedule.after_token() for _ in range(steady.start + 3 * steady.cycle)]
    cycles = [drops[steady.start + i * steady.cycle :][: steady.cycle] for i in range(3)]
    assert cycles[0] == cycles[1] == cycles[2]
    assert sum(cycles[0]) == steady.cycle, "as many tokens leave as come"
    assert steady.peak_kv == peak_kv(policy, steady.start + 3 * steady.cycle)


@given(policies, st.integers(1, 80), st.sampled_from(["nominal", "peak"]))
def test_derived_window_is_the_largest_that_fits(policy, cap, accounting):
    def total(p):
        if accounting == "nominal":
            return p.n_sink + p.window_size + p.cache_slack
        steady = steady_state(p)
        return float("inf") if steady is None else steady.peak_kv

    try:
        derived = with_derived_window(policy, cap, accounting)
    except PolicyError as error:
        assert str(cap) in str(error)
        smallest = EvictionPolicy(
            n_sink=policy.n_sink,
            window_size=1,
            compress_every=policy.compress_every,
            cache_slack=policy.cache_slack,
            max_drop=policy.max_drop,
        )
        assert total(smallest) > cap or cap < policy.n_sink + policy.cache_slack + 1
        return
    assert total(derived) <= cap
    if accounting == "nominal":
        assert total(derived) == cap


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"n_sink": -1}, "n_sink"),
        ({"window_size": 0}, "window_size"),
        ({"max_drop": 1.5}, "max_drop"),
        ({"compress_every": True}, "compress_every"),
    ],
)
def test_nonsense_is_refused_by_name(values, word):
    with pytest.raises(PolicyError, match=word):
        EvictionPolicy(**values)


def test_vanilla_streaming_sees_one_more_key_than_it_keeps():
    assert peak_kv(EvictionPolicy(n_sink=4, window_size=60), 900) == 65
