import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.attention import attention, eager_attention, fused_attention, recorded_kernel
from streamllm.engine.backends import BACKENDS, default_backend
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.cpu_kernels import has_kernels
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.loading import load_model
from streamllm.engine.probing import BackendError, probe_backend, runnable, why_not
from streamllm.measuring.timing import Reference, measure_speed
from streamllm.policy import EvictionPolicy

from .conftest import FAMILIES, GOLDEN
from .tiny_models import tiny_model

ON_CPU = ("eager", "math", "flash")


@pytest.mark.parametrize("name", ON_CPU)
def test_what_is_asked_for_is_what_runs(name, golden_model, golden_tokens, monkeypatch):
    """The kernel recorded by a real timing; torch has a math and a flash kernel on CPU."""
    monkeypatch.setattr("streamllm.measuring.timing.SEGMENT_SEC", 0.001)
    loaded, policy = golden_model("neox-tiny"), EvictionPolicy(window_size=20)
    reference = Reference.start(loaded, policy.kept, golden_tokens)
    speed = measure_speed(loaded, Configuration("ours", policy, name), golden_tokens, reference)
    assert speed.backend_used == name


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("new", "causal"), [(1, True), (5, True), (16, True), (16, False)])
def test_backends_agree(kv_heads, new, causal):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, new, 24, generator=generator)
    key, value = torch.randn(2, 1, kv_heads, 16, 24, generator=generator)
    outputs = []
    for backend in (BACKENDS[name] for name in ("auto", *ON_CPU)):
        with backend.active():
            outputs.append(attention(backend, query, key, value, 0.3, causal=causal))
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)


def test_the_last_query_is_aligned_with_the_last_key():
    backend = BACKENDS["eager"]
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    value = torch.tensor([0.0, 3.0, 6.0]).view(1, 1, 3, 1)
    assert attention(backend, query, key, value, 1.0, causal=True).flatten().tolist() == [1.5, 3.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_math_and_flash_agree_in_logits(family, golden_model, golden_tokens):
    logits = []
    for name in ("math", "flash"):
        loaded = golden_model(family)
        with torch.inference_mode(), BACKENDS[name].active():
            decoder = make_decoder(loaded, Configuration("ours", EvictionPolicy(window_size=60), name))
            with recorded_kernel(BACKENDS[name]) as recorder:
                logits.append(torch.stack([decoder.feed(torch.tensor([token]))[0] for token in golden_tokens[:200]]))
        assert recorder.used == name
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


def test_a_probe_says_what_runs_and_why_the_rest_does_not():
    probes = {name: probe_backend(b, torch.device("cpu"), torch.float32, 16) for name, b in BACKENDS.items()}
    ours = {"cpp": "cpp"} if has_kernels() else {}
    assert {name: probe.kernel for name, probe in probes.items() if probe.kernel} == {
        "auto": "flash",
        "eager": "eager",
        "math": "math",
        "flash": "flash",
    } | ours
    assert all(probe.error for probe in probes.values() if probe.kernel is None)
    assert "flash_attn" in probes["flash_attention_2"].error


def test_torchs_reason_is_found_among_all_it_says():
    """As on an H100."""
    place = " (Triggered internally at sdp_utils.cpp:1.)"
    said = [
        f"Memory efficient kernel not used because:{place}",
        f"Memory Efficient attention has been runtime disabled.{place}",
        f"Flash attention kernel not used because:{place}",
        f"Expected query, key and value to all be of dtype: {{Half, BFloat16}}. Got Query dtype: float{place}",
        f"cuDNN attention kernel not used because:{place}",
    ]
    assert why_not("flash", said).startswith("Expected query, key and value to all be of dtype")
    assert why_not("efficient", said) == "Memory Efficient attention has been runtime disabled."
    assert why_not("cudnn", said) is None
    assert why_not("flash", ["flash does not fit"]) == "flash does not fit"


def test_a_backend_that_does_not_run_falls_back_with_a_warning_or_is_an_error():
    loaded, asked = tiny_model("Llama", torch.float32), Configuration("ring", EvictionPolicy(window_size=8), "cudnn")
    with pytest.warns(UserWarning, match="'cudnn' does not run on cpu in float32"):
        assert runnable(asked, loaded) == replace(asked, backend="auto")
    with pytest.raises(BackendError, match=r"'cudnn' does not run .*; leave out --strict"):
        runnable(asked, loaded, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runnable(replace(asked, backend="math"), loaded).backend == "math"


@pytest.mark.parametrize(("value", "backend"), [("1", "flash"), ("0", "math"), ("", "auto"), (None, "auto")])
def test_flash_sdpa_in_the_environment(value, backend, monkeypatch):
    monkeypatch.delenv("FLASH_SDPA", raising=False)
    if value is not None:
        monkeypatch.setenv("FLASH_SDPA", value)
    assert default_backend() == backend


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["mit", "ours", "ring"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "auto"])
def test_gpu_backends_agree_with_the_cpu(name, method, golden_model, golden_tokens):
    """A lazily pruned ring has masked calls too, which flash kernels do not take."""
    loaded = load_model(str(GOLDEN / "llama-tiny"), "bfloat16", torch.device("cuda"))
    if not probe_backend(BACKENDS[name], loaded.device, loaded.dtype, loaded.head_size).available:
        pytest.skip(f"{name} does not run on this GPU")
    tokens, policy = golden_tokens[:200], EvictionPolicy(window_size=60, compress_every=8)
    with BACKENDS[name].active():
        found = decode_loop(make_decoder(loaded, Configuration(method, policy, name)), tokens, loaded.device).losses
    expected = block_parallel_losses(golden_model("llama-tiny"), tokens, policy)
    assert abs(found - expected).mean() < 0.05


def test_recorder_sees_nothing_but_what_runs_inside():
    query = torch.zeros(1, 1, 1, 8)
    with recorded_kernel(BACKENDS["flash"]) as recorder:
        pass
    attention(BACKENDS["flash"], query, query, query, 1.0)
    assert recorder.used == "math"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "held", "size"), [(4, 4, 257, 64), (6, 2, 31, 10), (2, 1, 5, 7)])
def test_fused_is_eager(heads, kv_heads, held, size, masked, dtype):
    """Whole parts and rests, on either side of what the sums are split into."""
    torch.manual_seed(0)
    query = torch.randn(1, heads, 1, size, dtype=dtype)
    key, value = (torch.randn(1, kv_heads, held, size, dtype=dtype) for _ in range(2))
    mask = (torch.arange(held) % 3 != 1)[None] if masked else None
    found = fused_attention(query, key, value, 0.3, mask)
    expected = eager_attention(query.double(), key.double(), value.double(), 0.3, mask)
    assert found.dtype == dtype and found.shape == query.shape
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
