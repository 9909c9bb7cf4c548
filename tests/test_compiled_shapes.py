"""A process compiles as many shapes of the ring as it is asked for, each once, and keeps the graphs of a few.

Dynamo compiles the same code for at most eight shapes (`recompile_limit`), then refuses. What a graph computes is not
the subject: its operators are run as they were traced."""

import gc
import weakref
from functools import lru_cache

import pytest
import torch
from torch._dynamo.utils import counters

from streamllm.configuration import Configuration
from streamllm.engine import execution
from streamllm.engine.decoder import make_decoder
from streamllm.policy import EvictionPolicy

from .tiny_models import tiny_model

WINDOWS = range(4, 16)


@pytest.fixture
def graphs(monkeypatch):
    """Weak references to the graphs compiled since the test began."""
    torch._dynamo.reset()
    execution._compiled.cache_clear()
    compile, made = torch.compile, []

    def as_traced(graph, _):
        made.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(torch, "compile", lambda code, options=None, **more: compile(code, backend=as_traced, **more))
    yield made
    monkeypatch.undo()
    execution._compiled.cache_clear()
    torch._dynamo.reset()


def decode(loaded, window, compress_every=1):
    """Through more than a whole ring, compiled and eager; the largest difference."""
    policy = EvictionPolicy(n_sink=2, window_size=window, compress_every=compress_every)
    compiled, eager = (make_decoder(loaded, Configuration("ring", policy, execution=e)) for e in ("compile", "eager"))
    tokens = (torch.arange(2 * window + 6) * 7 % 61).split(1)
    with torch.inference_mode():
        return max(float((compiled.feed(token) - eager.feed(token)).abs().max()) for token in tokens)


def living(graphs):
    gc.collect()
    return sum(graph() is not None for graph in graphs)


def test_twelve_windows_in_one_process(graphs):
    loaded = tiny_model("Llama", torch.float32, num_hidden_layers=1)
    for count, window in enumerate(WINDOWS, 1):
        assert decode(loaded, window) < 1e-4
        assert len(graphs) == count, "one graph per shape, none recompiled on the way"
        if count % 4 == 0:
            assert living(graphs) == min(count, execution._SHAPES), "the least recently used are let go"
    assert decode(loaded, window) < 1e-4
    assert len(graphs) == count, "another decoder of the shape finds its graph"
    assert not counters["graph_break"]
    assert decode(loaded, WINDOWS[0]) < 1e-4
    assert len(graphs) == len(WINDOWS) + 1, "whose graph was let go is compiled again, not refused"


def test_a_decoder_keeps_its_graph_while_others_come_and_go(graphs, monkeypatch):
    """A sweep's reference is warm all along."""
    monkeypatch.setattr(execution, "_compiled", lru_cache(2)(execution._compiled.__wrapped__))
    loaded = tiny_model("Llama", torch.float32, num_hidden_layers=1)
    policy = EvictionPolicy(n_sink=2, window_size=10)
    decoder = make_decoder(loaded, Configuration("ring", policy, execution="compile"))
    first, second = ((torch.arange(count) * 7 % 61).split(1) for count in (40, 20))
    with torch.inference_mode():
        for token in first:
            decoder.feed(token)
    for window in (4, 5, 6):
        decode(loaded, window)
    assert len(graphs) == 4
    with torch.inference_mode():
        for token in second:
            decoder.feed(token)
    assert len(graphs) == 4
    assert living(graphs) == 3, "its own and those of the last two shapes"
    del decoder
    assert living(graphs) == 2
