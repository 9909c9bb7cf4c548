"""Every method and the block-parallel evaluator against the per-token losses of mit-han-lab/streaming-llm itself."""

import numpy as np
import pytest

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.policy import EvictionPolicy, peak_kv

from .conftest import golden_cases

TOLERANCE = {"neox-tiny": 2e-4, "llama-tiny": 1e-3}


@pytest.mark.parametrize(("family", "entry"), golden_cases())
def test_block_parallel(family, entry, golden_model, golden_tokens):
    losses = block_parallel_losses(golden_model(family), golden_tokens, EvictionPolicy(**entry["policy"]))
    np.testing.assert_allclose(losses, entry["losses"], rtol=0, atol=TOLERANCE[family])


@pytest.mark.parametrize("method", ["mit", "ours", "ring"])
@pytest.mark.parametrize(("family", "entry"), golden_cases())
def test_decode_loop(family, entry, method, golden_model, golden_tokens):
    loaded, policy = golden_model(family), EvictionPolicy(**entry["policy"])
    run = decode_loop(make_decoder(loaded, Configuration(method, policy)), golden_tokens, loaded.device)
    np.testing.assert_allclose(run.losses, entry["losses"], rtol=0, atol=TOLERANCE[family])
    np.testing.assert_allclose(run.losses, block_parallel_losses(loaded, golden_tokens, policy), rtol=0, atol=1e-4)
    assert run.peak_kv == entry["peak_kv"] == peak_kv(policy, len(golden_tokens) - 1)


@pytest.mark.parametrize("family", TOLERANCE)
def test_block_parallel_is_an_identity_in_float64(family, golden_model, golden_tokens):
    loaded, tokens = golden_model(family, "float64"), golden_tokens[:400]
    policy = EvictionPolicy(n_sink=4, window_size=60, compress_every=16, cache_slack=8, max_drop=3)
    run = decode_loop(make_decoder(loaded, Configuration("mit", policy)), tokens, loaded.device)
    for block in (7, 64, 400):
        losses = block_parallel_losses(loaded, tokens, policy, block)
        np.testing.assert_allclose(losses, run.losses, rtol=0, atol=1e-9)


def test_window_is_ours_without_sinks_and_dense_never_evicts(golden_model, golden_tokens):
    loaded, tokens = golden_model("neox-tiny"), golden_tokens[:200]
    policy = EvictionPolicy(n_sink=4, window_size=28)
    same = {
        "window": EvictionPolicy(n_sink=0, window_size=32),
        "dense": EvictionPolicy(n_sink=4, window_size=28, compress_every=0),
    }
    for method, meant in same.items():
        run = decode_loop(make_decoder(loaded, Configuration(method, policy)), tokens, loaded.device)
        np.testing.assert_allclose(run.losses, block_parallel_losses(loaded, tokens, meant), rtol=0, atol=1e-4)


def test_recompute_sees_exactly_the_last_tokens(golden_model, golden_tokens):
    """Against the model's plain forward of each window, and its sampled losses against its own decode loop."""
    from streamllm.engine.methods.recompute import losses_at

    loaded, tokens = golden_model("neox-tiny"), golden_tokens[:120]
    run = decode_loop(
        make_decoder(loaded, Configuration("recompute", EvictionPolicy(n_sink=4, window_size=28))),
        tokens,
        loaded.device,
    )
    assert run.peak_kv == 32
    dense = EvictionPolicy(compress_every=0)
    for t in (0, 5, 31, 32, 100, 118):
        window = tokens[max(0, t + 1 - 32) : t + 2]
        assert run.losses[t] == pytest.approx(block_parallel_losses(loaded, window, dense)[-1], abs=1e-4)
    positions = [0, 5, 30, 31, 32, 100, 118]
    sampled = losses_at(loaded, tokens, 32, positions, BACKENDS["auto"], batch=2)
    np.testing.assert_allclose(sampled, run.losses[positions], rtol=0, atol=1e-4)
