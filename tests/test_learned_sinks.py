"""What the benchmark of learned sinks trains by and compares with is what its models compute by themselves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from streamllm.engine.loading import prepare

from .benchmarks.learned_sinks import full_attention, look, windows
from .benchmarks.sink_models import FIRST, Recipe, UnusedAttention, Variant, build_model, windows_of

RECIPE = Recipe(vocabulary=61, hidden_size=32, layers=2, heads=2, batch=2)


def random_model(learned: bool):
    """Weights are scaled up, and sinks spread: with small ones mistakes do not show."""
    model = build_model(RECIPE, Variant(float(learned), seed=3)).double().eval()
    model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                weights.normal_(std=0.25)
            elif "sinks" in name and learned:
                weights.normal_(std=2.0)
    return model


def text(n: int) -> np.ndarray:
    return np.concatenate(([FIRST], np.random.default_rng(0).integers(1, RECIPE.vocabulary, n)))


@pytest.mark.parametrize("learned", [False, True])
def test_training_attends_as_the_model_does(learned):
    model, attention = random_model(learned), UnusedAttention(mass=0.95)
    AttentionInterface.register("tested_unused_attention", attention)
    inputs = windows(text(2 * 255), 2)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        own = model(inputs, use_cache=False, output_attentions=True)
        model.set_attn_implementation("tested_unused_attention")
        logits = model(inputs, use_cache=False).logits
        torch.testing.assert_close(logits, own.logits, rtol=0, atol=1e-9)
        weights = own.attentions[1][:, :, 1:]
        unused = weights[..., 0] + (1 - weights.sum(-1)).clamp(min=0)
        expected = (np.log(0.95) - unused.log()).relu().mean()
        torch.testing.assert_close(attention.collect(), expected, rtol=0, atol=1e-9)


def test_a_sink_that_is_not_learned_draws_nothing():
    with_sinks, without = (look(random_model(learned), windows(text(255), 1)) for learned in (True, False))
    assert min(with_sinks["learned sink"]) > 1e-4
    assert max(without["learned sink"]) < 1e-12


def test_full_attention_sees_the_first_token_and_the_last_127_to_255():
    model, tokens = random_model(learned=True), text(700)
    own = copy.deepcopy(model)
    losses = full_attention(prepare(model, "tested", "tested"), tokens)
    assert len(losses) == 700
    for target, begin in ((1, 1), (200, 1), (256, 1), (257, 129), (384, 129), (385, 257), (700, 445)):
        seen = torch.from_numpy(np.concatenate((tokens[:1], tokens[begin:target])))[None]
        with torch.no_grad():
            logits = own(seen, use_cache=False).logits[0, -1]
        expected = F.cross_entropy(logits, torch.tensor(tokens[target]))
        assert losses[target - 1] == pytest.approx(expected.item(), abs=1e-5)  # its own angles are float32


def test_windows_begin_with_the_first_token():
    found = next(windows_of(torch.arange(1, 1000), RECIPE, seed=0))
    assert found.shape == (2, 256)
    assert (found[:, 0] == FIRST).all()
    assert (found[:, 2:] - found[:, 1:-1] == 1).all()
