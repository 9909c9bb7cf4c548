import warnings

import numpy as np
import pytest
import torch

from streamllm.attention import attention, recorded_kernel, resolve_backend
from streamllm.backends import BACKENDS, Backend
from streamllm.policy import EvictionPolicy
from streamllm.timing import measure_speed


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "auto"])
def test_what_is_asked_for_is_what_runs(name, golden_model, golden_tokens, monkeypatch):
    """The kernel recorded by a real timing; torch has a math and a flash kernel on CPU."""
    monkeypatch.setattr("streamllm.timing.SEGMENTS", 6)
    monkeypatch.setattr("streamllm.timing.SEGMENT_SEC", 0.001)
    speed = measure_speed(
        golden_model("neox-tiny"), "ours", EvictionPolicy(window_size=20), BACKENDS[name], golden_tokens
    )
    assert speed.backend_used == name


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("new", "causal"), [(1, True), (5, True), (16, True), (16, False)])
def test_backends_agree(kv_heads, new, causal):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, new, 24, generator=generator)
    key, value = torch.randn(2, 1, kv_heads, 16, 24, generator=generator)
    outputs = []
    for backend in BACKENDS.values():
        with backend.active():
            outputs.append(attention(backend, query, key, value, 0.3, causal=causal))
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)


def test_the_last_query_is_aligned_with_the_last_key():
    backend = BACKENDS["eager"]
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    value = torch.tensor([0.0, 3.0, 6.0]).view(1, 1, 3, 1)
    assert attention(backend, query, key, value, 1.0, causal=True).flatten().tolist() == [1.5, 3.0]


def test_a_backend_that_does_not_run_falls_back_with_a_warning(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cudnn", Backend("cudnn", "CUDNN_ATTENTION"))
    with pytest.warns(UserWarning, match="'cudnn' does not run on cpu"):
        backend = resolve_backend("cudnn", torch.device("cpu"), torch.float32, 16)
    assert backend.name == "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("math", torch.device("cpu"), torch.float32, 16).name == "math"


def test_recorder_sees_nothing_but_what_runs_inside():
    query = torch.zeros(1, 1, 1, 8)
    with recorded_kernel(BACKENDS["flash"]) as recorder:
        pass
    attention(BACKENDS["flash"], query, query, query, 1.0)
    assert recorder.used == "math"
