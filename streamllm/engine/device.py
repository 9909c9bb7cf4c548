"""The device that runs the model: which, its name, what it does well, waiting for it, its memory."""

from __future__ import annotations

import math
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, shown


def default_device() -> torch.device:
    """The accelerator that torch was built for, where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def unverified(device: torch.device) -> str | None:
    """A warning for a kind of device that this project has never run on; None on CPUs and NVIDIA's GPUs."""
    kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type
    return None if kind in ("cpu", "cuda") else f"{kind}: never tried by us, its times and kernels are unverified"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float16 on an accelerator and float32 on a CPU.

    Raises UsageError for float64 where the device has none."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        if dtype == torch.float64 and float64_device(device) != device:
            raise UsageError(f"dtype 'float64': {device.type} does not compute in it; give float32")
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if "amx_bf16" in _cpuinfo("flags").split() else torch.float32
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)  # torch.mps cannot be asked
    return torch.bfloat16 if supported is not None and supported(including_emulation=False) else torch.float16


@cache
def float64_device(device: torch.device) -> torch.device:
    """Where what is exact is computed: on the device, or on the CPU for one without float64 (Apple's, some of Intel's).

    Move a tensor there before it becomes float64, and make it something else before it is moved back."""
    try:
        torch.ones(1, device=device).double().cos()
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def synchronize(device: torch.device) -> None:
    """Waits for the device to finish what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def empty_cache() -> None:
    """Gives back the accelerator's memory that torch holds and does not use."""
    device = default_device()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()  # torch.accelerator's fails on mps in torch 2.9


_COPIES = 8


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of some copies; measured once per process. They are of 256 MiB
    on a CPU, and of up to 4 GiB on an accelerator, by its own clock: of a short copy, launching would be timed."""
    count = 2**26 if device.type == "cpu" else min(2**30, free_memory(device) // 32)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(_COPIES))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds by the device's own clock, from when it is idle until it is idle again."""
    synchronize(device)
    if device.type == "cpu":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, stop = (torch.Event(device, enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    synchronize(device)
    return start.elapsed_time(stop) / 1e3


def has_float8(device: torch.device) -> bool:
    """Whether kernels read float8 as it is: from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def free_memory(device: torch.device) -> int:
    """Bytes, as far as torch can say; 8 GiB where it cannot."""
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)  # torch.mps has none
    return int(ask(device)[0]) if ask is not None else 2**33


def used_memory(device: torch.device) -> float:
    """MiB in use now: of the accelerator's allocator (NaN where torch does not count), or else the process's resident
    set (its peak, where there is no /proc)."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device) / 2**20 if _counts_memory(device) else math.nan
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 2**20


@dataclass
class Memory:
    megabytes: float = math.nan


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Memory]:
    """The peak inside the block, weights included: of the accelerator's allocator (NaN where torch does not count), or
    else of the process's resident set.

    Where the kernel does not forget earlier peaks when asked to, it is the process's highest so far."""
    memory = Memory()
    if device.type != "cpu":
        counts = _counts_memory(device)
        if counts:
            torch.accelerator.reset_peak_memory_stats(device)
        yield memory
        if counts:
            memory.megabytes = torch.accelerator.max_memory_allocated(device) / 2**20
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux)
    except OSError:
        yield memory
        memory.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return
    yield memory
    status = Path("/proc/self/status").read_text()
    shared = status.partition("RssShmem:")[2].split()[:1]  # what Ray lends to all processes of a node
    memory.megabytes = (int(status.split("VmHWM:")[1].split()[0]) - int(*shared)) / 1024


@cache
def _counts_memory(device: torch.device) -> bool:
    """Whether torch keeps statistics of the accelerator's memory: of mps it has not always (pytorch issue 167447)."""
    try:
        torch.accelerator.memory_allocated(device)
    except RuntimeError:
        return False
    return True


def foreign_processes(device: torch.device) -> list[str]:
    """Who else computes on this GPU, as far as `nvidia-smi` tells: "PID NAME"; none where it is not NVIDIA's.

    In a container its process ids are the host's, and none of them is known to be ours: one process is taken to be.
    """
    if device.type != "cuda":
        return []
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return others(answer, str(torch.cuda.get_device_properties(device).uuid), os.getpid())


def others(answer: str, gpu: str, own: int) -> list[str]:
    """The processes on that GPU in nvidia-smi's `answer` of lines "UUID, PID, NAME", but for our own."""
    lines = [line.split(", ", 2) for line in answer.splitlines() if line.count(", ") >= 2]
    there = {pid: name for uuid, pid, name in lines if gpu in uuid}
    if there.pop(str(own), None) is None and there:
        if len(there) == 1:
            return []
        return [f"{len(there) - 1} of {', '.join(f'{pid} {name}' for pid, name in there.items())}"]
    return [f"{pid} {name}" for pid, name in there.items()]


@cache
def device_name(device: torch.device) -> str:
    """The name of the device that the speed was measured on."""
    cpu = _cpuinfo("model name") or platform.processor() or platform.machine()
    if device.type == "cpu":
        return cpu
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # torch.mps has none
    return str(name(device)) if name is not None else f"{device.type} of {cpu}"


_MOST_THREADS = max(256, os.cpu_count() or 1)
"""OpenMP ends the process where it cannot start as many as it is told."""


def limit_threads(count: int | None) -> None:
    """Keeps torch to `count` threads; None leaves it its own choice. Raises UsageError."""
    if count is not None:
        if count < 1:
            raise UsageError(f"threads {count}: must be a whole number >= 1")
        if count > _MOST_THREADS:
            raise UsageError(f"threads {shown(count)}: must be a whole number from 1 to {_MOST_THREADS}")
        torch.set_num_threads(count)


def cpu_capability() -> str:
    """The vector instructions of torch's own CPU kernels here: DEFAULT, AVX2, AVX512 or another architecture's.

    The environment variable ATEN_CPU_CAPABILITY can only lower it. Results differ in their last digits."""
    return torch.backends.cpu.get_cpu_capability()


@cache
def _cpuinfo(name: str) -> str:
    """A line of the first processor in Linux' /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def why_no_accelerator() -> str:
    """Why torch can use no accelerator here, in its own words where it has any: an old driver, a build for CPUs."""
    kind = torch.accelerator.current_accelerator()  # that it was built for, be there one or not
    if kind is None:
        return "it was built for CPUs alone"
    initialise = getattr(torch.get_device_module(kind), "init", None)  # torch.mps has none
    try:
        if initialise is not None:
            initialise()
    except Exception as error:  # what a driver says arrives as RuntimeError, AssertionError or torch's own
        return str(error).split(". ")[0].strip().rstrip(".")
    return f"it was built for {kind.type} and finds none"


def accelerator_uuid(device: torch.device) -> str | None:
    """The accelerator's own name, the same in every process however few each sees; None where torch does not know."""
    uuid = getattr(_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def near_cores(device: torch.device, pci: Path = Path("/sys/bus/pci/devices")) -> set[int]:
    """The cores of the NUMA node that the accelerator hangs on, be they ours or not; none where the system does not
    tell."""
    found = _properties(device)
    try:
        place = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        ranges = (pci / place / "local_cpulist").read_text().strip().split(",")
    except (AttributeError, OSError):
        return set()
    ends = [part.split("-") for part in ranges if part]
    return {core for first, *last in ends for core in range(int(first), int((last or [first])[0]) + 1)}


def _properties(device: torch.device) -> Any:
    of = getattr(torch.get_device_module(device), "get_device_properties", None)  # torch.mps has none
    return of(device) if of is not None else None
