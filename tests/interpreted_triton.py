"""What tests/test_triton.py asks of Triton's interpreter, as a program: it has to be chosen before Triton is imported.

TRITON_INTERPRET=1 python -m tests.interpreted_triton GROUP [BACKEND] -> {case: outcome} as JSON on the last line.
"""

import itertools
import json
import sys

import numpy as np
import torch

from streamllm.configuration import Configuration
from streamllm.engine.attention import attention, eager_attention, recorded_kernel
from streamllm.engine.backends import BACKENDS
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import negative_log_likelihood
from streamllm.engine.loading import load_model
from streamllm.engine.probing import probe_backend
from streamllm.engine.slots import RingSlots
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
    from streamllm.engine.triton_attention import Cut, flash_decoding, split_count

    found = {}
    for heads, kv_heads, size, held, kind, dtype in kernel_cases():
        config = Cut(64 if held > 64 else 32, 4, 1, max(2, 2 * kv_heads))  # two multiprocessors: four splits
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


RINGS = (  # heads, KV heads, size, sinks, window, of each head's components turned, neighbours with one another, dtype
    (4, 4, 16, 4, 60, 16, False, "float32"),
    (4, 4, 80, 4, 60, 20, False, "float32"),
    (8, 2, 64, 4, 124, 64, False, "float32"),
    (8, 2, 64, 4, 124, 64, True, "float16"),
    (4, 4, 32, 0, 40, 0, False, "float32"),
    (4, 4, 16, 3, 300, 0, False, "float32"),
    (4, 4, 16, 40, 300, 8, True, "float32"),
)


def ring():
    """A step of the ring: just full, gone around, lazily pruned with little left, hardly begun."""
    found = {}
    for heads, kv_heads, size, n_sink, window, turned, interleaved, dtype in RINGS:
        full = n_sink + window
        for position, evicted in (
            (full - 1, 0),
            (full + 17, 18),
            (full + 2 * window + 5, 3 * window - 7),
            (n_sink + 2, 0),
        ):
            of = f"{heads}/{kv_heads} x {size}, {n_sink} + {window}, {turned} turned"
            name = f"{of}, at {position} less {evicted}, {dtype}"
            shape = heads, kv_heads, size, n_sink, window, getattr(torch, dtype)
            found[name] = ring_error(shape, turned, interleaved, position, evicted)
    return found


def ring_error(shape, turned, interleaved, position, evicted):
    from streamllm.engine.triton_attention import Cut
    from streamllm.engine.triton_ring import attend_in_ring

    heads, kv_heads, size, n_sink, window, dtype = shape
    generator = torch.Generator().manual_seed(position)
    wanted = (heads, 1), (kv_heads, 1), (kv_heads, 1), (kv_heads, n_sink + window), (kv_heads, n_sink + window)
    query, key, value, keys, values = (torch.randn(1, *s, size, generator=generator).to(dtype) for s in wanted)
    expected_keys, expected_values = keys.clone(), values.clone()
    slots = RingSlots(n_sink, n_sink + window)
    slot = slots.of(position)
    expected_keys[:, :, slot], expected_values[:, :, slot] = key[:, :, 0], value[:, :, 0]
    turning = None, None, None
    if turned:
        sinks = torch.randn(1, kv_heads, n_sink, size, generator=generator).to(dtype)
        angles = torch.rand(1, turned // 2, generator=generator)
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        turning = sinks, angles.cos(), angles.sin()
        expected_keys[:, :, :n_sink] = turned_on(sinks, *turning[1:], interleaved)
    age_of_oldest = slots.newest(torch.tensor(position)) >= n_sink + evicted
    visible = torch.cat((torch.ones(n_sink, dtype=torch.bool), age_of_oldest))[None]
    state = torch.tensor([position]), torch.tensor([evicted]), torch.zeros(kv_heads, dtype=torch.int32)
    output = attend_in_ring(
        query, key, value, keys, values, *turning, *state, 0.3, n_sink, interleaved, Cut(32, 4, 1, 4)
    )
    assert not state[2].any(), "the next step counts from 0"
    assert (values == expected_values).all() and (keys[:, :, n_sink:] == expected_keys[:, :, n_sink:]).all()
    return error(output, query, expected_keys, expected_values, 0.3, visible)


def turned_on(sinks, cos, sin, interleaved):
    """As `Rotary.rotate`."""
    size = cos.shape[-1]
    turning, fixed = sinks[..., :size].float(), sinks[..., size:]
    first, second = turning.chunk(2, -1)
    quarter = torch.cat((-second, first), -1)
    if interleaved:
        quarter = torch.stack((-turning[..., 1::2], turning[..., ::2]), -1).flatten(-2)
    return torch.cat(((turning * cos + quarter * sin).to(sinks.dtype), fixed), -1)


@torch.no_grad()
def ways():
    """The largest difference of logits from those by torch: steps of a ring with kept positions, lazily pruned, without
    sinks, of another number format, eager and compiled."""
    tokens, found = torch.tensor(json.loads((GOLDEN / "tokens.json").read_text())), {}
    loaded = load_model(str(GOLDEN / "llama-tiny"), "float32")
    for more in ({"positions": "keep"}, {"compress_every": 8}, {"n_sink": 0}, {"kv_dtype": "float16"}):
        policy = EvictionPolicy(**{"n_sink": 4, "window_size": 44} | more)
        logits = {}
        for way in (("math", "eager"), ("ring_triton", "eager"), ("ring_triton", "compile")):
            decoder = make_decoder(loaded, Configuration("ring", policy, *way))
            decoder.feed(tokens[:40])
            logits[way] = torch.cat([decoder.feed(token) for token in tokens[40:70].split(1)])
        for way in list(logits)[1:]:
            found[f"{policy} {way[1]}"] = (logits[way] - logits["math", "eager"]).abs().max().item()
    return found


@torch.no_grad()
def golden(backend):
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
            decoder.cache.backend = BACKENDS[backend]
            losses = []
            with recorded_kernel(BACKENDS[backend]) as recorder:
                for i in range(WRAPPED, WRAPPED + STEPS):
                    losses += negative_log_likelihood(decoder.feed(tokens[i : i + 1]), tokens[i + 1 : i + 2]).tolist()
            difference = np.abs(np.array(losses) - entry["losses"][WRAPPED : WRAPPED + STEPS]).max()
            found[f"{family} R={policy.compress_every}"] = [recorder.used, float(difference)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    groups = {one.__name__: one for one in (kernel, layouts, operator, ring, ways, golden)}
    print(json.dumps(groups[sys.argv[1]](*sys.argv[2:])))
