"""A step recorded once and replayed on the same memory goes on decoding, over many wrap-arounds of the ring.

On a pretended CUDA device: whatever Python decides per token is recorded once, and wrong from the second token on."""

import gc
import weakref

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.policy import EvictionPolicy

from .pretended_cuda import RecordedGraph, pretended_cuda
from .tiny_models import tiny_model

TOKENS = np.random.default_rng(0).integers(61, size=120)


@pytest.mark.parametrize("family", ["GPTNeoX", "Llama"])
@pytest.mark.parametrize(
    "policy",
    [
        EvictionPolicy(n_sink=3, window_size=20),
        EvictionPolicy(n_sink=3, window_size=20, compress_every=8),
        EvictionPolicy(n_sink=0, window_size=20),
        EvictionPolicy(n_sink=3, window_size=16, compress_every=4, cache_slack=2, max_drop=3),
        EvictionPolicy(n_sink=3, window_size=20, positions="keep"),
    ],
    ids=["R=1", "R=8", "no sinks", "lazy", "kept positions"],
)
def test_replayed_is_eager_over_many_wraps(policy, family):
    loaded = tiny_model(family, torch.float32)
    eager = decode_loop(make_decoder(loaded, Configuration("ring", policy)), TOKENS, loaded.device).losses
    with pretended_cuda(loaded) as (there, _), BACKENDS["auto"].active():
        decoder = make_decoder(there, Configuration("ring", policy, execution="cudagraph"))
        replayed = decode_loop(decoder, TOKENS, there.device).losses
    assert decoder._static_step.graph.steps, "nothing was recorded"
    np.testing.assert_allclose(replayed, eager, rtol=0, atol=1e-4)


def test_a_captured_decoder_goes_with_its_cache_and_graph():
    """At once: what garbage collection finds later would count as the next one's memory."""
    loaded, policy = tiny_model("Llama", torch.float32), EvictionPolicy(n_sink=3, window_size=20)
    with torch.inference_mode(), pretended_cuda(loaded) as (there, _):
        decoder = make_decoder(there, Configuration("ring", policy, execution="cudagraph"))
        for token in torch.from_numpy(TOKENS[:30]).split(1):
            decoder.feed(token)
        cache = weakref.ref(decoder.cache)
        gc.disable()
        del decoder
        gone = cache() is None
        gc.enable()
    assert gone


def test_logits_are_the_callers():
    """The next replay writes where this one did."""
    loaded, policy = tiny_model("Llama", torch.float32), EvictionPolicy(n_sink=3, window_size=20)
    with torch.inference_mode(), pretended_cuda(loaded) as (there, _):
        decoder = make_decoder(there, Configuration("ring", policy, execution="cudagraph"))
        logits = [decoder.feed(token) for token in torch.from_numpy(TOKENS[:30]).split(1)]
    assert len({x.sum().item() for x in logits}) == 30


def test_a_recorded_graph_repeats_what_was_decided_when_it_was_recorded():
    """And reads what is in memory now."""
    x, count = torch.zeros(2), torch.zeros(1)
    with RecordedGraph() as graph:
        made = x * 2 + torch.full((2,), float(len(graph.steps)))
        count += 1
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert made.tolist() == [2 * value + 1] * 2
    assert count.item() == 3
