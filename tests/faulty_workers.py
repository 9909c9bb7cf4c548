"""Workers that misbehave. A module of their own, without torch: each of their processes imports it."""

import os
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from orchestrator.workers.lease import timing_lease
from orchestrator.workers.messages import WorkerUnusableError
from orchestrator.workers.worker import Worker

from .pretended import CONDITIONS, measured
from .quick_sweep import Quick
from .waiting import wait_until


def first_time(folder, name):
    """Over all processes."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class WithoutModel(Worker):
    """Loads and measures nothing, quickly."""

    def load(self):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        warnings = self._claim(visible)
        return self.place() | {
            "conditions": CONDITIONS,
            "device_type": "cpu",
            "uncounted": None,
            "visible_devices": visible,
            "cores": self.cores,
            "warnings": warnings,
        }

    def conditions(self, variant):
        return CONDITIONS

    def measure(self, assignment, text, against=()):
        more = {"ratios": [1.0] * 12} if assignment.job.kind == "times" else {}
        return measured(assignment.job, text, **more)


class Telling(Worker):
    """Says where it is, too."""

    def load(self):
        found = super().load()
        settings = {name: os.environ.get(name) for name in ("STREAMLLM_DATA", "OTHER")}
        return found | {"directory": str(Path.cwd()), "settings": settings}


class OnAnotherDisk(Quick):
    """Works in a folder of its own, as on a node that does not have the driver's, and may open nothing there."""

    def load(self):
        os.chdir(tempfile.mkdtemp())
        forbidden, self.setup = str(self.setup.directory), replace(self.setup, directory=Path("/not/on/this/node"))

        def look(event, arguments):
            if event in ("open", "os.mkdir", "os.rename", "os.listdir") and str(arguments[0]).startswith(forbidden):
                raise PermissionError(f"{event} {arguments[0]}")

        sys.addaudithook(look)
        return super().load() | {"directory": str(Path.cwd())}


class Slow(WithoutModel):
    def measure(self, assignment, text, against=()):
        time.sleep(0.3)  # a signal must find it at work
        return super().measure(assignment, text, against)


FAULTS = ("none", "raise", "kill", "kill once", "kill with lease once", "spoil once")
"""By number of sinks."""


class Faulty(WithoutModel):
    def measure(self, assignment, text, against=()):
        what = assignment.job.what
        fault = FAULTS[what.policy.n_sink] if what.method not in ("recompute", "ring") else "none"
        if fault.endswith(" once"):
            fault = fault if first_time(self.setup.directory, fault) else "none"
        if fault == "raise":
            raise ValueError("nope")
        if fault == "spoil once":
            raise WorkerUnusableError("an illegal memory access was encountered")
        if fault.startswith("kill"):
            with timing_lease() if "lease" in fault else nullcontext():
                os.kill(os.getpid(), signal.SIGKILL)
        with timing_lease():
            return super().measure(assignment, text, against)


class ShortOfMemory(Quick):
    """With a real model: one configuration wants more memory than there is, for another the weights are NaN."""

    def _measure(self, assignment, against):
        what = assignment.job.what
        if what.method not in ("recompute", "ring") and what.policy.n_sink == 1:
            import torch

            torch.empty(2**60)
        if what.method in ("recompute", "ring") or what.policy.n_sink != 2:
            return super()._measure(assignment, against)
        weight = next(self._models[assignment.subject.variant].model.parameters()).data
        kept = weight.clone()
        weight.fill_(float("nan"))
        try:
            return super()._measure(assignment, against)
        finally:
            weight.copy_(kept)


class Hanging(WithoutModel):
    def measure(self, assignment, text, against=()):
        (self.setup.directory / f"measuring {assignment.job.what.policy.n_sink}").touch()
        time.sleep(600)


class NeverReady(WithoutModel):
    def load(self):
        time.sleep(600)


class Unwilling(WithoutModel):
    def load(self):
        raise RuntimeError("no such luck")


class OnNodes(WithoutModel):
    """Says which node it is on, as its kind. Trials hang where that is an added one, and elsewhere wait until it has
    been killed."""

    def load(self):
        import ray

        self.node = ray.get_runtime_context().get_node_id()
        return super().load() | {"node": self.node, "host": self.node}

    def measure(self, assignment, text, against=()):
        if assignment.job.what.method not in ("recompute", "ring"):  # what trials are compared with
            added = self.node != (self.setup.directory / "head").read_text()
            killed = self.setup.directory / "killed"
            wait_until(lambda: not added and killed.exists(), what="the end of the added node")
        return super().measure(assignment, text, against)
