"""The pool: Ray actors that each own one accelerator, or a share of the cores, and measure one trial at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from streamllm.errors import UsageError

from .trial import TrialMeasurement, TrialSpec, WorkerSetup
from .worker import Worker

_DEATHS_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class Finished:
    """What a worker gave back: a description of itself when it became ready, a measurement, or why there is none."""

    worker: int
    description: dict[str, Any] | None = None
    measurement: TrialMeasurement | None = None
    error: str | None = None
    died: bool = False
    lost: bool = False
    """It died so often that it was not started again."""


class WorkerPool:
    """Starts `count` workers (0: one per accelerator, or per core where there is none) and passes trials to them."""

    def __init__(self, setup: WorkerSetup, count: int = 0, address: str | None = None) -> None:
        import ray

        self._ray = ray
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            _init_ray(address)
        self._setup = setup
        resources = ray.cluster_resources()
        self.accelerators = int(resources.get("GPU", 0))
        self._cores = int(resources.get("CPU", 1))
        self.count = count or self.accelerators or self._cores
        if self.accelerators and self.count > self.accelerators:
            self.shutdown()
            raise UsageError(
                f"workers {self.count}: each owns an accelerator and there are {self.accelerators}; "
                f"give --workers {self.accelerators} or fewer"
            )
        self._actors: dict[int, Any] = {}
        self._in_flight: dict[Any, int] = {}
        self._deaths = dict.fromkeys(range(self.count), 0)
        for index in range(self.count):
            self._start(index)

    def submit(self, worker: int, spec: TrialSpec) -> None:
        self._in_flight[self._actors[worker].measure.remote(spec)] = worker

    def wait(self, timeout: float) -> Iterator[Finished]:
        """What finished within `timeout` seconds. A dead worker is started again, unless it keeps dying."""
        if not self._in_flight:
            return
        ready, _ = self._ray.wait(list(self._in_flight), num_returns=1, timeout=timeout)
        for reference in ready:
            worker = self._in_flight.pop(reference)
            try:
                value = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                yield Finished(worker, error=_one_line(error.cause))
            except self._ray.exceptions.RayError as error:
                self._deaths[worker] += 1
                lost = self._deaths[worker] >= _DEATHS_IN_A_ROW
                if not lost:
                    self._start(worker)
                yield Finished(worker, error=f"the worker died ({type(error).__name__})", died=True, lost=lost)
            else:
                self._deaths[worker] = 0
                if isinstance(value, TrialMeasurement):
                    yield Finished(worker, measurement=value)
                else:
                    yield Finished(worker, description=value)

    def shutdown(self) -> None:
        """Ends Ray, if this pool started it; otherwise only its own workers."""
        if self._started_ray:
            self._ray.shutdown()
        else:
            for actor in self._actors.values():
                self._ray.kill(actor)

    def _start(self, index: int) -> None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        share = max(len(cores) // self.count, 1)
        mine = [cores[(index * share + i) % len(cores)] for i in range(share)] if cores else []
        actor = self._ray.remote(Worker).options(
            num_gpus=1 if self.accelerators else 0,
            num_cpus=0 if self.accelerators else min(1.0, self._cores / self.count),
            name=None,
            runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(max(len(mine), 1))}},
        )
        self._actors[index] = actor.remote(self._setup, mine)
        self._in_flight[self._actors[index].load.remote()] = index


def _init_ray(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address=address, **options)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
