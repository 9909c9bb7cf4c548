"""Our kernels for CPUs beside plain arithmetic, in every shape that a loop of theirs has an end for."""

import subprocess

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine import cpu_kernels, execution, probing
from streamllm.engine.attention import eager_attention
from streamllm.engine.backends import BACKENDS
from streamllm.engine.cpu_kernels import decode_attention, has_kernels, matrix_vector
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.execution import MatrixVectorLinear, _for_one_token
from streamllm.engine.loading import load_model
from streamllm.engine.probing import probe_backend
from streamllm.engine.quantization import Int8Linear
from streamllm.engine.softmax import Softmax
from streamllm.measuring.timing import used_backend
from streamllm.policy import EvictionPolicy

pytestmark = pytest.mark.skipif(not has_kernels(), reason="no C++ compiler")

KEPT = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def given(heads, kv_heads, size, value_size, held, kept, batch=1):
    """A query, keys and values; the same numbers in float64."""
    random = torch.Generator().manual_seed(held)
    query = torch.randn(batch, heads, 1, size, generator=random)
    key = torch.randn(batch, kv_heads, held, size, generator=random).to(kept)
    value = torch.randn(batch, kv_heads, held, value_size, generator=random).to(kept)
    return (query, key, value), [x.to(torch.float32).double() for x in (query, key, value)]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "value_size", "held"),
    [
        (8, 8, 64, 64, 300),
        (9, 3, 64, 64, 513),
        (6, 2, 20, 12, 1),
        (4, 1, 256, 256, 130),
        (5, 1, 80, 80, 127),
        (7, 1, 24, 6, 129),
        (12, 2, 192, 128, 200),
        (2, 2, 5, 7, 3),
    ],
)
def test_attention_is_plain_attention(heads, kv_heads, size, value_size, held, kept, threads):
    narrow, exact = given(heads, kv_heads, size, value_size, held, kept, batch=2)
    mask = (torch.arange(held) % 5 != 1)[None]
    learned = torch.randn(heads, generator=torch.Generator().manual_seed(0))
    for seen in (None, mask):
        for softmax in (Softmax(), Softmax(cap=2.0), Softmax(sinks=learned), Softmax(3.0, learned)):
            found = decode_attention(*narrow, seen, 0.2, softmax)
            torch.testing.assert_close(
                found.double(), eager_attention(*exact, 0.2, seen, softmax), rtol=0, atol=6e-6, check_dtype=False
            )


@pytest.mark.parametrize("kept", KEPT)
def test_every_number_of_a_format_is_read_as_it_is(kept):
    """By attention that sees one value at a time: subnormal ones, and the largest."""
    bits = torch.arange(2 ** (8 * min(kept.itemsize, 2)), dtype=torch.int32)
    if kept.itemsize == 4:
        numbers = torch.cat((torch.tensor([0.0, 1e-45, -1e-38, 3e38]), torch.randn(508)))
    else:
        numbers = bits.to(torch.uint8 if kept.itemsize == 1 else torch.uint16).view(kept)
    numbers = numbers[numbers.float().isfinite()]
    value = numbers[: len(numbers) // 16 * 16].view(1, -1, 1, 16)
    heads = value.shape[1]
    query, key = torch.zeros(1, heads, 1, 16), torch.zeros(1, heads, 1, 16, dtype=kept)
    found = decode_attention(query, key, value, None, 1.0, Softmax())
    assert torch.equal(found.flatten(), value.flatten().float())


def test_what_is_no_number_stays_none():
    for kept in KEPT:
        for place in ("key", "value"):
            (query, key, value), _ = given(4, 2, 32, 32, 200, kept)
            where = key if place == "key" else value
            where.view(torch.uint8 if kept.itemsize == 1 else where.dtype)[0, 1, 150, 3] = (
                0x7F if kept.itemsize == 1 else float("nan")
            )
            found = decode_attention(query, key, value, None, 0.2, Softmax())
            assert found[0, :2].isfinite().all()
            assert found[0, 2:].isnan().any(-1).all(), (kept, place)


def test_a_key_far_above_the_rest_takes_all():
    """Logits of thousands, in the second tile: the first's weights become zero, not less than nothing."""
    (query, key, value), _ = given(2, 2, 16, 16, 300, torch.float32)
    key[:, :, 200] = 1000 * query[:, :, 0]
    found = decode_attention(query, key, value, None, 1.0, Softmax())
    torch.testing.assert_close(found, value[:, :, 200:201], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 64), (131, 576), (24, 1536)])
