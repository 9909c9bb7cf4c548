"""How a decode step is run: eagerly, compiled, or replayed as a CUDA graph. The last two want static shapes: `ring`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..options import EXECUTIONS
from .attention import AttentionState
from .backends import Backend
from .cpu_kernels import has_kernels, matrix_vector
from .device import float64_device
from .layers import HANDS_ON
from .model import LoadedModel
from .quantization import Int4Linear, Int8Linear

Step = Callable[[LoadedModel, Any, Tensor], Tensor]
"""(model, cache, token (1)) -> logits (1, vocabulary)"""
StaticStep = Callable[[Tensor], Tensor]
"""A step on one model and cache, as it is run: token (1) -> logits (1, vocabulary)"""


class StaticCache(AttentionState, Protocol):
    """A cache whose steps have one shape."""

    backend: Backend

    @property
    def shape(self) -> Hashable:
        """Caches of the same shape are served by the same compiled code."""
        ...


StepMaker = Callable[[Step, LoadedModel, StaticCache], StaticStep]
"""The type of function that an entry of `options.EXECUTIONS` names. Raises UsageError if the device has no such
execution."""


def static_step(execution: str, step: Step, loaded: LoadedModel, cache: StaticCache) -> StaticStep | None:
    """`step` on this model and cache, for one token at a time; None for `eager`, which wants no static shapes. Raises
    UsageError for an execution that the device does not have."""
    entry = EXECUTIONS[execution]
    if entry is None:
        return None
    make: StepMaker = entry.get()
    return make(step, loaded, cache)


def graphed_step(step: Step, loaded: LoadedModel, cache: StaticCache) -> StaticStep:
    """Replayed as a CUDA graph."""
    if loaded.device.type != "cuda":
        raise UsageError(
            f"execution 'cudagraph': needs a CUDA device, the model is on {loaded.device.type}; use compile or eager"
        )
    return _GraphedStep(step, loaded, cache)


def compiled_step(step: Step, loaded: LoadedModel, cache: StaticCache) -> StaticStep:
    """Compiled, and on a CUDA device replayed as a graph. The model stays as it is: compiled is a copy of its own."""
    if float64_device(loaded.device) != loaded.device:
        raise UsageError(
            f"execution 'compile': {loaded.device.type} has no float64, which a step computes its angles in; use eager"
        )
    own = replace(loaded, model=_for_one_token(loaded.model, _has_regions(loaded, cache)))
    step = _compiled(step, own.device.type, id(own.model), cache.shape)
    return (_GraphedStep if own.device.type == "cuda" else _CompiledStep)(step, own, cache)


_SHAPES = 8
"""Shapes for which compiled code is kept for the next decoder; the least recently asked for is let go."""


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
    "cpu": {
        # Left to itself, inductor recomputes norms and activations inside every row of the products that read them.
        "realize_opcount_threshold": 0,
        "realize_reads_threshold": 0,
        "realize_acc_reads_threshold": 0,
        # Dynamo has seen every shape; to see each again in each layer takes a sixth of the embedded model's step.
        "size_asserts": False,
    },
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
    """A linear layer that, compiled for one token, reads its weights at the pace of memory, far from which a matrix
    product with one row is: by our own kernel, or by a multiply and a sum, which inductor streams them through."""

    has_kernel = False

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or input.numel() != self.in_features:
            return super().forward(input)
        if self.has_kernel:
            output = matrix_vector(self.weight, input.reshape(-1))
        else:
            output = (self.weight * input.reshape(-1)).sum(-1)
        if self.bias is not None:
            output = output + self.bias
        return output.to(input.dtype).view(*input.shape[:-1], self.out_features)


_READ_BY_OURS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_WORTH_A_CALL = 2**17
"""Bytes of a matrix from which on our own kernel pays, whose call takes 5 us; twice and half as many give the same."""


def _is_worth_a_call(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in _READ_BY_OURS and weight.nbytes >= _WORTH_A_CALL


_COPIES: WeakKeyDictionary[nn.Module, dict[bool, Any]] = WeakKeyDictionary()
"""One for each model, with regions or without: whatever is compiled of it shares this, and the graphs with it."""


def _for_one_token(model: Any, regions: bool) -> Any:
    """The model with its linear layers as `MatrixVectorLinear`: a copy of its modules as they are when it is first
    asked for, all tensors shared. regions: layers that are alike are compiled once."""
    copies = _COPIES.setdefault(model, {})
    if regions not in copies:
        copies[regions] = _with_matrix_vector_products(model, {})
        for module in copies[regions].modules():
            if isinstance(module, (MatrixVectorLinear, Int8Linear)) and _is_worth_a_call(module.weight):
                module.has_kernel = has_kernels()
        for layer in _repeated(copies[regions]) if regions else ():
            layer.forward = MethodType(torch.compiler.nested_compile_region(type(layer).forward), layer)
    return copies[regions]


def _has_regions(loaded: LoadedModel, cache: StaticCache) -> bool:
    """Whether torch can compile a layer as a region of its own. Nobody has tried it on a GPU, or with torch below 2.13;
    there a region has no operator of our own that changes what it is given, int4's product loses the size of its groups
    in it, and what a layer is not called with does not come into it."""
    is_able = loaded.device.type == "cpu" and torch.__version__ >= "2.13" and cache.backend.library != "triton"
    is_able = is_able and not hasattr(loaded.model, HANDS_ON)
    return is_able and not any(isinstance(module, Int4Linear) for module in loaded.model.modules())


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of every list of them, of those in other lists only these."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _repeated(child)


def _with_matrix_vector_products(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """`copies` has those made so far: a module may stand in several places."""
    if module not in copies:
        kind = MatrixVectorLinear if type(module) is nn.Linear else type(module)
        copy = copies[module] = kind.__new__(kind)
        copy.__dict__.update(vars(module))
        copy._modules = {
            name: None if child is None else _with_matrix_vector_products(child, copies)
            for name, child in module._modules.items()
        }
    return copies[module]
