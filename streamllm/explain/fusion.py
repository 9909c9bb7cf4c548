"""Which operators an execution fuses: those of an eager step by what they do, and what compiled code makes of them.

Names are those of torch's profiler: ATen's operators where a step is eager, and what inductor called its kernels, after
the operators in them, where it is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from ..configuration import Configuration
from ..engine.model import LoadedModel
from ..measuring.timing import used_backend
from .profiling import Kernel, Profile, profile_decoding

PRODUCTS, ATTENTION, NORMS, ADDITIONS, ACTIVATIONS, OTHER = (
    "matrix products",
    "attention kernels",
    "norms",
    "additions",
    "activations",
    "copies, rotation, other",
)
_KINDS = {
    PRODUCTS: r"addmm|mm|bmm|baddbmm|matmul|linear|_weight_int8pack_mm",
    ATTENTION: r".*scaled_dot_product.*|.*(?:flash|efficient)_attention.*|_?softmax",
    NORMS: r"(?:native_|_fused_)?(?:layer|rms)_norm",
    ADDITIONS: r"add_?",  # the residuals', and few others
    ACTIVATIONS: r"gelu|silu|relu|tanh|sigmoid",
}
"""Kind of an eager step's operators -> their names, without `aten::`."""
OURS = "streamllm::"
"""How names of our own operators begin."""
_FUSED = re.compile(r"(?:graph_\d+_)?(?:cpp|triton_[a-z]+)_fused_(.+?)(?:_\d+)?$")


@dataclass(frozen=True, slots=True)
class Kind:
    """Operators of one kind in an eager step."""

    name: str
    calls_per_token: float
    ms_per_token: float
    share: float
    """Of the time in operators."""
    most_speedup: float
    """What would be gained of that time if these cost nothing (Amdahl)."""


@dataclass(frozen=True, slots=True)
class FusedKernel:
    """A kernel of a compiler's that does the work of several operators."""

    name: str
    operators: tuple[str, ...]
    calls_per_token: float
    ms_per_token: float


def kinds_of(profiled: Profile) -> list[Kind]:
    """The operators of an eager step by kind, the most expensive first."""
    found: dict[str, list[Kernel]] = {name: [] for name in (*_KINDS, OTHER)}
    for operator in profiled.operators:
        found[kind_of(operator.name)].append(operator)
    total = sum(operator.ms_per_token for operator in profiled.operators)
    kinds = [
        Kind(name, sum(one.calls_per_token for one in those), time, time / total, total / (total - time))
        for name, those in found.items()
        for time in [sum(one.ms_per_token for one in those)]
    ]
    return sorted(kinds, key=lambda kind: -kind.ms_per_token)


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::")
    return next((kind for kind, names in _KINDS.items() if re.fullmatch(names, name)), OTHER)


def fused_kernels(kernels: Iterable[Kernel]) -> list[FusedKernel]:
    """Those of inductor's, in the order given."""
    return [
        FusedKernel(kernel.name, tuple(operators_in(found[1])), kernel.calls_per_token, kernel.ms_per_token)
        for kernel in kernels
        if (found := _FUSED.match(kernel.name)) is not None
    ]


def operators_in(name: str) -> list[str]:
    """`_to_copy_add_native_layer_norm` -> `_to_copy`, `add`, `native_layer_norm`: the longest names that there are."""
    words, found = name.split("_"), []
    while words:
        count = next((n for n in range(len(words), 1, -1) if "_".join(words[:n]) in _operators()), 1)
        found.append("_".join(words[:count]))
        words = words[count:]
    return found


@cache
def _operators() -> frozenset[str]:
    """Names of all operators, ours too, without their libraries and overloads."""
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name.rpartition("::")[2].partition(".")[0] for name in names)


@dataclass(frozen=True, slots=True)
class Run:
    """A token's decoding by one execution and attention kernel."""

    execution: str
    backend: str
    """The attention kernel that really ran."""
    tpot_ms: float
    """Without the profiler."""
    launches_per_token: float
    """As `Profile.launches`."""
    computing_per_token: float
    """Calls of ATen's operators, of inductor's kernels and of ours, each in whatever calls it."""


@dataclass(frozen=True, slots=True)
class Fusion:
    runs: list[Run]
    """Eager with eager attention, and with the kernel asked for; then what compiles."""
    kinds: list[Kind]
    """Of the eager step with the kernel asked for."""
    fused: list[FusedKernel]
    """Of the compiled step."""
    own: list[Kernel]
    """Our own kernels, which it calls."""
    left: list[Kernel]
    """ATen's operators that it still calls one by one."""


def fusion_of(loaded: LoadedModel, what: Configuration, tokens: np.ndarray) -> Fusion:
    """Profiles a method whose steps can be compiled. Raises UsageError as `profile_decoding`."""
    from ..engine.methods import method_named

    executions = [name for name in method_named(what.method).executions if name != "eager"]
    if loaded.device.type != "cuda":
        executions.remove("cudagraph")
    asked = replace(what, execution="eager")
    steps = [replace(asked, backend="eager"), asked, *(replace(what, execution=name) for name in executions)]
    found = [(step, profile_decoding(loaded, step, tokens)) for step in dict.fromkeys(steps)]
    eager = next(profiled for step, profiled in found if step == asked)
    compiled = next(profiled for step, profiled in found if step.execution == "compile")
    return Fusion(
        runs=[_run(step, profiled, _used(loaded, step, tokens)) for step, profiled in found],
        kinds=kinds_of(eager),
        fused=fused_kernels(compiled.kernels),
        own=[kernel for kernel in compiled.kernels if kernel.name.startswith(OURS)],
        left=[one for one in compiled.kernels if one.name.startswith("aten::") and one.name != "aten::empty"],
    )


def _used(loaded: LoadedModel, step: Configuration, tokens: np.ndarray) -> str:
    with step.kernel.active():
        return used_backend(loaded, step, tokens)


def _run(step: Configuration, profiled: Profile, backend: str) -> Run:
    called = sum(one.calls_per_token for one in profiled.operators)
    called += sum(one.calls_per_token for one in fused_kernels(profiled.kernels))
    called += sum(one.calls_per_token for one in profiled.kernels if one.name.startswith(OURS))
    return Run(step.execution, backend, profiled.tpot_ms, profiled.launches, called)
