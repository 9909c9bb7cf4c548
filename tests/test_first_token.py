import itertools

import pytest

from streamllm.configuration import Configuration
from streamllm.engine.decoder import make_decoder
from streamllm.measuring import first_token
from streamllm.measuring.first_token import measure_first_token, pieces
from streamllm.policy import EvictionPolicy, Schedule

POLICIES = [
    EvictionPolicy(n_sink=2, window_size=30),
    EvictionPolicy(n_sink=2, window_size=20, compress_every=8),
    EvictionPolicy(n_sink=2, window_size=20, compress_every=4, cache_slack=6, max_drop=2),
    EvictionPolicy(n_sink=2, window_size=10, compress_every=0),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_is_fed_in_as_few_pieces_as_evictions_allow(policy):
    found = pieces(policy, 2, 40)
    assert sum(found) == 40
    schedule = Schedule(policy)
    drops = [schedule.after_token() for _ in range(40)]
    ends = [*itertools.accumulate(found)]
    assert all(not drop or n + 1 in ends for n, drop in enumerate(drops)), "nothing is evicted within a piece"
    assert all(drops[end - 1] for end in ends[:-1]), "a piece ends for an eviction only"


def test_layers_that_evict_at_other_times_share_pieces():
    policy = EvictionPolicy(n_sink=2, window_size=20, compress_every=8, layer_budgets="pyramid:50")
    found, ends = pieces(policy, 4, 64), set()
    for own in set(policy.of_layers(4)):
        schedule = Schedule(own)
        ends |= {n + 1 for n in range(64) if schedule.after_token()}
    assert {*itertools.accumulate(found)} == ends | {64}


@pytest.mark.parametrize("method", ["mit", "ours", "ring", "recompute"])
def test_every_prompt_has_a_cache_of_its_own(method, golden_model, golden_tokens, monkeypatch):
    loaded, fed = golden_model("neox-tiny"), []

    def made(*arguments):
        decoder = make_decoder(*arguments)
        own, feed = [], decoder.feed
        fed.append(own)
        monkeypatch.setattr(decoder, "feed", lambda tokens: own.append(len(tokens)) or feed(tokens))
        return decoder

    monkeypatch.setattr(first_token, "make_decoder", made)
    what = Configuration(method, POLICIES[1])
    found = measure_first_token(loaded, what, golden_tokens, loaded, 32)
    assert len(fed) == 2 * (len(found.times.ms) + first_token.WARMUP)
    assert sorted(map(tuple, fed)) == sorted([tuple(pieces(what.effective, 2, 32)), (32,)] * (len(fed) // 2))
    summary = found.summary()
    assert summary["ttft_prompt_tokens"] == 32
    assert summary["ttft_ratio"] == pytest.approx(summary["measured_ttft_ms"] / summary["reference_ttft_ms"], rel=0.5)
