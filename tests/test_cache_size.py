"""The bytes that are said to be held are those of the tensors: in layers with a sliding window of their own as well."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine import decoding
from streamllm.engine.decoder import make_decoder
from streamllm.engine.loading import prepare
from streamllm.measuring.cache_size import peak_bytes
from streamllm.measuring.conditions import Conditions
from streamllm.policy import EvictionPolicy, for_chunks, peak_kv

from .zoo import MIXED, tiny

TOKENS = np.arange(3, 93) * 7 % 120
POLICIES = {
    "strict": EvictionPolicy(n_sink=4, window_size=20),
    "lazy": EvictionPolicy(n_sink=2, window_size=15, compress_every=4, cache_slack=2, max_drop=3),
    "narrow": EvictionPolicy(n_sink=4, window_size=10),
    "half as many bits": EvictionPolicy(n_sink=4, window_size=20, kv_dtype="float16"),
    "budgets": EvictionPolicy(n_sink=4, window_size=20, layer_budgets="pyramid:50"),
}
"""Two of four layers have a window of 12. In the third policy it is longer than what a prune leaves."""


@pytest.fixture(scope="module")
def loaded():
    return prepare(tiny("gemma3_text", torch.float32, **MIXED), "m", "")


def held_at_most(decoder, monkeypatch):
    """Bytes of the cache's tensors after the step at which they are largest, before anything is evicted."""
    most, step = [], decoding._step

    def watched(loaded, cache, *more):
        logits = step(loaded, cache, *more)
        parts = getattr(cache, "each", [cache])
        most.append(sum(held.nbytes for part in parts for held in (*part.keys, *part.values)))
        return logits

    monkeypatch.setattr(decoding, "_step", watched)
    with torch.inference_mode():
        for token in TOKENS[:-1]:
            decoder.feed(torch.tensor([token]))
    return max(most)


@pytest.mark.parametrize("method", ["ring", "mit", "ours"])
@pytest.mark.parametrize("name", POLICIES)
def test_it_is_what_the_tensors_have(loaded, monkeypatch, method, name):
    policy = POLICIES[name]
    if method == "ours" and not policy.is_uniform:
        pytest.skip("it holds as many tokens in every layer")
    what, sizes, n = Configuration(method, policy), loaded.kv_sizes, len(TOKENS) - 1
    said = peak_bytes(what, loaded.kv_layers, "float32", peak_kv(policy, n, sizes), policy, n)
    held = held_at_most(make_decoder(loaded, what), monkeypatch)
    rounding = 0 if policy.is_uniform else loaded.kept_bytes(policy)
    assert held <= said <= held + rounding
    whole = peak_kv(policy, n, sizes) * loaded.kept_bytes(policy)
    assert (said < whole) is (method == "ring" and name != "narrow")


def test_a_window_that_the_text_never_fills_and_chunks(loaded):
    """The cache of a chunk is largest at the end of its prefill; without evictions it grows, but for the windows."""
    (window, size), layers = min(loaded.kv_layers, key=lambda layer: layer[0] or 99), loaded.kv_layers
    assert window == 12 and layers == Conditions.of(loaded).layers
    strict = POLICIES["strict"]
    assert peak_bytes(Configuration("ring", strict), layers, "float32", 7, strict, 7) == 4 * 7 * size
    chunks = for_chunks(strict, 40)
    assert peak_bytes(Configuration("ring", chunks), layers, "float32", 40, chunks, 72) == 2 * (40 + 12) * size
    never = replace(strict, compress_every=0)
    assert peak_bytes(Configuration("ring", never), layers, "float32", 89, never, 89) == 2 * (89 + 12) * size
    assert peak_bytes(Configuration("dense", strict), layers, "float32", 89, never, 89) == 4 * 89 * size
