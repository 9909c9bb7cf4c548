"""The embedded testbed: small, held out, and showing the phenomena that make a sweep worth looking at."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from streamllm.engine.backends import BACKENDS
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.engine.methods.recompute import losses_at
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import EvictionPolicy
from streamllm.testbed import MODEL_FOLDER, TEXT_FILE

TRAINED = 256
SKIPPED = 512
"""Losses before this token are left out: the caches have to fill first."""


@pytest.fixture(scope="module")
def testbed():
    loaded = load_model("testbed")
    stream = load_tokens(TextSource(max_eval_tokens=8192), load_tokenizer("testbed"), loaded.model.config.vocab_size)
    return loaded, stream.tokens


@pytest.fixture(scope="module")
def ppl(testbed) -> Callable[..., float]:
    loaded, tokens = testbed

    def ppl(n_sink, window_size, compress_every=1, span=slice(SKIPPED, None)):
        policy = EvictionPolicy(n_sink=n_sink, window_size=window_size, compress_every=compress_every)
        return float(np.exp(block_parallel_losses(loaded, tokens, policy)[span].mean()))

    return ppl


def test_dense_decoding_explodes_past_the_trained_length(ppl):
    dense = ppl(4, 252, compress_every=0, span=slice(SKIPPED, 2048))
    assert dense > 5 * ppl(4, 252, span=slice(SKIPPED, 2048))


@pytest.mark.parametrize("total", [32, 64, 128, 256])
def test_evicting_the_first_tokens_costs_a_fifth_and_one_sink_brings_it_back(ppl, total):
    assert ppl(0, total) > 1.20 * ppl(1, total - 1)


def test_with_a_sink_it_is_as_good_as_recomputation(testbed):
    loaded, tokens = testbed
    positions = np.arange(SKIPPED, len(tokens) - 1, 8)
    recomputed = losses_at(loaded, tokens, TRAINED, positions.tolist(), BACKENDS["auto"])
    streamed = block_parallel_losses(loaded, tokens, EvictionPolicy(n_sink=4, window_size=TRAINED - 4))
    assert np.exp(streamed[positions].mean() - recomputed.mean()) < 1.02


def test_a_cache_that_lazily_outgrows_the_trained_length_falls_off_a_cliff(ppl):
    vanilla = ppl(4, 252)
    assert ppl(4, 252, compress_every=32) < 1.08 * vanilla, "288 keys are bearable"
    assert ppl(4, 252, compress_every=256) > 2.0 * vanilla, "512 are not"


def test_a_larger_window_is_better_until_it_saturates(ppl):
    values = [ppl(4, window) for window in (4, 16, 64, 252)]
    assert values[0] > 1.1 * values[1] and values[1] > 1.05 * values[2] and values[2] > 0.99 * values[3]
    assert values[2] < 1.08 * values[3]


def test_it_is_small_and_loads_through_plain_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) < 8_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
    assert model.config.max_position_embeddings == TRAINED
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    text = "Formatted string literals — “f-strings” — may contain {fields}.\n\tTabs too."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_text_shares_no_wording_with_the_training_documents():
    """Counted here in another way than the corpus was filtered with: by joined strings, over whole documents."""
    from streamllm.testbed.corpus import training_documents

    def shingles(text):
        words = re.findall(r"\w+", text.lower())
        return {" ".join(words[i : i + 12]) for i in range(len(words) - 11)}

    text = TEXT_FILE.read_text(encoding="utf-8")
    held_out = shingles(text)
    documents = training_documents(text)
    assert len(documents) > 500
    shared = [shingle for document in documents for shingle in shingles(document) & held_out]
    assert not shared
