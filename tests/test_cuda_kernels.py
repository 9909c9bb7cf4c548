"""Which of CUDA's attention kernels every method runs, from the first token on, by the rules of those kernels.

On a pretended CUDA device. In half precision `auto` never falls to the slow one that fits everything (`math`), nor to
cuDNN, which plans anew for every length."""

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.methods.recompute import losses_at
from streamllm.policy import EvictionPolicy

from .dispatched import POLICIES, RUNS
from .pretended_cuda import CUDA, HALF, kernel_of, pretended_cuda
from .tiny_models import tiny_model

TOKENS = np.arange(20) * 7 % 61
FAMILIES = ("GPTNeoX", "Llama")
"""A KV head for each head, and one for two."""


def kernels(method, policy, loaded, backend="auto"):
    """Those that a loop runs from its first token on."""
    with pretended_cuda(loaded) as (there, pretended), BACKENDS[backend].active():
        losses = decode_loop(make_decoder(there, Configuration(method, policy, backend)), TOKENS, CUDA).losses
    assert np.isfinite(losses).all()
    return set(pretended.kernels)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "policy"), RUNS)
def test_in_half_precision_auto_is_flash_or_efficient_where_there_is_a_mask(method, policy, family):
    """Masked is a ring that is not full."""
    expected = {"flash"}
    if method == "ring":
        expected = {"efficient"} if policy == "lazy" else {"efficient", "flash"}
    assert kernels(method, POLICIES[policy], tiny_model(family, torch.bfloat16)) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "policy"), RUNS)
def test_in_float32_auto_is_efficient(method, policy, family):
    """Which takes no groups: heads are repeated."""
    assert kernels(method, POLICIES[policy], tiny_model(family, torch.float32)) == {"efficient"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["math", "efficient", "flash", "cudnn"])
@pytest.mark.parametrize("method", ["ours", "ring"])
def test_a_kernel_asked_for_runs_where_it_can_and_nothing_is_refused(method, backend, dtype, family):
    """A first token is one key, a mask or groups are not for every kernel: another takes those calls."""
    found = kernels(method, POLICIES["strict"], tiny_model(family, dtype), backend)
    groups_alone = family == "Llama" and method == "ours" and dtype in HALF
    runs = {"math": True, "efficient": not groups_alone, "flash": dtype in HALF, "cudnn": dtype in HALF}
    assert (backend in found) == runs[backend], found
    assert ("cudnn" in found) <= (backend == "cudnn")
    if dtype in HALF and backend != "math":
        assert "math" not in found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("policy", ["strict", "lazy"])
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 80}], ids=["heads of 8", "heads of 20"])
def test_the_evaluator_runs_efficient(policy, dtype, shape, family):
    """It masks, and widens its heads to what the kernel takes."""
    with pretended_cuda(tiny_model(family, dtype, **shape)) as (there, pretended):
        block_parallel_losses(there, TOKENS, POLICIES[policy], 8)
    assert set(pretended.kernels) == {"efficient"}


@pytest.mark.parametrize("family", FAMILIES)
def test_re_computed_windows_run_flash(family):
    with pretended_cuda(tiny_model(family, torch.bfloat16)) as (there, pretended):
        losses_at(there, TOKENS, 6, [2, 3, 10, 18], BACKENDS["auto"])
    assert set(pretended.kernels) == {"flash"}


@pytest.mark.parametrize("method", ["ours", "mit", "ring"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_and_a_second_piece_of_text(family, method):
    """Torch aligns `is_causal` with the first key; we with the last: then it is a mask."""
    loaded, policy = tiny_model(family, torch.float32), EvictionPolicy(n_sink=2, window_size=20, compress_every=0)
    pieces = torch.from_numpy(TOKENS[:20]).split([7, 5, 8])
    with torch.inference_mode():
        expected = make_decoder(loaded, Configuration(method, policy)).feed(torch.cat(pieces), 0)
        with pretended_cuda(loaded) as (there, pretended), BACKENDS["auto"].active():
            decoder = make_decoder(there, Configuration(method, policy))
            found = torch.cat([decoder.feed(piece, 0) for piece in pieces])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert set(pretended.kernels) == {"efficient"}


def test_the_rules():
    """Of the kernels: what was seen on a GPU and in torch's `sdp_utils.cpp`."""

    def kernel(backend="auto", dtype=torch.bfloat16, heads=4, kv_heads=4, new=1, held=8, size=8, mask=False):
        query = torch.zeros(1, heads, new, size, dtype=dtype)
        key, value = torch.zeros(2, 1, kv_heads, held, size, dtype=dtype)
        visible = torch.ones(new, held, dtype=torch.bool) if mask else None
        with pretended_cuda(tiny_model("Llama", torch.float32)), BACKENDS[backend].alone():
            return kernel_of(query, key, value, visible, False, heads != kv_heads)

    assert kernel() == kernel(kv_heads=2) == kernel(size=20) == "flash"
    assert kernel(mask=True) == kernel(dtype=torch.float32) == "efficient"
    assert kernel(kv_heads=2, mask=True) == kernel(mask=True, size=20) == kernel(size=264, kv_heads=2) == "math"
    assert kernel("cudnn") == "cudnn"
    for refused in ({"held": 1}, {"dtype": torch.float32}):
        with pytest.raises(RuntimeError, match="No available kernel"):
            kernel("cudnn", **refused)
    with pytest.raises(RuntimeError, match="No available kernel"):
        kernel("efficient", kv_heads=2)
