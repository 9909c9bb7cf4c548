"""Models that see images too, by the part of them that reads and writes text."""

import numpy as np
import pytest
import torch
import transformers

from streamllm.engine.loading import load_model, prepare

from .test_layer_kinds import assert_exact, in_double

SEEN = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = SEEN | {"image_size": 28, "patch_size": 14}
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12, "head_dim": 16}
IN_THREE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
"""Time, height and width, which of text are one position."""
TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
MODELS = {
    "Gemma3": {"text_config": TEXT | MIXED, "vision_config": IMAGES, "mm_tokens_per_image": 4, "image_token_index": 5},
    "Mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": IMAGES | {"model_type": "pixtral"},
        "image_token_index": 5,
    },
    "Llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": IMAGES | {"model_type": "clip_vision_model"},
        "image_token_index": 5,
    },
    "Qwen2_5_VL": {"text_config": TEXT | IN_THREE, "vision_config": QWEN} | TOKENS,
}


def seeing(name, dtype=torch.float64):
    configuration = getattr(transformers, f"{name}Config")(**MODELS[name])
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    model = kind._from_config(configuration, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1 / weight.shape[-1] ** 0.5)
    return model


def tokens_of(count):
    """None of which stands for an image."""
    return 10 + np.arange(count) * 7 % 110


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("name", MODELS)
def test_every_way_is_the_model_over_the_survivors(name, positions):
    model, loaded = seeing(name), prepare(seeing(name), name, "")
    assert {layer.window for layer in loaded.layers} >= ({None, 12} if name == "Gemma3" else set())
    with in_double():
        assert_exact(model, loaded, {"n_sink": 4, "window": 20}, positions, tokens_of(50))


def test_it_is_loaded_from_its_files(tmp_path):
    """transformers has no class of text alone for it."""
    seeing("Llava", torch.float32).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "float32")
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration" and len(loaded.layers) == 4
