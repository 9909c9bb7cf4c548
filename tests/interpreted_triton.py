"""What tests/test_triton.py asks of Triton's interpreter, as a program: it has to be chosen before Triton is imported.

TRITON_INTERPRET=1 python -m tests.interpreted_triton GROUP -> {case: outcome} as JSON on the last line.
"""

import itertools
import json
import sys

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.attention import attention, eager_attention, recorded_kernel
from streamllm.engine.backends import BACKENDS
from streamllm.engine.decoding import negative_log_likelihood
from streamllm.engine.loading import load_model
from streamllm.engine.methods import make_decoder
from streamllm.engine.probing import probe_backend
from streamllm.policy import EvictionPolicy

from .conftest import FAMILIES, GOLDEN

MASKS = ("none", "ring", "random", "split hidden", "all but the last hidden")
FED, WRAPPED, STEPS = 64, 130, 16
"""Tokens of a golden stream: taken in at once; one by one by torch, until a ring has wrapped around; by us."""


def kernel_cases():
    """(heads, KV heads, size, held, mask, dtype), fewer of what takes long; masks and dtypes come in turn."""
    few, many = ((4, 4), (8, 2)), ((32, 8), (32, 32))
    shapes = [
        *itertools.product(few, (16, 64, 80, 128), (1, 7, 64, 257)),
        *itertools.product(few, (80,), (2048, 2048)),
        *itertools.product(many, (16, 80), (7, 64)),
    ]
    masks = itertools.cycle(MASKS)
    # The interpreter multiplies matrices of bfloat16, which groups of heads need, as if they were integers.
    dtypes = {True: itertools.cycle(("float32", "float16", "bfloat16")), False: itertools.cycle(("float32", "float16"))}
    for (heads, kv_heads), size, held in shapes:
        kind = "none" if held == 1 else next(masks)
        yield heads, kv_heads, size, held, kind, next(dtypes[heads == kv_heads])


