"""Everything a model's device computes is computed there and nothing is asked back, on the way to a loss.

On the meta device tensors have no values: an `.item()`, a mask as an index and a tensor of the CPU's among those of the
device are errors there. Where the evaluator lays out a block it reads values by design, in `begin_block`, a handful
per block: that runs on the CPU here, and on a device that has values in `tests/elsewhere.py`.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from streamllm.engine import rounded_blocks
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.block_state import BlockState
from streamllm.engine.decoding import decode_loop

from .dispatched import LAZY, POLICIES, RUNS, STRICT, decode, decoder_of, looking, on_meta, one_device
from .tiny_models import tiny_model

FAMILIES = ("GPTNeoX", "Llama")
"""A part of each head is rotary; grouped queries."""
TOKENS = np.arange(20) * 7 % 61


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def on_device(family):
    return on_meta(tiny_model(family, torch.bfloat16, num_hidden_layers=1))


@pytest.mark.parametrize(("method", "policy"), RUNS)
def test_a_loop_stays_on_the_device(method, policy, on_device):
    stream = torch.from_numpy(TOKENS).to("meta")
    with looking(one_device):
        losses = decode(decoder_of(method, on_device, POLICIES[policy]), stream)
    assert {(loss.device.type, loss.dtype, loss.shape) for loss in losses} == {("meta", torch.float64, (1,))}


@pytest.mark.parametrize("method", ["ours", "mit", "ring", "recompute"])
def test_several_tokens_at_once_stay_on_the_device(method, on_device):
    never = type(STRICT)(n_sink=2, window_size=5, compress_every=0)
    decoder = decoder_of(method, on_device, never)
    with looking(one_device):
        for count in (1, 5, 7):
            logits = decoder.feed(torch.zeros(count, dtype=torch.long, device="meta"), logits_to_keep=0)
            assert logits.shape == (count, 61) and logits.is_meta


def test_a_loop_asks_for_its_losses_once_at_its_end(on_device):
    """Every token is through before anything is read."""
    done = []
    decoder = decoder_of("ring", on_device, LAZY)
    with pytest.raises(NotImplementedError, match="no data"):
        decode_loop(decoder, TOKENS, on_device.device, progress=lambda step, _: done.append(step))
    assert len(done) == len(TOKENS) - 1


@pytest.mark.parametrize("policy", [STRICT, LAZY], ids=["strict", "lazy"])
def test_the_evaluator_stays_on_the_device_but_for_the_layout_of_blocks(policy, family, monkeypatch):
    laid_out, on_device = (tiny_model(family, torch.bfloat16, num_hidden_layers=1) for _ in range(2))

    class LaidOutOnTheCpu(BlockState):
        def __init__(self, loaded, policy, n_tokens):
            super().__init__(loaded, policy, n_tokens)
            self.layout = BlockState(laid_out, policy, n_tokens)
            self.layout.evict = self.evict  # of these keys and values

        def begin_block(self, start, stop):
            self.layout.begin_block(start, stop)
            there = tree_map_only(Tensor, lambda x: x.to("meta"), vars(self.layout))
            for name in ("held", "sinks", "visible", "key_angles", "query_angles", "sink_angles"):
                setattr(self, name, there[name])
            self.query_angles_to_sinks = there["query_angles_to_sinks"]

    monkeypatch.setattr(rounded_blocks, "BlockState", LaidOutOnTheCpu)
    done = []
    with pytest.raises(NotImplementedError, match="no data"):  # the losses, at the end
        block_parallel_losses(on_meta(on_device), TOKENS, policy, 8, progress=lambda step, _: done.append(step))
    assert done[-1] == len(TOKENS) - 1
