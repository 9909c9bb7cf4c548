"""Where a token's time goes: torch's profiler over decoding with a full cache, told apart by part of the model.

The parts are ranges in the profiler's own record. They are put around the calls of modules and caches while a profile
is taken, and taken off again: nothing of it is in the engine. A compiled or captured step is one piece, since ranges
inside it would change what is compiled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import profile, record_function

from ..configuration import Configuration
from ..engine import attention
from ..engine.decoding import Decoder
from ..engine.model import LoadedModel
from ..errors import UsageError
from ..measuring.timing import TimedDecoder, kernel_profiler, no_garbage_collection, sees_kernels

ATTENTION, MLP, CACHE, ENDS, OTHER = "attention", "MLP", "cache update", "head and embedding", "norms and other"
STEP = "compiled step"
MOST_TOKENS = 512
"""A profile covers whole prune cycles; a longer one would make a record of gigabytes."""

_RANGE = "streamllm: "
_SDPA = "aten::scaled_dot_product_attention"
_TOKENS = 32
_STRETCHES = 5


@dataclass(frozen=True, slots=True)
class Kernel:
    """A GPU kernel, or a CPU operator excluding its callees."""

    name: str
    calls_per_token: float
    ms_per_token: float


@dataclass(frozen=True, slots=True)
class Profile:
    """All times in milliseconds per token."""

    tokens: int
    cycle: int
    """Tokens from prune to prune."""
    parts_ms: dict[str, float]
    """Busy: of a GPU in kernels, of a CPU in operators."""
    launches: float
    """Per token: kernels of a GPU; of a CPU operators called from Python."""
    kernels: list[Kernel]
    """The most expensive first."""
    operators: list[Kernel]
    """ATen's operators, by their kernels' time on a GPU, on a CPU as in `kernels`."""
    profiled_ms: float
    tpot_ms: float
    """Without the profiler, before and after: the median of some stretches."""

    @property
    def idle_ms(self) -> float:
        """The rest: the device waits for Python and for launches."""
        return max(self.profiled_ms - sum(self.parts_ms.values()), 0.0)

    @property
    def update_ms(self) -> float:
        return self.parts_ms.get(CACHE, 0.0)

    @property
    def forward_ms(self) -> float:
        return sum(self.parts_ms.values()) - self.update_ms


@torch.inference_mode()
def profile_decoding(
    loaded: LoadedModel, what: Configuration, tokens: np.ndarray, trace: Path | None = None
) -> Profile:
    """Profiles whole prune cycles of a full cache; `trace` gets a Chrome trace (.json or .json.gz), for
    https://ui.perfetto.dev. Raises UsageError for a cycle that is too long to profile, and on a device whose kernels
    torch's profiler does not see."""
    with ExitStack() as stack:
        stack.enter_context(what.kernel.active())
        # Names the kernels that inductor makes for a CPU; of no other effect.
        stack.enter_context(torch._inductor.config.patch({"cpp.enable_kernel_profile": True}))
        policy = what.effective
        run = TimedDecoder(loaded, what, tokens)
        if run.period > MOST_TOKENS:
            raise UsageError(
                f"compress_every {policy.compress_every}: {run.period} tokens from prune to prune, at most "
                f"{MOST_TOKENS} can be profiled; lower --compress-every"
            )
        count = run.whole_cycles(_TOKENS)
        stack.enter_context(no_garbage_collection())
        run.prefill()
        run.warm_up()
        paces = [run.decode(count) for _ in range(_STRETCHES)]
        with _ranges(loaded, run.decoder, what.execution), _profiler(loaded.device):
            run.decode(2)  # starting the profiler for the first time takes a while
        with _ranges(loaded, run.decoder, what.execution), _profiler(loaded.device) as profiler:
            profiled = run.decode(count)
        paces += [run.decode(count) for _ in range(_STRETCHES)]
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    rest = OTHER if what.execution == "eager" else STEP
    events = profiler.events()
    busy, kernels, launches = summed(events, rest)
    return Profile(
        tokens=count,
        cycle=run.period,
        parts_ms={part: time / 1e3 / count for part, time in busy.items()},
        launches=launches / count,
        kernels=_per_token(kernels, count),
        operators=_per_token(by_operator(events), count),
        profiled_ms=1e3 * profiled,
        tpot_ms=1e3 * float(np.median(paces)),
    )


def _per_token(kernels: Kernels, count: int) -> list[Kernel]:
    return [Kernel(name, calls / count, time / 1e3 / count) for name, (calls, time) in kernels.items()]


def _profiler(device: torch.device) -> profile:
    if device.type != "cpu" and not sees_kernels(device):
        raise UsageError(f"profile: torch's profiler does not see the kernels of {device.type}; use CUDA or a CPU")
    return kernel_profiler(device)


