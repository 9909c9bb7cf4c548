"""The ring as a transformers cache: what it sees is what the policy says, for any split of the stream into calls."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoding import negative_log_likelihood
from streamllm.engine.generation import StreamingCache
from streamllm.errors import UnsupportedModelError, UsageError
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
    ring, seen = cache.layers[0].slots, cache.get_seq_length()
    n_sink, slots = ring.n_sink, ring.count
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
                if length == 1 and start >= cache.layers[0].slots.count:  # a single token evicts before it looks
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


def test_the_example_in_the_docs():
    root = GOLDEN.parents[1]
    example = re.search(r"```python\n(.*?)```", (root / "docs/generate.md").read_text(encoding="utf-8"), re.DOTALL)[1]
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


@pytest.mark.parametrize("by_length", [False, True], ids=["count", "length"])
@pytest.mark.parametrize(
    ("before", "drafted", "removed"), [(3, 6, 4), (20, 6, 4), (60, 6, 6), (60, 70, 20), (0, 80, 9)]
)
def test_what_was_drafted_is_forgotten_again(before, drafted, removed, by_length, golden_tokens):
    """A cropped cache goes on as one that has never seen what was cropped."""
    model = own("llama-tiny", torch.float64)
    stream = torch.from_numpy(golden_tokens)[None]
    kept = before + drafted - removed

    def after(cache):
        with torch.inference_mode():
            return [model(stream[:, t : t + 1], past_key_values=cache).logits for t in range(kept, kept + 30)]

    cropped, plain = StreamingCache(model, 4, 19), StreamingCache(model, 4, 19)
    with torch.inference_mode():
        for cache, end in ((cropped, before + drafted), (plain, kept)):
            for start, stop in ((0, before), (before, end)):
                if stop > start:
                    model(stream[:, start:stop], past_key_values=cache)
    cropped.crop(kept if by_length else -removed)
    assert cropped.get_seq_length() == kept
    for found, expected in zip(after(cropped), after(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_what_was_evicted_does_not_come_back(golden_tokens):
    model = own("llama-tiny")
    cache = StreamingCache(model, 4, 19)
    losses_of(model, cache, golden_tokens[:60])
    cache.crop(0)
    with pytest.raises(UsageError, match=r"crop to 57 of 59 tokens: .* evicted"):
        cache.crop(-2)


@pytest.mark.parametrize("drafting", ["prompt lookup", "assistant"])
def test_assisted_decoding(drafting):
    """While nothing is evicted it is greedy decoding; beyond, it goes on."""
    model = own("llama-tiny")
    options = {"prompt_lookup_num_tokens": 3} if drafting == "prompt lookup" else {"assistant_model": own("llama-tiny")}
    prompt = torch.tensor([[5, 9, 2, 7, 11, 5, 9, 2]])
    usual = {"do_sample": False, "eos_token_id": 10_000}  # up to transformers 5.3 prompt lookup needs one
    expected = model.generate(prompt, past_key_values=StreamingCache(model, 4, 200), max_new_tokens=100, **usual)
    found = model.generate(
        prompt, past_key_values=StreamingCache(model, 4, 200), max_new_tokens=100, **usual, **options
    )
    assert found.tolist() == expected.tolist()
    cache = StreamingCache(model, 4, 28)
    text = model.generate(prompt, past_key_values=cache, max_new_tokens=150, **usual, **options)
    assert text.shape == (1, 158) and cache.layers[0].keys.shape[2] == 33


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda options: " ".join(options),
)
def test_ways_to_generate(options):
    """While nothing is evicted, what a plain cache gives; beyond, it goes on."""
    model, prompt = own("llama-tiny"), torch.tensor([[5, 9, 2, 7, 11]])

    def text(cache, tokens):
        torch.manual_seed(0)
        usual = {"do_sample": False, "eos_token_id": None}
        return model.generate(prompt, past_key_values=cache, max_new_tokens=tokens, **usual | options)

    assert text(StreamingCache(model, 4, 200), 40).tolist() == text(DynamicCache(), 40).tolist()
    assert text(StreamingCache(model, 4, 28), 100).shape[1] == 105


def test_a_prompt_in_chunks(golden_tokens):
    """transformers 5.2 gives every chunk the positions of the last: wrong with any cache, and refused with ours."""
    model, prompt = own("llama-tiny"), torch.from_numpy(golden_tokens)[None, :9].clamp(min=1)
    usual = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 40}
    whole = model.generate(prompt, past_key_values=DynamicCache(), **usual)
    usual["prefill_chunk_size"] = 2
    if model.generate(prompt, past_key_values=DynamicCache(), **usual).tolist() == whole.tolist():
        assert model.generate(prompt, past_key_values=StreamingCache(model, 4, 200), **usual).tolist() == whole.tolist()
        assert model.generate(prompt, past_key_values=StreamingCache(model, 4, 28), **usual).shape == whole.shape
    else:
        with pytest.raises(UsageError, match="position_ids"):
            model.generate(prompt, past_key_values=StreamingCache(model, 4, 200), **usual)


def test_many_turns_and_another_text(golden_tokens):
    """Of a conversation `generate` is given all so far; after `reset` another one may be of another batch size."""
    model, stream = own("llama-tiny"), torch.from_numpy(golden_tokens)[None].clamp(min=1)  # 0 would be padding
    cache = StreamingCache(model, 4, 28)
    usual = {"do_sample": False, "eos_token_id": None, "past_key_values": cache}
    first = model.generate(stream[:, :40], max_new_tokens=10, **usual)
    second = model.generate(torch.cat((first, stream[:, 40:60]), 1), max_new_tokens=10, **usual)
    assert second.shape == (1, 80) and second[:, :50].tolist() == first.tolist()
    # transformers 5.2 does not get as far as the model
    with pytest.raises((UsageError, IndexError), match=r"the cache has seen 79|index -1"):
        model.generate(stream[:, :30], max_new_tokens=5, **usual)
    cache.reset()
    both = model.generate(torch.cat((stream[:, :40], stream[:, 40:80])), max_new_tokens=10, **usual)
    assert both[:1].tolist() == first.tolist()


def test_padding_is_refused(golden_tokens):
    model, stream = own("llama-tiny"), torch.from_numpy(golden_tokens)[None].clamp(min=1)
    mask = torch.ones(2, 20, dtype=torch.long)
    both = torch.cat((stream[:, :20], stream[:, 20:40]))
    usual = {"max_new_tokens": 5, "do_sample": False}
    model.generate(both, attention_mask=mask, past_key_values=StreamingCache(model), **usual)
    mask[1, :3] = 0
    for ids, padded in ((both, mask), (both[1:], mask[1:])):
        with pytest.raises(UsageError, match="no place for padding"):
            model.generate(ids, attention_mask=padded, past_key_values=StreamingCache(model), **usual)
        with pytest.raises(UsageError, match="no place for padding"):
            model(ids, attention_mask=padded, past_key_values=StreamingCache(model))
    model.generate(both, attention_mask=mask, **usual)


def test_the_text_of_a_model_of_images_and_text(golden_tokens):
    config = LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "vocab_size": 512},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                       "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    alone = LlamaForCausalLM(config.text_config).eval()
    alone.model.load_state_dict(model.get_decoder().state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    tokens = golden_tokens[:80] % 500
    found = losses_of(model, StreamingCache(model, 4, 20), tokens)
    np.testing.assert_allclose(found, losses_of(alone, StreamingCache(alone, 4, 20), tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"attention_mask": torch.ones(1, 1, 1, 6, dtype=torch.bool)}, "takes none but all ones"),
        ({"position_ids": torch.tensor([[0]])}, "the next is 5"),
    ],
)
def test_what_would_be_wrong_without_a_word(given, message):
    model = own("llama-tiny")
    cache = StreamingCache(model, 4, 20)
    model(torch.tensor([[5, 9, 2, 7, 11]]), past_key_values=cache)
    with pytest.raises(UsageError, match=message):
        model(torch.tensor([[3]]), past_key_values=cache, **given)
    with pytest.raises(UsageError, match=r"2 sequences: .* 5 tokens of 1"):
        model(torch.tensor([[3], [4]]), past_key_values=cache)
    with pytest.raises(UsageError, match="crop by 6 tokens: the cache has seen 5"):
        cache.crop(-6)
    model(torch.tensor([[3]]), past_key_values=cache, position_ids=torch.tensor([[5]]))
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient checkpointing"):
        model(torch.tensor([[3]]), past_key_values=cache)


def test_a_cache_of_another_model():
    one, other = own("llama-tiny"), own("neox-tiny")
    StreamingCache(other)
    with pytest.raises(UsageError, match="made for another model"):
        other(torch.tensor([[3]]), past_key_values=StreamingCache(one))


def test_a_model_of_another_dtype_is_asked_again(golden_tokens):
    model = own("llama-tiny")
    StreamingCache(model)
    model.bfloat16()
    losses_of(model, StreamingCache(model, 4, 20), golden_tokens[:40])
    with torch.autocast("cpu", torch.bfloat16):
        StreamingCache(own("llama-tiny"))
    with pytest.raises(UnsupportedModelError, match="no output layer"):
        StreamingCache(own("llama-tiny").model)
    with pytest.raises(UsageError, match="loaded for the engine"):
        StreamingCache(tiny_model("Llama", torch.float32).model)


def test_a_model_is_tried_once_and_left_as_it_was():
    model = own("llama-tiny")
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()
    StreamingCache(model)
    tried = len(calls)
    StreamingCache(model)
    assert tried and len(calls) == tried
    assert model.training and model.config._attn_implementation == "sdpa"


def test_what_cannot_be_is_refused():
    with pytest.raises(PolicyError, match="window_size 0"):
        StreamingCache(own("llama-tiny"), window_size=0)
    with pytest.raises(UnsupportedModelError, match="sliding window of its own"):
        StreamingCache(tiny_model("Mistral", torch.float32, sliding_window=16).model)
    with pytest.warns(UserWarning, match="more than the 4096 positions"):
        StreamingCache(own("llama-tiny"), window_size=5000)
