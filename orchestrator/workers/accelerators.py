"""Which accelerator Ray has given to a worker, and whether torch can use that one and no other."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from dataclasses import dataclass

from streamllm.errors import UsageError

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR")
"""Variables by which Ray assigns an accelerator: NVIDIA's, AMD's, Intel's, and Intel's in earlier versions of Ray."""

ONE_EACH = {f"RAY_EXPERIMENTAL_NOSET_{name}": "" for name in VISIBLE}
"""Settings of a worker: whoever started Ray may have told it to leave those alone, and all would use the first."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """The accelerator that a worker owns."""

    visible: str
    """Its number or name as Ray gave it; empty where Ray gives none, as Apple's."""
    name: str
    """The same for whoever sees it, under whatever number."""
    near: Collection[int]
    """Cores of its own NUMA node, if that is known."""


def visible_devices() -> str:
    """The accelerators of its kind that this process may see, as Ray has set them; empty if Ray has set nothing."""
    return next((ids for name in VISIBLE if (ids := os.environ.get(name))), "")


def own_accelerator(is_given: bool) -> Accelerator | None:
    """The accelerator of this process; None if it is not given one, and there is none to be seen either.

    Raises UsageError where what Ray gave is not what torch can use: computing on the CPU instead, or beside others on
    the first accelerator, would be a sweep of something else."""
    import torch

    from streamllm.engine.device import accelerator_uuid, default_device, near_cores, why_no_accelerator

    count, host = torch.accelerator.device_count(), socket.gethostname()
    if not is_given:
        if count:
            raise UsageError(
                f"torch sees {count} x {default_device().type} on {host}, Ray sees none: all would share the first; "
                f"start Ray with --num-gpus {count}, or hide them from both with CUDA_VISIBLE_DEVICES= (or its like)"
            )
        return None
    visible = visible_devices()
    given = f"Ray gave a worker accelerator {visible or '(unnamed)'} of {host}"
    if not count:
        raise UsageError(
            f"{given}, but torch {torch.__version__} there can use none: {why_no_accelerator()}; install a torch and a "
            f"driver that fit, or hide it from Ray with CUDA_VISIBLE_DEVICES= (or its like) to sweep on cores"
        )
    if count > 1:
        raise UsageError(
            f"{given}, but torch sees {count}: all workers would share the first; start Ray without "
            f"RAY_EXPERIMENTAL_NOSET_{VISIBLE[0]} or its like, so that each sees its own alone"
        )
    device = default_device()
    return Accelerator(visible, accelerator_uuid(device) or visible or device.type, near_cores(device))
