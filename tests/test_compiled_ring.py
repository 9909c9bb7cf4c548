"""The compiled step of the ring reads its cache and writes one row: inductor makes no copy of it on the way.

Its own code is the subject, that for CPUs; what it allocates and passes over follows from the graph, as it does
for any device."""

import math
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from streamllm.configuration import Configuration
from streamllm.engine import execution
from streamllm.engine.backends import BACKENDS
from streamllm.engine.decoder import make_decoder
from streamllm.policy import EvictionPolicy

from .tiny_models import tiny_model

SLOTS = 1005
_ALLOCATED = re.compile(r"empty_strided_cpu\(\(([\d, ]*)\)")
_LOOPED = re.compile(r"<static_cast<int64_t>\((\d+)L\)")


def step_code(backend: str) -> tuple[str, torch.Tensor]:
    """What inductor makes of a step with a full ring, and the keys of a layer."""
    loaded = tiny_model("Llama", torch.float32, num_hidden_layers=1)
    policy = EvictionPolicy(n_sink=4, window_size=SLOTS - 5)
    with torch.inference_mode(), BACKENDS[backend].active():
        decoder = make_decoder(loaded, Configuration("ring", policy, backend, "compile"))
        decoder.feed(torch.ones(policy.kept, dtype=torch.long))
        _, codes = run_and_get_code(decoder.feed, torch.ones(1, dtype=torch.long))
    (code,) = codes
    return code, decoder.cache.keys[0]


@pytest.fixture(autouse=True)
def nothing_compiled():
    execution._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "flash"])
def test_nothing_of_the_size_of_a_cache_is_made(backend):
    code, keys = step_code(backend)
    made = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in _ALLOCATED.findall(code)]
    assert keys.shape[2] == SLOTS and made
    assert max(made) < keys.numel(), f"a buffer of {max(made)} elements beside keys of {keys.numel()}"
    if backend == "flash":  # whose kernel is torch's: nothing else passes over the cache, in place either
        looped = [int(n) for n in _LOOPED.findall(code)]
        assert looped and max(looped) < SLOTS, f"a loop over {max(looped)} of the {SLOTS} slots"
