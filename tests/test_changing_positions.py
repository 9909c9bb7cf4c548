"""Models that are others in long texts: exact while a policy's cache is not one, refused beyond.

longrope and dynamic scaling turn all of a longer text by other angles; Ministral 3 scales the queries of later
positions. The reference is that of `test_layer_kinds`: transformers' own code over the tokens that survive.
"""

import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine import model as models
from streamllm.engine.generation import StreamingCache
from streamllm.engine.loading import prepare
from streamllm.engine.methods.recompute import losses_at
from streamllm.errors import UnsupportedModelError, UsageError

from .plain import streamed, surviving_logits
from .test_layer_kinds import (
    WAYS,
    assert_exact,
    in_double,
    policy_of,
    ring_logits_far_on,
    streamed_logits,
    tiny,
    tokens_of,
)

LENGTH = 24
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 10 for i in range(8)],
    "long_factor": [2 + i for i in range(8)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.5}
CASES = {
    "longrope": (
        "phi3",
        {"rope_parameters": LONGROPE | {"rope_theta": 1e4, "original_max_position_embeddings": LENGTH, "factor": 4.0}}
        | {"original_max_position_embeddings": LENGTH, "max_position_embeddings": 4 * LENGTH, "sliding_window": None},
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LENGTH}),
    "scaled": ("ministral3", {"rope_parameters": SCALED | {"original_max_position_embeddings": LENGTH}}),
}
"""Architecture, and what is changed of its configuration: of a text longer than that, positions are other ones."""
LONGEST = {
    "strict": {"n_sink": 4, "window": 19},
    "softlite": {"n_sink": 2, "window": 14, "every": 4, "slack": 1, "drop": 3},
}
"""Policies of which queries see just so many keys."""


def made(case, dtype=torch.float64):
    architecture, changed = CASES[case]
    return tiny(architecture, dtype, **changed)


@pytest.mark.parametrize("policy", LONGEST)
@pytest.mark.parametrize("case", CASES)
def test_exact_up_to_the_length(case, policy):
    model, loaded = made(case), prepare(made(case), case, "")
    with in_double():
        assert_exact(model, loaded, LONGEST[policy], "compact", tokens_of(60))


@pytest.mark.parametrize("case", CASES)
def test_one_key_more_is_refused_and_is_another_model(case):
    model, loaded = made(case), prepare(made(case), case, "")
    policy, tokens = {"n_sink": 4, "window": 20}, tokens_of(40)
    for way in WAYS:
        with pytest.raises(UsageError, match="beyond 24; use a window_size of 19 or less, a total of 23"):
            streamed_logits(way, loaded, policy_of(**policy), tokens)
    with in_double(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "changes_at", lambda _: None)
        expected = surviving_logits(model, torch.from_numpy(tokens)[None, :-1], **policy)
        for way in WAYS:
            found = streamed_logits(way, loaded, policy_of(**policy), tokens)
            torch.testing.assert_close(found[:LENGTH], expected[:LENGTH], rtol=0, atol=1e-9)
            assert (found - expected)[LENGTH:].abs().amax() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_positions_that_grow_are_counted(case):
    loaded, tokens = prepare(made(case), case, ""), tokens_of(LENGTH + 2)
    for policy in ({"n_sink": 2, "window": 9, "positions": "keep"}, {"n_sink": 2, "window": 9, "every": 0}):
        for way in WAYS:
            streamed_logits(way, loaded, policy_of(**policy), tokens[:-1])
            with pytest.raises(UsageError, match=r"^25 positions: .* beyond 24; use positions compact"):
                streamed_logits(way, loaded, policy_of(**policy), tokens)


@pytest.mark.parametrize("case", CASES)
def test_recomputation_is_the_model_up_to_the_length(case):
    model, loaded = made(case), prepare(made(case), case, "")
    tokens = tokens_of(40)
    with in_double(), torch.inference_mode():
        found = streamed_logits("recompute", loaded, policy_of(4, LENGTH - 4), tokens)
        plain = model(torch.from_numpy(tokens[None, 15:39]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(found[-1], plain, rtol=0, atol=1e-9)
    with pytest.raises(UsageError, match="25 positions"):
        streamed_logits("recompute", loaded, policy_of(4, LENGTH - 3), tokens)
    with pytest.raises(UsageError, match="25 positions"):
        losses_at(loaded, tokens, LENGTH + 1, [30], Configuration("ours", policy_of(4, 4)).kernel)


@pytest.mark.parametrize("case", CASES)
def test_a_million_tokens_away(case):
    tokens = tokens_of(60)
    expected = streamed_logits("evaluator", prepare(made(case), "", ""), policy_of(4, 19), tokens)
    found = ring_logits_far_on(prepare(made(case).float(), "", ""), policy_of(4, 19), tokens)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


def test_a_compiled_ring_of_scaled_queries():
    loaded, tokens = prepare(made("scaled", torch.float32), "", ""), tokens_of(60)
    expected = streamed_logits("ring", loaded, policy_of(4, 19), tokens)
    found = streamed_logits("ring", loaded, policy_of(4, 19), tokens, execution="compile")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", ["longrope", "dynamic"])
def test_a_streaming_cache_up_to_the_length(case):
    stream = torch.from_numpy(tokens_of(60))[None]
    expected = surviving_logits(made(case), stream, 4, 19)[-1]
    model = made(case)
    model(stream)  # which leaves the angles of a long text in it
    torch.testing.assert_close(streamed(model, stream, 4, 19), expected, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="beyond 24; use a window_size of 19 or less"):
        StreamingCache(model, 4, 20)
    cache = StreamingCache(model, 4, 19)
    with pytest.raises(UsageError, match="give pieces of at most 24"):
        model(stream[:, :25], past_key_values=cache)
    for piece in (stream[:, :24], stream[:, 24:25]):
        model(piece, past_key_values=cache)
    with pytest.raises(
        UsageError, match=r"^3 tokens in one piece are to see 27: .* beyond 24; give pieces of at most 1"
    ):
        model(stream[:, 25:28], past_key_values=cache)


def test_a_streaming_cache_leaves_scaled_queries_to_the_engine():
    """Which may tell its layers other positions than a text has."""
    with pytest.raises(UnsupportedModelError, match=r"scales its queries .* by where in the text they are"):
        StreamingCache(made("scaled"), 4, 19)


@pytest.mark.parametrize("case", CASES)
def test_the_usual_total_is_one_that_works(case):
    loaded = prepare(made(case), case, "")
    assert loaded.trained_length == LENGTH - 1
    loaded.check_length(policy_of(4, loaded.trained_length - 4))
