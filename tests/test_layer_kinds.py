"""Layers of several kinds, held to transformers: popular architectures made tiny, and a reference with nothing of ours.

The reference is the model's own eager forward over the tokens that survive (`plain`), with whatever it computes in
float32 computed in float64.
"""

import gc
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_logits
from streamllm.engine.decoder import make_decoder
from streamllm.engine.experts import experts_for
from streamllm.engine.loading import prepare
from streamllm.errors import UsageError
from streamllm.policy import EvictionPolicy

from .dispatched import decode, looking, no_waiting
from .plain import surviving_logits
from .zoo import KINDS, MIXED, known, tiny

IDENTITY = 1e-9
WAYS = ("evaluator", "ours", "mit", "ring")
POLICIES = {
    "strict": {"n_sink": 4, "window": 20},
    "softlite": {"n_sink": 2, "window": 9, "every": 4, "slack": 2, "drop": 3},
    "never": {"n_sink": 2, "window": 9, "every": 0},
}
"""Of the second, the cache now holds less than a window of 12, now more: sinks come and go."""


@contextmanager
def in_double():
    """What asks for float32 gets float64: models compute angles, norms and softmaxes in that, whatever their dtype."""
    double = {"float32": torch.float64, "float": torch.float64}
    with patch.multiple(torch, **double), patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def tokens_of(count):
    return np.arange(3, 3 + count) * 7 % 120


def policy_of(n_sink, window, every=1, slack=0, drop=0, **more):
    return EvictionPolicy(
        n_sink=n_sink, window_size=window, compress_every=every, cache_slack=slack, max_drop=drop, **more
    )


@torch.inference_mode()
def streamed_logits(way, loaded, policy, tokens, **how):
    """After each token but the last."""
    if way == "evaluator":
        return torch.cat([logits for _, logits in block_logits(loaded, tokens, policy, block=17)])
    decoder = make_decoder(loaded, Configuration(way, policy, **how))
    return torch.cat([decoder.feed(torch.tensor([token])) for token in tokens[:-1]])


@torch.inference_mode()
def ring_logits_far_on(loaded, policy, tokens):
    """After each token but the last, where a million came and went behind the first four."""
    decoder = make_decoder(loaded, Configuration("ring", policy))
    first = [decoder.feed(torch.tensor([token])) for token in tokens[:4]]
    decoder.cache.evict(4, 1_000_000)
    return torch.cat([*first, *(decoder.feed(torch.tensor([token])) for token in tokens[4:-1])])


def assert_exact(model, loaded, policy, positions, tokens, within=IDENTITY):
    """Every way against the reference."""
    stream = torch.from_numpy(tokens)[None, :-1]
    expected = surviving_logits(model, stream, keep=positions == "keep", **policy).log_softmax(-1)
    for way in WAYS:
        found = streamed_logits(way, loaded, policy_of(**policy, positions=positions), tokens).log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=within, msg=lambda text, way=way: f"{way}: {text}")


@pytest.mark.parametrize("architecture", known(KINDS))
def test_every_way_is_the_model_over_the_survivors(architecture):
    changed, tokens = KINDS[architecture], tokens_of(38)
    model = tiny(architecture, **changed)
    if not model._can_set_attn_implementation():
        pytest.skip("in this transformers its attention is code of its own")
    loaded = prepare(tiny(architecture, **changed), architecture, "")
    windows = {layer.window for layer in loaded.layers}
    assert windows == ({None} if not changed else {None, 12} if "layer_types" in changed else {12})
    with in_double():
        for positions in ("compact", "keep"):
            assert_exact(model, loaded, POLICIES["softlite"], positions, tokens)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [1, 2, 21, 24, 25, 26])
def test_a_window_ends_where_transformers_ends_it(window, policy):
    """One key less than the cache holds, as many, and one more; by the model's own masks."""
    changed = MIXED | {"sliding_window": window}
    model, loaded = tiny("gemma3_text", **changed), prepare(tiny("gemma3_text", **changed), "", "")
    with in_double():
        for positions in ("compact", "keep"):
            assert_exact(model, loaded, POLICIES[policy], positions, tokens_of(45))


