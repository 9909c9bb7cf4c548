"""The device that runs the model: which, its name, what it does well, waiting for it, its memory."""

from __future__ import annotations

import math
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float16 on an accelerator and float32 on a CPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if "amx_bf16" in _cpuinfo("flags").split() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def synchronize(device: torch.device) -> None:
    """Waits for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of some copies of 256 MiB; measured once per process."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def used_memory(device: torch.device) -> float:
    """MiB in use now: of the CUDA allocator, or else the process's resident set (its peak, where there is no /proc)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
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
    """The peak inside the block, weights included: of the CUDA allocator, or else of the process's resident set.

    Where the kernel does not forget earlier peaks when asked to, it is the process's highest so far."""
    memory = Memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield memory
        memory.megabytes = torch.cuda.max_memory_allocated(device) / 2**20
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux)
    except OSError:
        yield memory
        memory.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return
    yield memory
    status = Path("/proc/self/status").read_text()
    memory.megabytes = int(status.split("VmHWM:")[1].split()[0]) / 1024


def foreign_processes(device: torch.device) -> list[str]:
    """Who else computes on this accelerator, as far as `nvidia-smi` tells: "PID NAME"; none on a CPU.

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
    """What the speed was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def limit_threads(count: int | None) -> None:
    """Keeps torch to `count` threads; None leaves it its own choice."""
    if count is not None:
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
