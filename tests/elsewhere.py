"""Run by itself: the engine on a pretended accelerator, whose tensors do not mix with the CPU's and are never float64.

It is the CPU in fact, so the losses must be those of the CPU, to the bit. Torch learns of it for good, hence a process
of its own. Prints what it found as JSON.
"""

import json
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.device import default_device, float64_device, unverified
from streamllm.engine.methods.recompute import losses_at
from streamllm.engine.model import LoadedModel
from streamllm.errors import UsageError
from streamllm.policy import EvictionPolicy

from .tiny_models import tiny_model

NAME = "elsewhere"
TOKENS = np.arange(30) * 7 % 50
POLICY = EvictionPolicy(n_sink=3, window_size=10, compress_every=4)


class There(torch.Tensor):
    """A tensor of the device; `held` are its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "There":
        with torch.inference_mode(False):  # views of tensors that were made in it ask for more than a wrapper has
            made = torch.Tensor._make_wrapper_subclass(
                cls, held.shape, strides=held.stride(), dtype=held.dtype, device=NAME
            )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} outside of Elsewhere")


class Elsewhere(TorchDispatchMode):
    """Computes what is of the device. Raises RuntimeError where it meets the CPU's, TypeError where it is float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        theirs = [x for x in tensors if isinstance(x, There)]
        target = kwargs.get("device")
        there = bool(theirs) if target is None else torch.device(target).type == NAME
        if theirs and any(x.ndim and not isinstance(x, There) for x in tensors):
            raise RuntimeError(f"{func}: tensors of two devices")
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        return tree_map(lambda x: _moved(x, theirs), result) if there else result


def _held(x: Any) -> Any:
    return x.held if isinstance(x, There) else torch.device("cpu") if isinstance(x, torch.device) else x


def _moved(x: Any, arguments: list[There]) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype == torch.float64:
        raise TypeError(f"{NAME} has no float64")
    changed = next((argument for argument in arguments if argument.held is x), None)
    return There(x) if changed is None else changed


class MadeElsewhere(TorchFunctionMode):
    """`torch.tensor` makes its result out of sight of a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def losses(loaded: LoadedModel) -> dict[str, np.ndarray]:
    found = {}
    for method in ("ours", "mit", "ring", "recompute"):
        decoder = make_decoder(loaded, Configuration(method, POLICY))
        found[method] = decode_loop(decoder, TOKENS, loaded.device).losses
    found["block-parallel"] = block_parallel_losses(loaded, TOKENS, POLICY)
    found["windows"] = losses_at(loaded, TOKENS, 12, [2, 3, 20, 25], BACKENDS["auto"])
    return found


def main() -> None:
    _setup_privateuseone_for_python_backend(NAME)
    expected = losses(tiny_model("Cohere", torch.float32))
    refused = []
    with MadeElsewhere(), Elsewhere():
        loaded = tiny_model("Cohere", torch.float32, device=NAME)
        found = losses(loaded)
        for execution in ("compile", "cudagraph"):
            try:
                make_decoder(loaded, Configuration("ring", POLICY, execution=execution))
            except UsageError as error:
                refused.append(str(error))
        exact = float64_device(loaded.device)
    print(
        json.dumps(
            {
                "device": str(loaded.device),
                "default": str(default_device()),
                "float64": str(exact),
                "warning": unverified(loaded.device),
                "refused": refused,
                "errors": {name: float(np.abs(found[name] - expected[name]).max()) for name in expected},
                "dtypes": sorted({str(values.dtype) for values in found.values()}),
            }
        )
    )


if __name__ == "__main__":
    main()