def mask_of(kind, held, span):
    """(1, held), and `span` keys to a split; the last key is always visible."""
    mask = torch.ones(1, held, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "ring":
        mask[:, held // 3 : held // 3 + min(63, held // 3)] = False
    elif kind == "random":
        mask = torch.rand(1, held, generator=torch.Generator().manual_seed(held)) < 0.5
    elif kind == "split hidden":
        mask[:, span : 2 * span] = False
        mask[:, :3] = False
    else:
        mask[:, :-1] = False
    mask[:, -1] = True
    return mask


def inputs(heads, kv_heads, size, held, dtype, batch=1):
    generator = torch.Generator().manual_seed(size + held)
    shapes = (batch, heads, 1, size), (batch, kv_heads, held, size), (batch, kv_heads, held, size)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def error(found, query, key, value, scaling, mask):
    """Against float64, as a share of the largest output."""
    assert found.dtype == query.dtype and found.shape == query.shape
    expected = eager_attention(query.double(), key.double(), value.double(), scaling, mask)
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def kernel():
    from streamllm.engine.triton_attention import flash_decoding, split_count

    found = {}
    for heads, kv_heads, size, held, kind, dtype in kernel_cases():
        config = Configuration(64 if held > 64 else 32, 4, 1, max(2, 2 * kv_heads))  # two multiprocessors: four splits
        splits, span = split_count(kv_heads, held, 2 * config.programs, config.block)
        assert splits == (1 if held <= 32 else 2 if held == 64 else 4 if held == 2048 else 3)
        query, key, value = inputs(heads, kv_heads, size, held, getattr(torch, dtype))
        mask, scaling = mask_of(kind, held, span), size**-0.5
        output = flash_decoding(query, key, value, mask, scaling, config)
        name = f"{heads}/{kv_heads} x {size}, {held} keys, {kind}, {dtype}"
        found[name] = error(output, query, key, value, scaling, mask)
    return found


def layouts():
    """A batch; keys that are views, in other strides than the values; scores that would overflow without their max."""
    from streamllm.engine.triton_attention import decode_attention

    found = {}
    for heads, kv_heads in ((4, 4), (8, 2)):
        query, key, value = inputs(heads, kv_heads, 16, 70, torch.float32, batch=2)
        mask = mask_of("random", 70, 0)
        found[f"batch {heads}/{kv_heads}"] = error(
            decode_attention(query, key, value, mask, 0.3), query, key, value, 0.3, mask
        )
        key = key.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 5:]
        value = torch.cat((value, value), -1)[:, :, 5:, :16]
        found[f"views {heads}/{kv_heads}"] = error(
            decode_attention(query, key, value, None, 0.3), query, key, value, 0.3, None
        )
        by_column = value.transpose(-1, -2).contiguous().transpose(-1, -2)
        found[f"columns {heads}/{kv_heads}"] = error(
            decode_attention(query, key, by_column, None, 0.3), query, key, value, 0.3, None
        )
        query = 100 * query
        found[f"large {heads}/{kv_heads}"] = error(
            decode_attention(query, key, value, None, 0.3), query, key, value, 0.3, None
        )
    return found


def operator():
    """As an operator: compiled without a break, seen by the recorder, probed; several tokens at once are torch's."""
    from streamllm.engine.triton_attention import decode_attention

    backend, found = BACKENDS["triton"], {}
    query, key, value = inputs(8, 2, 16, 40, torch.float32)
    mask = mask_of("random", 40, 0)

    def step(query, key, value, mask):
        return 2 * attention(backend, query, key, value, 0.3, mask)

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    for visible in (mask, None):
        output = compiled(query, key, value, visible) / 2
        found[f"compiled, {'un' if visible is None else ''}masked"] = error(output, query, key, value, 0.3, visible)
    torch.library.opcheck(decode_attention, (query, key, value, mask, 0.3))
    with recorded_kernel(backend) as one:
        attention(backend, query, key, value, 0.3, mask)
    with recorded_kernel(backend) as several:
        attention(backend, query.expand(-1, -1, 3, -1), key, value, 0.3, causal=True)
    probe = probe_backend(backend, torch.device("cpu"), torch.float32, 80, heads=8, kv_heads=2)
    refused = [
        probe_backend(backend, torch.device("cpu"), *what) for what in ((torch.float64, 16), (torch.float32, 24))
    ]
    return found | {
        "recorded": [one.used, several.used],
        "probed": [probe.kernel, probe.available, *(probe.error for probe in refused)],
    }


@torch.no_grad()
def golden():
    """The largest difference from the losses of the original implementation, in a ring that has wrapped around."""
    tokens, found = torch.tensor(json.loads((GOLDEN / "tokens.json").read_text())), {}
    for family in FAMILIES:
        loaded = load_model(str(GOLDEN / family), "float32")
        for entry in json.loads((GOLDEN / family / "mit_losses.json").read_text()):
            policy = EvictionPolicy(**entry["policy"])
            if policy.n_sink != 4 or policy.compress_every not in (1, 8):
                continue
            decoder = make_decoder(loaded, Configuration("ring", policy))
            decoder.feed(tokens[:FED])
            for i in range(FED, WRAPPED):
                decoder.feed(tokens[i : i + 1])
            decoder.cache.backend = BACKENDS["triton"]
            losses = []
            with recorded_kernel(BACKENDS["triton"]) as recorder:
                for i in range(WRAPPED, WRAPPED + STEPS):
                    losses += negative_log_likelihood(decoder.feed(tokens[i : i + 1]), tokens[i + 1 : i + 2]).tolist()
            difference = np.abs(np.array(losses) - entry["losses"][WRAPPED : WRAPPED + STEPS]).max()
            found[f"{family} R={policy.compress_every}"] = [recorder.used, float(difference)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"kernel": kernel, "layouts": layouts, "operator": operator, "golden": golden}[sys.argv[1]]()))
