import json
import math

import pytest
import torch

from streamllm.backends import BACKENDS
from streamllm.block_parallel import block_parallel_losses
from streamllm.decoding import decode_loop
from streamllm.errors import UsageError
from streamllm.methods import make_decoder
from streamllm.models import load_model, load_tokenizer
from streamllm.policy import EvictionPolicy
from streamllm.quantization import Int8Linear, quantize
from streamllm.text import TextSource, load_tokens
from streamllm.timing import bytes_per_token

from .conftest import GOLDEN

POLICY = EvictionPolicy(n_sink=4, window_size=252)


@pytest.fixture(scope="module")
def testbed_tokens():
    loaded = load_model("testbed", "float32")
    source = TextSource(max_eval_tokens=2000)
    return load_tokens(source, load_tokenizer("testbed"), loaded.model.config.vocab_size).tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_costs_next_to_nothing_on_the_testbed(dtype, testbed_tokens):
    perplexities = {
        name: math.exp(
            block_parallel_losses(load_model("testbed", dtype, quantization=name), testbed_tokens, POLICY).mean()
        )
        for name in ("none", "int8_weight_only")
    }
    assert perplexities["int8_weight_only"] == pytest.approx(perplexities["none"], rel=0.005)
    assert perplexities["int8_weight_only"] != perplexities["none"]


def test_evaluator_and_loop_agree_as_in_bfloat16(golden_tokens):
    loaded = load_model(str(GOLDEN / "neox-tiny"), "float32", quantization="int8_weight_only")
    tokens, policy = golden_tokens[:300], EvictionPolicy(n_sink=4, window_size=60)
    loop = decode_loop(make_decoder("ring", loaded, policy, BACKENDS["auto"]), tokens, loaded.device).losses
    assert abs(loop - block_parallel_losses(loaded, tokens, policy)).mean() < 0.02
    golden = json.loads((GOLDEN / "neox-tiny" / "mit_losses.json").read_text())[0]["losses"]
    assert 0 < abs(loop - golden[:299]).mean() < 0.1


def test_a_linear_layer_by_hand():
    weight = torch.zeros(2, 8, dtype=torch.int8)
    weight[:, :2] = torch.tensor([[127, -64], [1, 2]])
    layer = Int8Linear(weight, torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]), torch.bfloat16)
    assert layer(torch.tensor([[[2.0, 4.0, 0, 0, 0, 0, 0, 0]]])).tolist() == [
        [[0.5 * (254 - 256) + 1, 2.0 * (2 + 8) - 1]]
    ]


def test_a_token_reads_a_quarter_of_the_weights():
    plain, quantized = (load_model("testbed", "float32", quantization=q) for q in ("none", "int8_weight_only"))
    cache = bytes_per_token(plain, POLICY) - sum(p.nbytes for p in plain.model.parameters()) + 1024 * 192 * 4
    weights = [bytes_per_token(loaded, POLICY) - cache for loaded in (plain, quantized)]
    assert weights[1] == pytest.approx(weights[0] / 4, rel=0.03), "scales, norms and biases stay"
    assert plain.digest != quantized.digest, "or the store would take one for the other"


def test_without_torchao_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match=r"needs torchao; pip install -e '\.\[quant\]'"):
        quantize(load_model("testbed", "float32").model, "int8_weight_only")
