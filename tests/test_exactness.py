"""In float64 the block-parallel evaluator and all caches are one function: on many architectures, at any length."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.errors import UnsupportedModelError
from streamllm.policy import KV_DTYPES, POSITIONS, EvictionPolicy

from .tiny_models import FAMILIES, random_models, tiny_model

IDENTITY = 1e-9
SAME_FUNCTION = ("mit", "ours", "ring")

policies = st.builds(
    EvictionPolicy,
    n_sink=st.integers(0, 6),
    window_size=st.integers(1, 30),
    compress_every=st.integers(0, 12),
    cache_slack=st.integers(0, 6),
    max_drop=st.integers(0, 6),
    positions=st.sampled_from(POSITIONS),
    kv_dtype=st.sampled_from(KV_DTYPES),
)


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(61, size=count)


def loop_losses(method, loaded, policy, tokens):
    return decode_loop(make_decoder(loaded, Configuration(method, policy)), tokens, loaded.device).losses


@settings(max_examples=40)
@given(random_models(), policies, st.sampled_from(SAME_FUNCTION), st.integers(1, 64))
def test_block_parallel_is_the_loop(loaded, policy, method, block):
    tokens = random_tokens(70)
    losses = block_parallel_losses(loaded, tokens, policy, block, keys=Configuration(method, policy).keys)
    np.testing.assert_allclose(losses, loop_losses(method, loaded, policy, tokens), rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_method(family):
    loaded, tokens = tiny_model(family), random_tokens(90)
    policy = EvictionPolicy(n_sink=3, window_size=20, compress_every=4, cache_slack=2, max_drop=3)
    losses = block_parallel_losses(loaded, tokens, policy)
    assert losses.std() > 0.5, "a model that predicts the same everywhere would agree with anything"
    for method in SAME_FUNCTION:
        np.testing.assert_allclose(loop_losses(method, loaded, policy, tokens), losses, rtol=0, atol=IDENTITY)


def test_a_million_tokens():
    """With R dividing what is left out, a long stream ends as a short one of its sinks and its last tokens does: as far
    back as two layers of windows reach, both contain the same. In float32, as models are run."""
    loaded = tiny_model("Llama", torch.float32)
    policy = EvictionPolicy(n_sink=4, window_size=26, compress_every=5)
    left_out, tail = 1_000_000, 300
    stream = random_tokens(4 + left_out + tail)
    short = np.concatenate((stream[:4], stream[4 + left_out :]))
    expected = block_parallel_losses(tiny_model("Llama"), short, policy)[-100:]
    long = block_parallel_losses(loaded, stream, policy, block=512)[-100:]
    np.testing.assert_allclose(long, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["GPTNeoX", "Llama", "Llama yarn", "Cohere"])
def test_a_ring_that_has_seen_a_million_tokens(family):
    """It is told that a million tokens came and went behind its sinks: positions grow, distances stay the same. (The
    other caches know cache positions only.)"""
    policy = EvictionPolicy(n_sink=4, window_size=26)
    tokens = random_tokens(120)
    expected = block_parallel_losses(tiny_model(family), tokens, policy)
    loaded = tiny_model(family, torch.float32)
    decoder = make_decoder(loaded, Configuration("ring", policy))
    losses = []
    with torch.inference_mode():
        for i, (token, target) in enumerate(pairwise(tokens)):
            if i == 4:
                decoder.cache.evict(policy.n_sink, 1_000_000)
            logits = decoder.feed(torch.tensor([token]))[0]
            losses.append(-logits.log_softmax(-1)[target].item())
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changed", "reason"),
    [
        ("Bloom", {"n_head": 4}, "linear biases"),
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48}, "no rotary positions but embedded ones"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(family, changed, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        tiny_model(family, **changed)


def test_a_cache_that_is_longer_than_any_layers_window_is_said():
    from streamllm.measuring.evaluation import measure_quality
    from streamllm.measuring.text import TokenStream

    loaded = tiny_model("Mistral", sliding_window=32)
    stream = TokenStream(random_tokens(100), "random", "")

    def warning(window_size):
        policy = EvictionPolicy(n_sink=4, window_size=window_size)
        return measure_quality(loaded, Configuration("ours", policy), stream).warning or ""

    assert "sliding window" not in warning(27)
    assert "every layer attends to its last 32 tokens only (sliding window), the cache holds up to 33" in warning(28)