def test_a_matrix_times_a_vector(shape, kept, threads):
    random = torch.Generator().manual_seed(1)
    weight = (torch.randn(shape, generator=random) * (50 if kept == torch.int8 else 1)).to(kept)
    vector = torch.randn(shape[1], generator=random)
    exact = weight.double() @ vector.double()
    atol = 1e-6 * float(exact.abs().max())
    torch.testing.assert_close(matrix_vector(weight, vector).double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("softmax", [Softmax(), Softmax(cap=20.0), Softmax(sinks=torch.ones(4))])
def test_a_probe_finds_it_whatever_the_softmax(softmax):
    probe = probe_backend(BACKENDS["cpp"], torch.device("cpu"), torch.bfloat16, 24, 4, 2, 70, softmax)
    assert (probe.kernel, probe.available) == ("cpp", True)


def test_another_number_format_is_an_error_that_says_so():
    query = torch.zeros(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match="reads no Double"):
        decode_attention(query, query.double(), query.double(), None, 1.0, Softmax())


@pytest.mark.parametrize("quantization", ["none", "int8_weight_only"])
def test_a_compiled_step_computes_with_them_what_an_eager_one_does(quantization, monkeypatch):
    """In every matrix; a full ring, and one with a mask."""
    monkeypatch.setattr(execution, "_WORTH_A_CALL", 0)
    loaded = load_model("testbed", "float32", quantization=quantization)
    linear = [
        x for x in _for_one_token(loaded.model, True).modules() if isinstance(x, (MatrixVectorLinear, Int8Linear))
    ]
    assert linear and all(x.has_kernel for x in linear)
    tokens = np.random.default_rng(0).integers(0, 200, 60)
    for every in (1, 4):
        policy = EvictionPolicy(n_sink=2, window_size=20, compress_every=every)
        decoder = make_decoder(loaded, Configuration("ring", policy, execution="compile"))
        assert decoder.cache.backend.name == "cpp"
        found = decode_loop(decoder, tokens, loaded.device).losses
        expected = decode_loop(make_decoder(loaded, Configuration("ring", policy)), tokens, loaded.device).losses
        # Eagerly int8 is multiplied in bfloat16.
        assert abs(found - expected).max() < (2e-5 if quantization == "none" else 0.1)


def test_where_they_cannot_be_had_steps_are_compiled_as_before(monkeypatch, golden_model, golden_tokens):
    monkeypatch.setattr(probing, "_probed", lambda *_: False)
    what = Configuration("ring", EvictionPolicy(n_sink=2, window_size=30), execution="compile")
    assert used_backend(golden_model("llama-tiny"), what, golden_tokens) == "fused"


def test_a_library_that_is_not_one_is_named_with_the_fix(monkeypatch, tmp_path):
    (tmp_path / "x.so").write_text("nothing to run")
    monkeypatch.setattr(cpu_kernels, "_library", lambda: tmp_path / "x.so")
    with pytest.raises(RuntimeError, match=r"x\.so.*; set STREAMLLM_CACHE to another folder"):
        cpu_kernels._loaded.__wrapped__()


def test_a_missing_compiler_is_said_with_the_fix(monkeypatch, tmp_path):
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler; install g\+\+"):
        cpu_kernels._library()


def test_a_compiler_that_fails_is_named_with_what_it_says(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho first\necho 'x.cpp:1: error: no such luck'\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=r"c\+\+ does not compile our kernels: x.cpp:1: error: no such luck"):
        cpu_kernels._library()
    assert not list((tmp_path / "cache" / "cpu").glob("*.so"))


def test_a_library_is_made_once_and_for_one_kind_of_processor(monkeypatch, tmp_path):
    calls = []

    def run(*command):
        calls.append(command)
        if "-o" in command:
            cpu_kernels.Path(command[-1]).write_text("built")
        return "macros of one processor"

    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "_run", run)
    first = cpu_kernels._library()
    assert cpu_kernels._library() == first and sum("-o" in call for call in calls) == 1
    monkeypatch.setattr(cpu_kernels, "_target", lambda compiler: "macros of another")
    assert cpu_kernels._library() != first
    monkeypatch.setattr(cpu_kernels.torch, "__version__", "3.0")
    assert len({first, cpu_kernels._library()}) == 2


def test_a_compiler_that_hangs_is_given_up(monkeypatch):
    def hang(*_, **__):
        raise subprocess.TimeoutExpired("g++", 600)

    monkeypatch.setattr(cpu_kernels.subprocess, "run", hang)
    with pytest.raises(RuntimeError, match=r"g\+\+ took more than 600 s"):
        cpu_kernels._run("g++")
