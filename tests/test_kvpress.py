"""NVIDIA's library as the compressor. Where it is not installed (it pins transformers < 5.3), only the refusals run."""

import importlib.util

import numpy as np
import pytest

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoding import decode_loop
from streamllm.engine.methods import check_protocol, make_decoder
from streamllm.errors import UnsupportedModelError, UsageError
from streamllm.measuring.evaluation import evaluate_chunked
from streamllm.measuring.text import TokenStream
from streamllm.measuring.timing import Reference
from streamllm.policy import EvictionPolicy

from .conftest import golden_cases
from .tiny_models import tiny_model

INSTALLED = importlib.util.find_spec("kvpress") is not None
needs_kvpress = pytest.mark.skipif(not INSTALLED, reason="kvpress is not installed")


@needs_kvpress
@pytest.mark.parametrize(("family", "entry"), [case for case in golden_cases() if case.values[0] == "llama-tiny"])
def test_called_between_tokens_it_does_what_the_original_does(family, entry, golden_model, golden_tokens):
    loaded, policy = golden_model(family), EvictionPolicy(**entry["policy"])
    run = decode_loop(make_decoder(loaded, Configuration("kvpress", policy)), golden_tokens, loaded.device)
    np.testing.assert_allclose(run.losses, entry["losses"], rtol=0, atol=1e-3)
    assert run.peak_kv == entry["peak_kv"]


@needs_kvpress
def test_chunks_are_compressed_to_the_same_losses(golden_model, golden_tokens):
    loaded, stream = golden_model("llama-tiny"), TokenStream(golden_tokens, "golden", "")
    policy = EvictionPolicy(n_sink=4, window_size=60, compress_every=128)
    reference = Reference.start(loaded, 64, golden_tokens)
    losses = [
        evaluate_chunked(loaded, Configuration(method, policy), stream, reference)[0].losses
        for method in ("kvpress", "ours")
    ]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4)


def test_what_the_library_cannot_do_is_refused(golden_model):
    what = Configuration("kvpress", EvictionPolicy())
    with pytest.raises(UnsupportedModelError, match="does not know the layers of GPTNeoXForCausalLM"):
        make_decoder(golden_model("neox-tiny"), what)
    with pytest.raises(UnsupportedModelError, match="PhiForCausalLM rotates otherwise"):
        make_decoder(tiny_model("Phi"), what)
    with pytest.raises(UsageError, match="measured by decode-loop or chunked only"):
        check_protocol("kvpress", "fast")


@pytest.mark.skipif(INSTALLED, reason="kvpress is installed")
def test_without_the_library_the_message_says_how_to_get_it(golden_model):
    with pytest.raises(UsageError, match=r"pip install -e '\.\[kvpress\]'` in an environment of its own"):
        make_decoder(golden_model("llama-tiny"), Configuration("kvpress", EvictionPolicy()))


def test_chunked_losses_are_those_of_the_dense_prefill_and_the_compressed_cache(golden_model, golden_tokens):
    """Token by token with the schedule of the same policy."""
    loaded = golden_model("neox-tiny")
    policy = EvictionPolicy(n_sink=4, window_size=60, compress_every=128)
    stream = TokenStream(golden_tokens[: 2 * 160 + 1], "golden", "")
    reference = Reference.start(loaded, 64, golden_tokens)
    quality, record = evaluate_chunked(loaded, Configuration("ring", policy), stream, reference)
    assert record["chunks"] == record["pairs"] == 2 and record["peak_kv"] == 128
    assert quality.positions.tolist() == [*range(128, 160), *range(288, 320)]
    for chunk in range(2):
        piece = golden_tokens[160 * chunk :][:161]
        expected = block_parallel_losses(loaded, piece, policy)[128:]
        np.testing.assert_allclose(quality.losses[32 * chunk :][:32], expected, rtol=0, atol=1e-4)
