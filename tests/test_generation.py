"""The ring as a transformers cache: what it sees is what the policy says, for any split of the stream into calls."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from streamllm.block_parallel import block_parallel_losses
from streamllm.decoding import negative_log_likelihood
from streamllm.errors import UnsupportedModelError
from streamllm.generation import StreamingCache
from streamllm.policy import EvictionPolicy, PolicyError

from .conftest import FAMILIES, GOLDEN
from .tiny_models import tiny_model


def own(family, dtype=torch.float32):
    """A model as users have it, untouched by the engine."""
    return AutoModelForCausalLM.from_pretrained(str(GOLDEN / family), dtype=dtype)


@torch.inference_mode()
def losses_of(model, cache, tokens, split=1):
    stream = torch.from_numpy(tokens)[None]
    pieces = [
        model(stream[:, start : min(start + split, len(tokens) - 1)], past_key_values=cache).logits[0]
        for start in range(0, len(tokens) - 1, split)
    ]
    return negative_log_likelihood(torch.cat(pieces), stream[0, 1:]).numpy()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_golden_losses_token_by_token(family, implementation, golden_tokens):
    entry = next(
        entry
        for entry in json.loads((GOLDEN / family / "mit_losses.json").read_text())
        if entry["policy"]["compress_every"] == 1 and entry["policy"]["n_sink"] > 0
    )
    policy = entry["policy"]
    assert (policy["cache_slack"], policy["max_drop"]) == (0, 0)
    model = own(family)
    model.set_attn_implementation(implementation)
    cache = StreamingCache(model, policy["n_sink"], policy["window_size"])
    found = losses_of(model, cache, golden_tokens[: len(entry["losses"]) + 1])
    np.testing.assert_allclose(found, entry["losses"], rtol=0, atol=2e-5)
    assert cache.layers[0].keys.shape[2] == policy["n_sink"] + policy["window_size"] + 1


def by_hand(cache, layers):
    """A plain cache of keys and values (of all stream positions) as `cache` should hold them now."""
    n_sink, slots, seen = cache.layers[0].n_sink, cache.layers[0].slots, cache.get_seq_length()
    rotary = cache.layers[0].turn.rotary
    plain = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        sinks = rotary.rotate(keys[:, :, :n_sink], rotary.by(max(seen - slots, 0)))
        recent = slice(max(n_sink, seen - (slots - n_sink)), seen)
        plain.update(
            torch.cat((sinks, keys[:, :, recent]), 2),
            torch.cat((values[:, :, :n_sink], values[:, :, recent]), 2),
            index,
        )
    return plain


@pytest.mark.parametrize("pieces", [(5, 1, 1, 13, 1, 40, 1, 1, 20), (60, 3, 1), (24, 1, 24, 1), (2, 90)])
@pytest.mark.parametrize("n_sink", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_tokens_in_turn(family, n_sink, pieces, golden_tokens):
    """A piece attends to what the cache holds and to itself. Beside it, the model's plain cache, filled by hand."""
    model = own(family, torch.float64)
    cache = StreamingCache(model, n_sink, window_size=19)
    stream = torch.from_numpy(golden_tokens)[None]
    layers = [(torch.empty(1, 0, 0, 0), torch.empty(1, 0, 0, 0))] * model.config.num_hidden_layers
    start = 0
    with torch.inference_mode():
        for length in pieces:
            piece = stream[:, start : start + length]
            if start:
                plain = by_hand(cache, layers)
                if length == 1 and start >= cache.layers[0].slots:  # a single token evicts before it looks
                    for layer in plain.layers:
                        sinks = plain_turn(cache, layer.keys[:, :, :n_sink])
                        layer.keys = torch.cat((sinks, layer.keys[:, :, n_sink + 1 :]), 2)
                        layer.values = torch.cat((layer.values[:, :, :n_sink], layer.values[:, :, n_sink + 1 :]), 2)
            else:
                plain = DynamicCache()
            held = plain.get_seq_length()
            positions = torch.arange(start, start + length)[None]
            expected = model(piece, past_key_values=plain, position_ids=positions).logits
            found = model(piece, past_key_values=cache).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
            new = [(layer.keys[:, :, held:], layer.values[:, :, held:]) for layer in plain.layers]
            layers = [
                (torch.cat((k, nk), 2), torch.cat((v, nv), 2)) if start else (nk, nv)
                for (k, v), (nk, nv) in zip(layers, new, strict=True)
            ]
            start += length


def plain_turn(cache, sinks):
    """By one more position."""
    rotary = cache.layers[0].turn.rotary
    return rotary.rotate(sinks, rotary.by(1))


def test_generate_is_the_policy(golden_model):
    """Greedy text many times the cache long; the engine's evaluator finds each of its tokens the likeliest."""
    model = own("llama-tiny")
    cache = StreamingCache(model, n_sink=4, window_size=28)
    prompt = torch.tensor([[5, 9, 2, 7, 11]])
    text = model.generate(prompt, past_key_values=cache, max_new_tokens=200, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 205)
    assert cache.layers[0].keys.shape[2] == 33  # memory does not grow
    loaded = golden_model("llama-tiny")
    tokens = text[0].numpy()
    expected = block_parallel_losses(loaded, tokens, EvictionPolicy(n_sink=4, window_size=28))
    other = tokens.copy()
    other[100] = (other[100] + 1) % loaded.model.config.vocab_size
    assert block_parallel_losses(loaded, other, EvictionPolicy(n_sink=4, window_size=28))[99] > expected[99]
    fresh = StreamingCache(own("llama-tiny"), n_sink=4, window_size=28)
    replayed = losses_of(model, fresh, tokens)
    np.testing.assert_allclose(replayed, expected, rtol=0, atol=2e-5)


def test_the_example_in_the_readme():
    root = GOLDEN.parents[1]
    example = re.search(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "10_000" in example
    code = example.replace("10_000", "300")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("303 tokens seen, 256 in the cache\n")


def test_a_batch_is_its_sequences(golden_tokens):
    model = own("neox-tiny", torch.float64)
    both = torch.from_numpy(np.stack((golden_tokens[:60], golden_tokens[60:120])))
    cache, alone = StreamingCache(model, 2, 14), StreamingCache(model, 2, 14)
    with torch.inference_mode():
        for t in range(60):
            together = model(both[:, t : t + 1], past_key_values=cache).logits
            single = model(both[1:, t : t + 1], past_key_values=alone).logits
    torch.testing.assert_close(together[1:], single, rtol=0, atol=1e-9)


def test_half_precision(golden_tokens):
    model = own("llama-tiny", torch.bfloat16)
    found = losses_of(model, StreamingCache(model, 4, 20), golden_tokens[:80])
    whole = own("llama-tiny")
    expected = losses_of(whole, StreamingCache(whole, 4, 20), golden_tokens[:80])
    assert np.abs(found - expected).mean() < 0.1
    again = losses_of(model, StreamingCache(model, 4, 20), golden_tokens[:80])
    np.testing.assert_array_equal(again, found, "a second cache of the same model")


def test_what_cannot_be_is_refused():
    with pytest.raises(PolicyError, match="window_size 0"):
        StreamingCache(own("llama-tiny"), window_size=0)
    with pytest.raises(UnsupportedModelError, match="sliding window of its own"):
        StreamingCache(tiny_model("Mistral", torch.float32, sliding_window=16).model)
    with pytest.warns(UserWarning, match="more than the 4096 positions"):
        StreamingCache(own("llama-tiny"), window_size=5000)
