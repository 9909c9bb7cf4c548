"""The device's own energy counter, where it has one: joules since some time in the past.

A counter counts all that it covers, idle power and other processes included, and says what that is. It moves in steps:
NVML's of an H100 every 100 ms; so whoever reads it has to let many steps pass (`measuring.energy`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import UnavailableError, reason_of

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows RAPL's counters, of Intel's CPUs and AMD's alike."""
_FIX = "take energy out of what is asked for, or measure where there is a counter"


class EnergyCounter(Protocol):
    """A counter of energy that does not run backwards."""

    @property
    def covers(self) -> str:
        """What it counts, in words."""

    def joules(self) -> float:
        """Since some time in the past."""


def energy_counter(device: torch.device) -> EnergyCounter:
    """Of the GPU that runs the model, or of the CPU's packages. Raises UnavailableError where there is none, or none
    that may be read."""
    if device.type == "cpu":
        return PackageCounter.found()
    if device.type != "cuda" or torch.version.hip:
        raise _none(f"of {device.type} we know no counter")
    return GpuCounter.of(str(torch.cuda.get_device_properties(device).uuid))


def why_uncounted(device: torch.device) -> str | None:
    """None where there is a counter."""
    try:
        energy_counter(device)
    except UnavailableError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class GpuCounter:
    """NVML's total energy of a GPU, in millijoules since the driver was loaded (Volta and later)."""

    nvml: Any
    handle: Any
    covers: str = "the whole GPU with its memory, idle power included; not the host"

    @classmethod
    def of(cls, uuid: str) -> GpuCounter:
        """Of the GPU that torch calls so. A part of one (MIG) has no counter. Raises UnavailableError."""
        try:
            import pynvml
        except ImportError:
            raise _none("pynvml is missing; pip install nvidia-ml-py") from None
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            counter = cls(pynvml, handle)
            counter.joules()
        except pynvml.NVMLError as error:
            raise _none(f"NVML says of {name}: {reason_of(error)}") from None
        if _is_partitioned(pynvml, handle):
            raise _none("the GPU is shared out (MIG), and its counter counts all parts")
        return counter

    def joules(self) -> float:
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3


def _is_partitioned(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # a GPU that knows no parts
        return False


@dataclass
class PackageCounter:
    """RAPL's energy of all CPU packages of the machine. Its files hold microjoules and begin anew at
    `max_energy_range_uj`, which may be a minute's worth: it is to be read more often."""

    zones: Sequence[Path]
    covers: str = ""
    _before: list[int] = field(default_factory=list)
    _whole: int = 0

    def __post_init__(self) -> None:
        names = " and ".join((zone / "name").read_text().strip() for zone in self.zones)
        self.covers = f"CPU {names} with all cores, whoever uses them, idle power included; not the memory"
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self.zones]
        self._before = self._read()

    @classmethod
    def found(cls, folder: Path = POWERCAP) -> PackageCounter:
        """Raises UnavailableError."""
        zones = [path.parent for path in sorted(folder.glob("intel-rapl:*/energy_uj")) if _is_package(path.parent)]
        if not zones:
            raise _none(f"this CPU shows none in {folder}")
        if unreadable := [zone for zone in zones if not os.access(zone / "energy_uj", os.R_OK)]:
            raise _none(f"{unreadable[0] / 'energy_uj'} may be read by root only")
        return cls(zones)

    def joules(self) -> float:
        now = self._read()
        for last, new, most in zip(self._before, now, self._ranges, strict=True):
            self._whole += new - last if new >= last else new - last + most
        self._before = now
        return self._whole / 1e6

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self.zones]


def _is_package(zone: Path) -> bool:
    """Not a part of one, nor all of a machine with its display (psys)."""
    return (zone / "name").read_text().startswith("package")


def _none(reason: str) -> UnavailableError:
    return UnavailableError(f"energy: no counter: {reason}; {_FIX}")
