"""Everything that determines a number besides what is measured: our code, the libraries, the machine.

They are part of a stored measurement's key, so that what was measured under other conditions is not taken for current.

A quality depends on our code (`store.MEASURING_CODE` and the method's own file), on torch and transformers; on torchao
where that quantized the weights, and on kvpress where that evicts. It is said to depend on the machine only where the
weights are quantized (`Keys` names that).

A time depends on all of these; on flash-attn where that backend is asked for; on Python, which launches a decoder's
kernels; on a CPU, on how OpenMP's threads wait; on an accelerator, on Triton, which compiles for it, and on the runtime
and the driver; on device, threads and vector instructions. What an evaluation of both
depends on is what a time does.

On nothing else: what reads and splits text (datasets, tokenizers) is covered by the digest of the token ids, and what
searches, logs and draws determines no number.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypedDict

from ..engine.backends import BACKENDS
from ..engine.methods import METHODS, method_named
from ..libraries import installed
from .store import code_digest

if TYPE_CHECKING:
    import torch

    from ..engine.model import LoadedModel


class KindOfWorker(TypedDict):
    device: str
    threads: int | None
    """Of a CPU."""
    software: str
    """Versions that every time depends on."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """All that determines a number besides the configuration and the text: a model as a process has loaded it, our
    code, the libraries, the machine. They travel: who knows them can name what that process would measure."""

    model: str
    model_digest: str
    """Names the weights and, after a space, how they are quantized."""
    weights: str | None
    """How they were quantized before, as Q4_1 of a GGUF file."""
    dtype: str
    kv_bytes_per_token: int
    layers: tuple[tuple[int | None, int], ...]
    """Of each: its sliding window, and the bytes of a token's keys and values in `dtype`."""
    trained_length: int | None
    kind: KindOfWorker
    cpu_capability: str | None
    """Vector instructions of torch's kernels; None of an accelerator."""
    software: dict[str, str | None]
    """Versions that every time depends on."""
    libraries: dict[str, str | None]
    """Versions of those that some measurements depend on."""
    code: str
    """Digest of our code with all methods."""

    @classmethod
    def of(cls, loaded: LoadedModel) -> Conditions:
        from ..engine.device import cpu_capability

        device = loaded.device
        return cls(
            model=loaded.name,
            model_digest=loaded.digest,
            weights=loaded.weights,
            dtype=loaded.dtype_name,
            kv_bytes_per_token=loaded.kv_bytes,
            layers=loaded.kv_layers,
            trained_length=loaded.trained_length,
            kind=kind_of_worker(device),
            cpu_capability=cpu_capability() if device.type == "cpu" else None,
            software=software(device),
            libraries={name: installed(name) for name in ("torch", "transformers", "torchao", "kvpress", "flash-attn")},
            code=code_digest(*METHODS),
        )

    @property
    def is_quantized(self) -> bool:
        return " " in self.model_digest

    def of_quality(self, method: str | None) -> dict[str, str | None]:
        """For a key. method: None of a quality that the policy alone decides, whatever implements it."""
        names = ["torch", "transformers"]
        names += ["torchao"] * self.is_quantized
        if method is not None and (library := method_named(method).library) is not None:
            names.append(library)
        methods = () if method is None else (method,)
        return {"code": code_digest(*methods)} | {name: self.libraries[name] for name in names}

    def of_speed(self, method: str, attn_backend: str) -> dict[str, str | None]:
        """For a key."""
        flash = BACKENDS[attn_backend].library == "flash_attn"
        more = {"flash-attn": self.libraries["flash-attn"]} if flash else {}
        return self.of_quality(method) | self.software | more


def kind_of_worker(device: torch.device) -> KindOfWorker:
    """The part of a row that says who timed it: times of workers that differ in any of it do not compare. See
    `reference_time`."""
    import torch

    from ..engine.device import device_name

    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "software": described(software(device)),
    }


def software(device: torch.device) -> dict[str, str | None]:
    """Versions that every time on that device depends on, the reference's too."""
    import torch

    found = {name: installed(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    if device.type == "cpu":
        return found | {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    runtime = {"cuda": torch.version.cuda, "rocm": torch.version.hip} if device.type == "cuda" else {}
    return found | {"triton": installed("triton")} | runtime | {"driver": _driver(device.type)}


def described(versions: Mapping[str, str | None]) -> str:
    """Names and values of what is there, on one line."""
    return ", ".join(f"{name} {value}" for name, value in versions.items() if value is not None)


@cache
def _driver(kind: str) -> str | None:
    """The version of NVIDIA's driver, as `nvidia-smi` tells it; None where it does not, and of other accelerators."""
    if kind != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None