@contextmanager
def _ranges(loaded: LoadedModel, decoder: Decoder, execution: str) -> Iterator[None]:
    cache = getattr(decoder, "cache", None)  # `recompute` has none
    with ExitStack() as stack:
        for name in ("begin", "evict", *(("position_ids", "attend") if execution == "eager" else ())):
            if cache is not None:
                stack.enter_context(_range(cache, name, CACHE))
        if execution == "eager":
            for module, part in parts_of(loaded.model):
                stack.enter_context(_range(module, "forward", part))
            # Whatever else `attend` does is the cache's. Torch's own kernels are told by the name of the operator.
            for name in ("eager_attention", "_flash_attention_2", "_triton_attention"):
                stack.enter_context(_range(attention, name, ATTENTION))
        yield


@contextmanager
def _range(owner: Any, name: str, part: str) -> Iterator[None]:
    """Calls of `owner.name` are ranges inside the block."""
    original, was_own = getattr(owner, name), name in vars(owner)

    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(_RANGE + part):
            return original(*arguments, **options)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def parts_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of any `transformers` causal language model that make up its parts, by structure: attention is the
    innermost module that knows its layer, MLPs are its siblings with matrices."""
    found: list[tuple[nn.Module, str]] = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        if module is not None:
            found.append((module, ENDS))
    for layer in model.modules():
        inner = [child for child in layer.children() if _knows_its_layer(child)]
        if len(inner) == 1 and not any(_knows_its_layer(below) for below in [*inner[0].modules()][1:]):
            found.append((inner[0], ATTENTION))
            siblings = (child for child in layer.children() if child is not inner[0])
            found += [(child, MLP) for child in siblings if any(p.ndim > 1 for p in child.parameters())]
    return found


def _knows_its_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int)


Kernels = dict[str, tuple[int, float]]
"""Name -> calls, microseconds; the most expensive first."""


def summed(events: Iterable[Any], rest: str = OTHER) -> tuple[dict[str, float], Kernels, int]:
    """A profiler's events (`torch.autograd.profiler_util.FunctionEvent`) -> busy microseconds by part, kernels or
    operators by name, and how many there were: of a GPU's kernels if there are any, else of a CPU's operators.

    `rest` takes what is in no range."""
    events = [event for event in events if not (event.device_type != DeviceType.CPU and _is_range(event))]
    on_device = [event for event in events if event.device_type != DeviceType.CPU]
    operators = [event for event in events if event.device_type == DeviceType.CPU and not _is_range(event)]
    busy: dict[str, float] = defaultdict(float)
    if on_device:
        for event in operators:
            busy[_part(event, rest)] += sum(kernel.duration for kernel in event.kernels)
        # A replayed graph's kernels are no operator's.
        busy[rest] += max(sum(map(_duration, on_device)) - sum(busy.values()), 0.0)
        timed, launches = [(event.name, _duration(event)) for event in on_device], len(on_device)
    else:
        outermost = [event for event in operators if all(map(_is_range, _ancestors(event)))]
        for event in outermost:
            busy[_part(event, rest)] += _duration(event)
        timed, launches = [(event.name, event.self_cpu_time_total) for event in operators], len(outermost)
    return dict(busy), _by_name(timed), launches


def by_operator(events: Iterable[Any]) -> Kernels:
    """Of the same events, ATen's operators: of a GPU those that launch a kernel, by their kernels' time; else all, by
    their own."""
    events = [event for event in events if event.device_type == DeviceType.CPU and event.name.startswith("aten::")]
    if any(event.kernels for event in events):
        timed = [(event.name, sum(one.duration for one in event.kernels)) for event in events if event.kernels]
    else:
        timed = [(event.name, event.self_cpu_time_total) for event in events]
    return _by_name(timed)


def _by_name(timed: Iterable[tuple[str, float]]) -> Kernels:
    times: dict[str, list[float]] = defaultdict(list)
    for name, time in timed:
        times[name].append(time)
    kernels = {name: (len(those), sum(those)) for name, those in times.items()}
    return dict(sorted(kernels.items(), key=lambda item: -item[1][1]))


def _part(event: Any, rest: str) -> str:
    line = [event, *_ancestors(event)]
    part: str = next((above.name.removeprefix(_RANGE) for above in line if above.name.startswith(_RANGE)), rest)
    return ATTENTION if part == CACHE and any(above.name == _SDPA for above in line) else part


def _ancestors(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def _is_range(event: Any) -> bool:
    """Ours, or one of torch's own that only names what is going on."""
    return event.name.startswith(_RANGE) or event.is_user_annotation


def _duration(event: Any) -> float:
    return float(event.time_range.end - event.time_range.start)
