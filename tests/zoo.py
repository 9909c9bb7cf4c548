"""Tiny random models of any causal architecture that transformers knows, from its own configuration class."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12}
NARROW = {"sliding_window": 12}
SHARED = {"num_kv_shared_layers": 2}
KINDS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "qwen3", "gpt_neox", "olmo2", "phi", "glm4", "gemma", "granite")},
    **{name: {} for name in ("smollm3", "nanochat", "ministral3", "stablelm", "nemotron")},
    **{name: {} for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")},
    **dict.fromkeys(("cohere2", "exaone4", "afmoe", "olmo3", "gemma2", "gemma3_text", "modernbert-decoder"), MIXED),
    **dict.fromkeys(("gpt_oss", "mimo_v2_flash", "granite_swa", "laguna", "ministral", "vaultgemma"), MIXED),
    **dict.fromkeys(("mistral", "mixtral", "starcoder2", "phi3"), NARROW),
}
"""Architectures with layers of several kinds, and popular ones without; and what is changed of their own:
of windows, that some layers have one, of fewer tokens than any policy holds."""


def known(names: Iterable[str]) -> list[str]:
    """Those that this transformers has."""
    return [name for name in names if name in ARCHITECTURES]


_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "encoder_hidden_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "moe_intermediate_size", "encoder_ffn_dim"), 96
    ),
    **dict.fromkeys(("decoder_ffn_dim", "shared_expert_intermediate_size", "ffn_hidden_size", "dim_feedforward"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_head_dim": 16,
    "kv_channels": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "rotary_dim": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 4096),
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EACH = object()
_MOST_PARAMETERS = 20_000_000


def small_configuration(architecture: str, **changed: Any) -> PretrainedConfig:
    """As its class makes it, with the sizes of a toy."""
    kind = CONFIG_MAPPING[architecture]
    usual = kind()
    text = usual.get_text_config(decoder=True)
    if text is not usual:
        nested = next(name for name in usual.sub_configs if getattr(usual, name, None) is text)
        return kind(**{nested: _smaller(type(text), text, {}).to_dict()} | changed)
    return _smaller(kind, usual, changed)


def _smaller(kind: type[PretrainedConfig], usual: PretrainedConfig, changed: dict[str, Any]) -> PretrainedConfig:
    names = set(usual.attribute_map) | set(vars(usual)) | set(inspect.signature(kind.__init__).parameters)
    wanted = {name: value for name, value in _SMALL.items() if name in names and _usual(usual, name) is not None}
    if "head_dim" in names:
        wanted["head_dim"] = _SMALL["qk_rope_head_dim" if "qk_rope_head_dim" in names else "head_dim"]
    if "n_routed_experts" in wanted and "num_experts_per_tok" in names:  # DeepSeek-V2 says of neither how many
        wanted["num_experts_per_tok"] = 2
    if _usual(usual, "head_dim") is _EACH:
        wanted["global_head_dim"] = 32
    if _usual(usual, "num_key_value_heads") in (None, _usual(usual, "num_attention_heads", 0)):
        wanted.pop("num_key_value_heads", None)
        wanted |= {"num_key_value_heads": 4} if "num_key_value_heads" in names else {}
    for sized in ("attn_config", "ffn_config"):  # dbrx's
        wanted |= {sized: {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4,
                   "moe_top_k": 2}}[sized]} if kind.model_type == "dbrx" else {}  # fmt: skip
    return kind(**wanted | changed)


def _usual(config: PretrainedConfig, name: str, otherwise: Any = None) -> Any:
    try:
        return getattr(config, name, otherwise)
    except RuntimeError:  # of newer transformers: layers have each their own
        return _EACH


def random_model(architecture: str, dtype: torch.dtype = torch.float32, scale: float = 2.0, **changed: Any) -> Any:
    """Matrices of standard deviation scale / sqrt(inputs), norms and biases noisy: mistakes show. Raises ValueError for
    one that does not become small, and whatever its classes raise."""
    config = small_configuration(architecture, **changed)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{architecture}: {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=scale / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def tiny(architecture: str, dtype: torch.dtype = torch.float64, **changed: Any) -> Any:
    """To be held to transformers' own eager attention."""
    model = random_model(architecture, dtype, scale=1.0, **changed)
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others do not know it
    model.set_attn_implementation("eager")
    return model
