"""Random small models of many families, built without any download."""

import torch
import transformers
from hypothesis import strategies as st

from streamllm.engine.loading import prepare
from streamllm.engine.model import LoadedModel

BASE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def yarn(factor: float) -> dict:
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": factor, "original_max_position_embeddings": 64}


def plain(theta: float = 10000.0, **more) -> dict:
    return {"rope_type": "default", "rope_theta": theta, **more}


FAMILIES = {
    "GPTNeoX": {"rope_parameters": plain(partial_rotary_factor=0.25)},
    "Llama": {"num_key_value_heads": 2, "rope_parameters": plain(500000.0)},
    "Llama yarn": {"num_key_value_heads": 1, "rope_parameters": yarn(8.0)},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "Phi": {"rope_parameters": plain(partial_rotary_factor=0.5)},
    "Cohere": {"num_key_value_heads": 4, "logit_scale": 1.0},
    "Glm": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": plain(partial_rotary_factor=0.5),
        "pad_token_id": 0,
    },
}
"""Partial, grouped-query, yarn-scaled and interleaved (Cohere, GLM) rotary attention."""


def tiny_model(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu", **changed
) -> LoadedModel:
    """Weights are scaled up: with small ones all attention is uniform and mistakes do not show."""
    architecture = family.split()[0]
    config = getattr(transformers, f"{architecture}Config")(
        **BASE | {"max_position_embeddings": 4096, "pad_token_id": 0} | FAMILIES.get(family, {}) | changed
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return prepare(model.to(device, dtype), family, f"random {family} {seed}")


@st.composite
def random_models(draw) -> LoadedModel:
    """A model of any kind of rotary attention."""
    heads, size = draw(st.sampled_from([(4, 8), (2, 16), (6, 4)]))
    shape = {"hidden_size": heads * size, "num_attention_heads": heads}
    kind = draw(st.sampled_from(["partial", "grouped", "yarn", "interleaved"]))
    theta = draw(st.sampled_from([100.0, 10000.0, 500000.0]))
    seed = draw(st.integers(0, 999))
    if kind == "partial":
        fraction = draw(st.sampled_from([0.25, 0.5, 1.0])) if size > 4 else 0.5
        return tiny_model("GPTNeoX", seed=seed, rope_parameters=plain(theta, partial_rotary_factor=fraction), **shape)
    kv_heads = draw(st.sampled_from([1, 2, heads]))
    if kind == "grouped":
        return tiny_model("Llama", seed=seed, num_key_value_heads=kv_heads, rope_parameters=plain(theta), **shape)
    if kind == "yarn":
        rope = yarn(draw(st.sampled_from([2.0, 8.0, 32.0])))
        return tiny_model("Llama", seed=seed, num_key_value_heads=kv_heads, rope_parameters=rope, **shape)
    return tiny_model("Cohere", seed=seed, num_key_value_heads=kv_heads, rope_parameters=plain(theta), **shape)
