"""What is accepted is right, what is not is refused with the reason: any architecture, any dtype, at both doors."""

import pytest
import torch

from streamllm.engine.generation import StreamingCache
from streamllm.engine.loading import prepare
from streamllm.errors import UnsupportedModelError

from .plain import by_surviving_inputs, streamed
from .zoo import known, random_model

DTYPES = [torch.float32, torch.bfloat16]
BOTH = {
    "hunyuan_v1_dense": "layer 0: its keys are more than rotated: something follows the rotation",
    "bloom": "no rotary positions but linear biases",
    "gpt2": "no rotary positions but embedded ones",
    "gptj": "rotary positions that its attention computes in code of its own",
    "qwen3_5": "layers of another kind: linear_attention",
}
"""Architecture -> what is said of it, whether it is loaded or given a StreamingCache."""
OF_THE_ENGINE = {
    "doge": "its mask is neither causal nor a sliding window",
    "beam": "layer 3: its queries depend on the position itself",
    "moshi": "a sliding window .* that no layer is seen to use",
    "diffllama": "computes attention more than once in a layer",
    "falcon": "attention code of its own",
    "mllama": "something else than the text",
}
"""What the engine refuses; a StreamingCache, with which models use their own attention, may take it."""
OF_A_CACHE = {"ministral3": r"scales its queries .* by where in the text they are"}
"""What the engine takes, as it can tell its layers other positions; a StreamingCache cannot."""
RIGHT = ("llama", "gpt_neox", "cohere", "gemma", "glm4", "mixtral", "granite", "jetmoe", "phi3", "olmo2", "fuyu")
RIGHT += ("smollm3", "nanochat", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "stablelm")
OF_SEVERAL_KINDS = ("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "mistral", "modernbert-decoder", "olmo3")
"""What the engine takes; a StreamingCache has no place for their windows."""
OWN_ATTENTION = ("doge", "diffllama", "falcon", "gpt_neox_japanese", "mllama")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("architecture", known(BOTH))
def test_refused_at_both_doors(architecture, scale, dtype):
    with pytest.raises(UnsupportedModelError, match=BOTH[architecture]):
        prepare(random_model(architecture, dtype, scale), architecture, "")
    with pytest.raises(UnsupportedModelError, match=BOTH[architecture]):
        StreamingCache(random_model(architecture, dtype, scale), window_size=24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("architecture", known(OF_THE_ENGINE))
def test_refused_by_the_engine(architecture, scale, dtype):
    with pytest.raises(UnsupportedModelError, match=OF_THE_ENGINE[architecture]):
        prepare(random_model(architecture, dtype, scale), architecture, "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", known(OF_A_CACHE))
def test_refused_by_a_streaming_cache(architecture, dtype):
    prepare(random_model(architecture, dtype), architecture, "")
    with pytest.raises(UnsupportedModelError, match=OF_A_CACHE[architecture]):
        StreamingCache(random_model(architecture, dtype), window_size=24)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@torch.no_grad()
def test_a_norm_after_the_rotation_commutes_with_it_if_its_weights_are_equal(equal):
    """By the model's own words: a text is the same anywhere, or is not."""
    model = random_model("hunyuan_v1_dense", torch.float64)
    for layer in model.model.layers:
        for norm in (layer.self_attn.query_layernorm, layer.self_attn.key_layernorm) if equal else ():
            norm.weight.fill_(1.5)
    stream = torch.arange(3, 40)[None] * 7 % 120
    here, there = (model(stream, position_ids=torch.arange(37)[None] + at).logits for at in (0, 50))
    assert torch.allclose(here, there, atol=1e-3) == equal
    if equal:
        prepare(model, "", "")
    else:
        with pytest.raises(UnsupportedModelError, match="places count and not distances alone"):
            prepare(model, "", "")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", known(RIGHT))
def test_peaked_weights_are_no_reason(architecture, dtype):
    if dtype == torch.float64 and architecture in ("mixtral", "jetmoe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        pytest.skip("transformers' experts know no float64")
    prepare(random_model(architecture, dtype), architecture, "")
    StreamingCache(random_model(architecture, dtype), window_size=24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_no_layer_can_be_seen_the_whole_model_is_asked(dtype):
    """Falcon, but positions leak into its embeddings, as little as they would in a short text."""
    model, at = random_model("falcon", dtype), []

    def positions(_, arguments, options):
        at[:] = [options.get("position_ids")]

    def leak(_, arguments, output):
        return output if at[0] is None else output + (at[0][..., None] * uneven).to(output.dtype)

    uneven = torch.linspace(-1e-6, 1e-6, 64)

    model.register_forward_pre_hook(positions, with_kwargs=True)
    model.transformer.word_embeddings.register_forward_hook(leak)
    with pytest.raises(UnsupportedModelError, match="its positions are more than a rotation"):
        StreamingCache(model, window_size=24)


@pytest.mark.parametrize("seed", range(8))
def test_rounding_alone_is_no_reason(seed):
    """One layer, whose split and whole forward passes often agree to the last digit."""
    model = random_model("llama", num_hidden_layers=1, vocab_size=120)
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=2 / weight.shape[-1] ** 0.5)
    StreamingCache(model, window_size=24)
    prepare(model, "llama", "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("architecture", known(OF_SEVERAL_KINDS))
def test_layers_of_several_kinds(architecture, scale, dtype):
    prepare(random_model(architecture, dtype, scale), architecture, "")
    with pytest.raises(UnsupportedModelError, match="has a sliding window of its own"):
        StreamingCache(random_model(architecture, dtype, scale), window_size=24)


def test_soft_caps_that_are_none_are_no_reason():
    prepare(random_model("gemma2", attn_logit_softcapping=None), "gemma2", "")


def test_own_attention_may_be_more_than_a_softmax():
    model = random_model("gemma2", layer_types=["full_attention"] * 4)
    stream = torch.arange(3, 60)[None] * 7 % 120
    error = streamed(model, stream, 4, 24).log_softmax(-1) - by_surviving_inputs(model, stream, 4, 24).log_softmax(-1)
    assert error.abs().mean() < 1e-3


def test_experts_in_float64_are_refused_in_a_line():
    with pytest.raises(UnsupportedModelError, match="forward pass fails on 24 tokens of text in float64"):
        prepare(random_model("mixtral", torch.float64), "mixtral", "")


def test_a_weight_that_is_no_number_is_named():
    model = random_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"not finite in model\.layers\.1\.mlp\.down_proj\.weight"):
        prepare(model, "llama", "")


@pytest.mark.parametrize("architecture", known([*RIGHT, *OWN_ATTENTION]))
def test_a_streaming_cache_is_the_policy(architecture):
    """Held against the model's own attention, over the tokens that survive."""
    model = random_model(architecture)
    stream = torch.arange(3, 90)[None] * 7 % 120
    found = streamed(model, stream, n_sink=4, window=24)
    expected = by_surviving_inputs(model, stream, n_sink=4, window=24)
    assert (found.log_softmax(-1) - expected.log_softmax(-1)).abs().mean() < 1e-3
