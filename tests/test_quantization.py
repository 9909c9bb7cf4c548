import json
import math

import pytest
import torch
import transformers

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.device import cpu_capability
from streamllm.engine.loading import load_model, load_tokenizer, prepare
from streamllm.engine.quantization import Int4Linear, Int8Linear, _int4_weights, quantize
from streamllm.errors import UsageError
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.measuring.timing import bytes_per_token
from streamllm.policy import EvictionPolicy

from .conftest import GOLDEN
from .tiny_models import BASE

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
    loop = decode_loop(make_decoder(loaded, Configuration("ring", policy)), tokens, loaded.device).losses
    assert abs(loop - block_parallel_losses(loaded, tokens, policy)).mean() < 0.02
    golden = json.loads((GOLDEN / "neox-tiny" / "mit_losses.json").read_text())[0]["losses"]
    assert 0 < abs(loop - golden[:299]).mean() < (0.1 if quantization == "int8_weight_only" else 1.0)


@pytest.mark.parametrize("quantization", ["int8_weight_only", "int4_weight_only"])
def test_a_head_tied_to_the_embedding_becomes_a_copy_in_int8(quantization):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **BASE | {"vocab_size": 64, "hidden_size": 64, "tie_word_embeddings": True}, max_position_embeddings=128
    )
    model = transformers.LlamaForCausalLM(config)
    loaded = prepare(model, "tied", "random", quantization)
    embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert type(head) is Int8Linear and head.weight.dtype == torch.int8
    assert type(embedding) is torch.nn.Embedding and embedding.weight.dtype == torch.float32
    torch.testing.assert_close(head.weight * head.scale.float()[:, None], embedding.weight, rtol=0, atol=2e-3)
    read = sum(parameter.nbytes for parameter in loaded.model.parameters()) - embedding.weight.nbytes
    assert bytes_per_token(loaded, POLICY) == read + 257 * loaded.kv_bytes


def test_a_linear_layer_by_hand():
    weight = torch.zeros(2, 32, dtype=torch.int8)
    weight[:, :2] = torch.tensor([[127, -64], [1, 2]])
    layer = Int8Linear(weight, torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]), torch.bfloat16)
    input = torch.zeros(1, 1, 32)
    input[..., :2] = torch.tensor([2.0, 4.0])
    assert layer(input).tolist() == [[[0.5 * (254 - 256) + 1, 2.0 * (2 + 8) - 1]]]


def test_int4_is_within_half_a_step_of_the_weights():
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 48)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    found = Int4Linear.of(layer)[0](torch.eye(96)).T - bias[:, None]
    groups = weight.unflatten(1, (3, 32))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (found - weight).unflatten(1, (3, 32)).abs().amax(-1)
    assert (error <= 0.5 * step + 0.01 * weight.abs().max()).all(), "what is added is bfloat16's rounding"
    assert (error > 0.2 * step).any()


