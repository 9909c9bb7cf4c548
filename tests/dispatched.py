"""What a decode step asks of the device, operator by operator: seen on a machine that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamllm.configuration import Configuration
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import Decoder, negative_log_likelihood
from streamllm.engine.methods import METHODS
from streamllm.engine.model import LoadedModel
from streamllm.engine.rotary import RotaryEmbedding
from streamllm.policy import EvictionPolicy, RefreshPolicy

STRICT = EvictionPolicy(n_sink=2, window_size=5)
LAZY = EvictionPolicy(n_sink=2, window_size=5, compress_every=4, cache_slack=1, max_drop=3)
POLICIES = {
    "strict": STRICT,
    "lazy": LAZY,
    "tail": RefreshPolicy(n_sink=2, window_size=3, compress_every=4, refresh_budget=2),
    "order": RefreshPolicy(n_sink=2, window_size=3, compress_every=4, refresh_budget=2, refresh_position="order"),
}
RUNS = [
    (method, policy)
    for method in METHODS
    if not method.startswith("kvpress")  # another library's kernels, in an environment of its own
    for policy in (("tail", "order") if method == "refresh" else ("strict", "lazy"))
]
"""Every method, with prunes after every token and now and then."""


class MixedError(AssertionError):
    """Tensors of two devices in one operator: an error on a GPU, or a copy that waits."""


class WaitError(AssertionError):
    """A value was asked for, or brought, that stops the host until the device is done."""


Look = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""Called with an operator that is about to run, and its arguments."""


class _Looking(TorchDispatchMode):
    def __init__(self, look: Look) -> None:
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _MadeOnTheHost(TorchFunctionMode):
    """`torch.tensor` copies to another device out of sight of a dispatch mode, and so does a list as an index."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        indexes = func in (Tensor.__getitem__, Tensor.__setitem__)
        made = args[0] if indexes else result
        lists = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) or (
            indexes and any(isinstance(x, list) for x in (args[1] if isinstance(args[1], tuple) else args[1:2]))
        )
        if lists and made.device.type != "cpu":
            raise WaitError(f"{func.__name__} makes of Python's numbers what the device then waits for")
        return result


@contextmanager
def looking(look: Look) -> Iterator[None]:
    """Shows `look` every operator dispatched inside the block; raises WaitError where Python's numbers are copied to a
    device that is not the CPU."""
    # In inference mode a dispatch mode is shown composite operators only, not what they are made of.
    with torch.inference_mode(False), torch.no_grad(), _MadeOnTheHost(), _Looking(look):
        yield


def one_device(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises MixedError where tensors of two devices meet, or one is moved to another while the host waits."""
    devices = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    target = kwargs.get("device")
    if func._schema.name in ("aten::_to_copy", "aten::copy_"):
        if kwargs.get("non_blocking") or args[2:] == (True,):
            return
        devices |= set() if target is None else {torch.device(target)}
    if len(devices) > 1:
        raise MixedError(f"{func} between {' and '.join(sorted(map(str, devices)))}")


_WAITS = {
    "aten::_local_scalar_dense",  # item(), int(), bool(), if, a tensor as an index
    "aten::lift_fresh",  # torch.tensor: its numbers are made on the host, and copied
    "aten::equal",
    "aten::is_nonzero",
    # The host has to know how much there is of what they find:
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
}
_INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


def no_waiting(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises WaitError where the host would wait for an accelerator to finish all that it has to do."""
    name = func._schema.name
    asks = name in _WAITS or (func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None)
    asks |= name == "aten::_grouped_mm" and args[0].dtype == torch.float32  # seen on an H100, and not to be captured
    if name in _INDEXES:
        asks = any(index is not None and index.dtype == torch.bool for index in args[1])
    if asks:
        raise WaitError(f"{func} waits for the device")


def on_meta(loaded: LoadedModel) -> LoadedModel:
    """The model on a device that knows shapes, types and devices, but no values: whoever asks for one is refused."""
    meta = torch.device("meta")
    loaded.model.to(meta)
    for rotary in {layer.rotary for layer in loaded.layers}:
        for name, value in vars(rotary).items():
            if isinstance(value, Tensor):
                setattr(rotary, name, value.to(meta))
        rotary._device = meta
    for module in loaded.model.modules():
        owner = getattr(module.forward, "__self__", None)
        if isinstance(owner, RotaryEmbedding):
            owner._frequencies = {kind: found.to(meta) for kind, found in owner._frequencies.items()}
    return LoadedModel(**vars(loaded) | {"device": meta})


def decoder_of(method: str, loaded: LoadedModel, policy: EvictionPolicy) -> Decoder:
    return make_decoder(loaded, Configuration(method, policy))


def decode(decoder: Decoder, stream: Tensor) -> list[Tensor]:
    """The losses of the tokens but the first, as `decode_loop` computes them."""
    pairs = zip(stream[:-1].split(1), stream[1:].split(1), strict=True)
    return [negative_log_likelihood(decoder.feed(token), target) for token, target in pairs]
