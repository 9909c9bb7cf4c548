"""How a decode step is run: eagerly, compiled, or replayed as a CUDA graph. The last two want static shapes: `ring`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from types import FunctionType
from typing import Any, Protocol, cast
from weakref import finalize

import torch
from torch import Tensor, nn

from .attention import AttentionState
from .device import float64_device
from .errors import UsageError
from .loaded import LoadedModel

Step = Callable[[LoadedModel, Any, Tensor], Tensor]
"""(model, cache, token (1)) -> logits (1, vocabulary)"""


class StaticCache(AttentionState, Protocol):
    """A cache whose steps have one shape."""

    @property
    def shape(self) -> Hashable:
        """Caches of the same shape are served by the same compiled code."""
        ...


def static_step(execution: str, step: Step, loaded: LoadedModel, cache: StaticCache) -> Callable[[Tensor], Tensor]:
    """`step` on this model and cache, for one token at a time. On a CUDA device it is replayed as a graph, compiled or
    not. Raises UsageError for an execution that the device does not have."""
    if execution == "cudagraph" and loaded.device.type != "cuda":
        raise UsageError(
            f"execution 'cudagraph': needs a CUDA device, the model is on {loaded.device.type}; use compile or eager"
        )
    if execution == "compile" and float64_device(loaded.device) != loaded.device:
        raise UsageError(
            f"execution 'compile': {loaded.device.type} has no float64, which a step computes its angles in; use eager"
        )
    if execution == "compile":
        use_matrix_vector_products(loaded.model)
        step = _compiled(step, loaded.device.type, id(loaded.model), cache.shape)
    if loaded.device.type == "cuda":
        return _GraphedStep(step, loaded, cache)
    return _CompiledStep(step, loaded, cache)


_SHAPES = 8
"""Of which compiled code is kept for the next decoder, the least recently asked for is let go."""


@lru_cache(_SHAPES)
def _compiled(step: Step, device: str, model: int, shape: Hashable) -> Step:
    """Compiled code for caches of one shape, its graphs included, which the next decoder of that shape finds again.

    Dynamo files graphs under the code that they were compiled from and refuses to compile any code a ninth time
    (`recompile_limit`): so each shape has a copy of the code to itself. Its books keep that code, and the graphs with
    it, for good: they are told when the copy goes."""
    from torch._dynamo import reset_code  # type: ignore[attr-defined]

    original = cast(FunctionType, step)
    copy = FunctionType(original.__code__.replace(), original.__globals__, original.__name__, original.__defaults__)
    finalize(copy, reset_code, copy.__code__).atexit = False
    compiled: Step = torch.compile(copy, fullgraph=True, dynamic=False, options=_OPTIONS.get(device))
    return compiled


_OPTIONS: dict[str, dict[str, Any]] = {
    # Left to itself, inductor recomputes norms and activations inside every row of the products that read them.
    "cpu": {"realize_opcount_threshold": 0, "realize_reads_threshold": 0, "realize_acc_reads_threshold": 0},
    # Tries blocks out: on an H100 two of four products of int8 take 14 and 36% less time, the head's in bfloat16 26%.
    "cuda": {"coordinate_descent_tuning": True},
}
"""Inductor's, by device."""


class _CompiledStep:
    """Checks once that a graph is this decoder's; nothing it was compiled for changes afterwards. On a CPU, checking
    every module of the model for every token takes longer than a small model does."""

    def __init__(self, step: Step, loaded: LoadedModel, cache: AttentionState) -> None:
        self.run = lambda token: step(loaded, cache, token)
        self.checked = False

    def __call__(self, token: Tensor) -> Tensor:
        # From then on only what tells the graphs in memory apart is looked at.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=self.checked):
            logits = self.run(token)
        self.checked = True
        return logits


class _GraphedStep:
    """Captures the step by hand. A step is idempotent until its position moves on, so that warming up does no harm."""

    def __init__(self, step: Step, loaded: LoadedModel, cache: AttentionState) -> None:
        token = self.token = torch.zeros(1, dtype=torch.long, device=loaded.device)
        # Not by way of `self`: in a cycle, cache and graph would outlive the decoder until garbage is collected.
        self.run = lambda: step(loaded, cache, token)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        return self.logits.clone()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run()


class MatrixVectorLinear(nn.Linear):
    """A linear layer that, compiled for one token, is a multiply and a sum: inductor streams the weights through that
    at memory bandwidth, where a matrix product with one row is far from it."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or input.numel() != self.in_features:
            return super().forward(input)
        output = (self.weight * input.reshape(-1)).sum(-1)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*input.shape[:-1], self.out_features)


def use_matrix_vector_products(model: nn.Module) -> None:
    """For compiled decode steps of batch 1; everything else is computed as before."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = MatrixVectorLinear
