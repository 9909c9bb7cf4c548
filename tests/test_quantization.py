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
from streamllm.quantization import Int4Linear, Int8Linear, quantize
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
@pytest.mark.parametrize(("quantization", "cost"), [("int8_weight_only", 0.005), ("int4_weight_only", 0.03)])
def test_what_it_costs_on_the_testbed(quantization, cost, dtype, testbed_tokens):
    perplexities = {
        name: math.exp(
            block_parallel_losses(load_model("testbed", dtype, quantization=name), testbed_tokens, POLICY).mean()
        )
        for name in ("none", quantization)
    }
    assert perplexities[quantization] == pytest.approx(perplexities["none"], rel=cost)
    assert perplexities[quantization] != perplexities["none"]


@pytest.mark.parametrize("quantization", ["int8_weight_only", "int4_weight_only"])
def test_evaluator_and_loop_agree_as_in_bfloat16(quantization, golden_tokens):
    loaded = load_model(str(GOLDEN / "neox-tiny"), "float32", quantization=quantization)
    tokens, policy = golden_tokens[:300], EvictionPolicy(n_sink=4, window_size=60)
    loop = decode_loop(make_decoder("ring", loaded, policy, BACKENDS["auto"]), tokens, loaded.device).losses
    assert abs(loop - block_parallel_losses(loaded, tokens, policy)).mean() < 0.02
    golden = json.loads((GOLDEN / "neox-tiny" / "mit_losses.json").read_text())[0]["losses"]
    assert 0 < abs(loop - golden[:299]).mean() < (0.1 if quantization == "int8_weight_only" else 1.0)


def test_a_linear_layer_by_hand():
    weight = torch.zeros(2, 8, dtype=torch.int8)
    weight[:, :2] = torch.tensor([[127, -64], [1, 2]])
    layer = Int8Linear(weight, torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]), torch.bfloat16)
    assert layer(torch.tensor([[[2.0, 4.0, 0, 0, 0, 0, 0, 0]]])).tolist() == [
        [[0.5 * (254 - 256) + 1, 2.0 * (2 + 8) - 1]]
    ]


def test_int4_is_within_half_a_step_of_the_weights():
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 48)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    found = Int4Linear.of(layer)(torch.eye(96)).T - bias[:, None]
    groups = weight.unflatten(1, (3, 32))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (found - weight).unflatten(1, (3, 32)).abs().amax(-1)
    assert (error <= 0.5 * step + 0.01 * weight.abs().max()).all(), "what is added is bfloat16's rounding"
    assert (error > 0.2 * step).any()


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