KERNELS = {"int8_weight_only": "_weight_int8pack_mm", "int4_weight_only": "_weight_int4pack_mm_for_cpu"}
FAULTS = {
    "zeros": lambda y: y.zero_(),
    "no number": lambda y: y.fill_(float("nan")),
    "one no number": lambda y: y.view(-1)[-1].fill_(float("nan")),
    "what AVX-512 made of rows of 24": lambda y: y.fill_(1e33),
    "a row's neighbour": lambda y: y.copy_(y.roll(1, -1)),
    "the last column": lambda y: y[:, -1].mul_(1.1),
    "a twentieth too large": lambda y: y.mul_(1.05),
    "a single token": lambda y: y.neg_() if len(y) == 1 else y,
    "several tokens": lambda y: y.neg_() if len(y) > 1 else y,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("quantization", KERNELS)
def test_a_wrong_kernel_is_refused(quantization, fault, monkeypatch):
    right = getattr(torch.ops.aten, KERNELS[quantization])

    def wrong(*arguments):
        product = right(*arguments)
        FAULTS[fault](product)
        return product

    monkeypatch.setattr(torch.ops.aten, KERNELS[quantization], wrong)
    message = (
        rf"^quantization '{quantization}': torch's kernel is wrong on this CPU \({cpu_capability()}\), .* instead "
    )
    with pytest.raises(UsageError, match=message) as refusal:
        load_model(str(GOLDEN / "neox-tiny"), "float32", quantization=quantization)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("quantization", KERNELS)
def test_every_shape_is_tried_once(quantization, monkeypatch):
    right, calls = getattr(torch.ops.aten, KERNELS[quantization]), []

    def counted(rows, weight, *more):
        output = right(rows, weight, *more)
        calls.append((len(rows), rows.shape[1], output.shape[1]))
        return output

    monkeypatch.setattr(torch.ops.aten, KERNELS[quantization], counted)
    model = load_model("testbed", "float32").model
    quantize(model, quantization)
    shapes = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, Int8Linear | Int4Linear)}
    assert shapes == {(192, 576), (192, 192), (192, 768), (768, 192), (192, 1024)}
    assert sorted(calls) == sorted((rows, *shape) for shape in shapes for rows in (1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [32, 96, 160, 576])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_kernels_compute_what_they_should(kind, inputs, dtype):
    torch.manual_seed(inputs)
    for outputs in (16, 48, 80, 192):
        layer = torch.nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
        layer.weight[:, ::7] *= 30  # outliers, as real models have them
        quantized, weights = kind.of(layer)
        for tokens in (1, 3, 4, 7, 33):
            input = torch.randn(tokens, inputs).bfloat16()
            exact = input.float() @ weights().T + layer.bias.float()
            found = quantized(input.to(dtype)).float()
            torch.testing.assert_close(found, exact, rtol=0.02, atol=0.01 * exact.abs().max().item())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_compiled_for_one_token_int8_is_a_product_in_float32(dtype, rounding):
    """Of several tokens it is the kernel in bfloat16, as where nothing is compiled."""
    torch.manual_seed(0)
    layer, weights = Int8Linear.of(torch.nn.Linear(96, 48).requires_grad_(False))
    compiled = torch.compile(lambda input: layer(input), backend="aot_eager")
    one, several = torch.randn(1, 1, 96, dtype=dtype), torch.randn(1, 5, 96, dtype=dtype)
    exact = one.float() @ weights().T + layer.bias
    torch.testing.assert_close(compiled(one).float(), exact, rtol=rounding, atol=1e-6)
    assert torch.equal(compiled(several), layer(several))


@pytest.mark.parametrize("quantization", KERNELS)
@pytest.mark.parametrize("odd", [24, 40, 56, 72, 80, 104])
def test_layers_that_do_not_fit_stay_as_they_are(odd, quantization):
    """Of no machine: with AVX-512 those of int8 would be garbage, with AVX2 right."""
    config = transformers.GPTNeoXConfig(
        hidden_size=odd, num_attention_heads=4, intermediate_size=96, num_hidden_layers=2, vocab_size=64
    )
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config)
    quantize(model, quantization)
    changed = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, Int8Linear | Int4Linear)}
    assert changed == ({"dense_4h_to_h"} if quantization == "int8_weight_only" or odd % 16 == 0 else set())
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_bytes_of_two_weights():
    """What torchao makes for CUDA: the first weight in the high half."""
    rounded = torch.randint(0, 16, (3, 64))
    scales_and_zeros = torch.randn(2, 3, 2)
    packed = (rounded[:, ::2] << 4 | rounded[:, 1::2]).to(torch.uint8)
    weights = _int4_weights(rounded, scales_and_zeros)
    assert torch.equal(_int4_weights(packed, scales_and_zeros), weights)
    assert weights[2, 40] == (rounded[2, 40] - 8) * scales_and_zeros[1, 2, 0] + scales_and_zeros[1, 2, 1]


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