@pytest.mark.parametrize("architecture", ["smollm3", "gemma3_text", "gpt_oss", "gemma2", "youtu"])
def test_in_single_precision(architecture):
    changed, tokens = KINDS[architecture], tokens_of(50)
    model = tiny(architecture, torch.float32, **changed)
    loaded = prepare(tiny(architecture, torch.float32, **changed), "", "")
    assert_exact(model, loaded, POLICIES["strict"], "compact", tokens, within=2e-4)


@pytest.mark.parametrize("architecture", ["smollm3", "gemma3_text", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_angles_are_exact_a_million_tokens_away(architecture):
    """A ring in float32, told that a million tokens came and went behind its sinks; layers see some of them."""
    changed, policy, tokens = dict(KINDS[architecture]), policy_of(4, 20), tokens_of(60)
    if changed:
        changed["sliding_window"] = 23
    expected = streamed_logits("evaluator", prepare(tiny(architecture, **changed), "", ""), policy, tokens)
    found = ring_logits_far_on(prepare(tiny(architecture, **changed).float(), "", ""), policy, tokens)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("window", [9, 10, 12, 14])
@pytest.mark.parametrize("how", [{}, {"positions": "keep"}, {"kv_dtype": "float8_e4m3"}], ids=str)
@pytest.mark.parametrize("architecture", ["smollm3", "gemma3_text", "gpt_oss", "gemma2", "youtu"])
def test_a_prompt_at_once(architecture, how, window):
    """What is fed in one piece is what is fed one by one, before and after evictions."""
    loaded = prepare(tiny(architecture, **KINDS[architecture]), "", "")
    policy, tokens = policy_of(3, window, every=16, **how), torch.from_numpy(tokens_of(70))
    for way in WAYS[1:]:
        expected = streamed_logits(way, loaded, policy, tokens.numpy())
        decoder = make_decoder(loaded, Configuration(way, policy))
        with torch.inference_mode():
            pieces = [decoder.feed(piece, logits_to_keep=0) for piece in tokens[:-1].split([9, 7, 16, 1, 15, 16, 5])]
        torch.testing.assert_close(torch.cat(pieces), expected, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_oss", "gemma2"])
def test_recompute_is_the_model_on_its_last_tokens(architecture):
    changed, tokens = KINDS[architecture], tokens_of(40)
    model, loaded = tiny(architecture, **changed), prepare(tiny(architecture, **changed), "", "")
    with in_double(), torch.inference_mode():
        found = streamed_logits("recompute", loaded, policy_of(4, 20), tokens)
        for t in (5, 23, 38):
            plain = model(torch.from_numpy(tokens[None, max(t + 1 - 24, 0) : t + 1]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(found[t], plain, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("kv_dtype", ["float16", "float8_e4m3"])
@pytest.mark.parametrize("architecture", ["smollm3", "gemma3_text", "gpt_oss", "gemma2", "youtu"])
def test_in_another_number_format_the_evaluator_is_the_loop(architecture, kv_dtype):
    loaded = prepare(tiny(architecture, **KINDS[architecture]), "", "")
    tokens, policy = tokens_of(50), policy_of(3, 10, every=4, drop=3, kv_dtype=kv_dtype)
    for way in WAYS[1:]:
        keys = Configuration(way, policy).keys
        found = torch.cat([logits for _, logits in block_logits(loaded, tokens, policy, 13, keys=keys)])
        expected = streamed_logits(way, loaded, policy, tokens)
        torch.testing.assert_close(found, expected, rtol=0, atol=IDENTITY)


@pytest.mark.parametrize("architecture", ["smollm3", "gemma3_text", "gpt_oss", "gemma2", "youtu", "stablelm"])
def test_a_compiled_ring(architecture):
    changed, tokens = KINDS[architecture], tokens_of(40)
    loaded, policy = prepare(tiny(architecture, torch.float32, **changed), "", ""), policy_of(3, 16)
    expected = streamed_logits("ring", loaded, policy, tokens)
    found = streamed_logits("ring", loaded, policy, tokens, execution="compile")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_a_model_that_is_handed_its_state_lets_go_of_it():
    loaded = prepare(tiny("stablelm"), "", "")
    decoder = make_decoder(loaded, Configuration("ours", policy_of(3, 16)))
    with torch.inference_mode():
        decoder.feed(torch.tensor([3, 4]))
    cache = weakref.ref(decoder.cache)
    del decoder
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("window", [8, 20])
@pytest.mark.parametrize("architecture", known(["smollm3", "gemma3_text", "granite_swa", "gemma2"]))
def test_no_step_and_no_prune_waits_for_the_device(architecture, window, positions):
    loaded = prepare(tiny(architecture, torch.float32, **KINDS[architecture]), "", "")
    stream = torch.from_numpy(tokens_of(40))
    for way in WAYS[1:]:
        decoder = make_decoder(loaded, Configuration(way, policy_of(3, window, every=4, positions=positions)))
        with looking(no_waiting):
            decode(decoder, stream)


MIXTURES = ("mixtral", "gpt_oss", "deepseek_v3", "mimo_v2_flash", "laguna", "afmoe", "glm4_moe_lite")


@pytest.mark.parametrize("architecture", known(MIXTURES))
def test_experts_of_one_token_wait_for_no_device(architecture):
    loaded = prepare(tiny(architecture, torch.float32, **KINDS[architecture]), "", "")
    if not hasattr(loaded.config, "_experts_implementation"):
        pytest.skip("this transformers computes experts in one way")
    policy, tokens = policy_of(3, 16), tokens_of(40)
    expected = streamed_logits("ring", loaded, policy, tokens)
    elsewhere = replace(loaded, device=torch.device("meta"))
    chosen = loaded.config._experts_implementation
    for count in (1, 2):
        with experts_for(elsewhere, count), experts_for(loaded, 1):
            assert loaded.config._experts_implementation == ("batched_mm" if count == 1 else chosen)
    decoder, stream = make_decoder(loaded, Configuration("ring", policy)), torch.from_numpy(tokens)
    with experts_for(elsewhere, 1):
        found = streamed_logits("ring", loaded, policy, tokens)
        with looking(no_waiting):
            decode(decoder, stream)
    assert loaded.config._experts_implementation == chosen == "grouped_mm"
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_ring_keeps_no_more_than_a_layers_window():
    """Where it can: with so few tokens behind the sinks that these come into it, it needs what the policy keeps."""
    loaded, tokens = prepare(tiny("gemma3_text", **MIXED), "", ""), torch.from_numpy(tokens_of(40))
    for window, slots in ((10, [14, 14]), (11, [12, 15]), (20, [12, 24])):
        decoder = make_decoder(loaded, Configuration("ring", policy_of(3, window)))
        with torch.inference_mode():
            for token in tokens.split(1):
                decoder.feed(token)
        assert [keys.shape[2] for keys in decoder.cache.keys] == 2 * slots


@pytest.mark.parametrize("architecture", ["gpt_oss", "gemma2"])
def test_a_kernel_that_has_not_what_the_softmax_has_is_refused(architecture):
    from streamllm.engine.probing import runnable

    loaded = prepare(tiny(architecture, torch.float32, **MIXED), "", "")
    reason = "soft caps" if architecture == "gemma2" else "learned sinks"
    flash = Configuration("ring", policy_of(3, 16), "flash")
    with pytest.raises(UsageError, match=reason):
        runnable(flash, loaded, strict=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert runnable(flash, loaded).backend == "auto" and reason in str(said[-1].message)
    with pytest.raises(UsageError, match=reason):
        streamed_logits("ring", loaded, policy_of(3, 16), tokens_of(4), backend="math")
