"""A worker: one accelerator, or a share of the cores, with models loaded once and kept; it measures jobs.

Workers know nothing of Optuna, MLflow, Ray or the driver's disk; `pool` makes actors of them. The driver imports this
module too, without a use for torch: what is heavy is imported inside.
"""

from __future__ import annotations

import gc
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from streamllm.errors import UsageError

from .accelerators import own_accelerator
from .importing import import_libraries
from .lease import claim, leases_on
from .messages import Assignment, Subject, Variant, WorkerDescription, WorkerPlace, WorkerSetup, WorkerUnusableError

if TYPE_CHECKING:
    from streamllm.engine.model import LoadedModel
    from streamllm.measuring.bench import Bench
    from streamllm.measuring.conditions import Conditions
    from streamllm.measuring.store import Arrays, Measurement
    from streamllm.measuring.text import TokenStream
    from streamllm.measuring.timing import Reference

T = TypeVar("T")

_ROOM = 1.2
"""Free memory that is wanted to load one model more, in sizes of the largest that is loaded."""


class Worker:
    def __init__(self, setup: WorkerSetup, cores: int, owner: str, on_accelerator: bool = False) -> None:
        """One of the workers of `owner`; it will own `cores` cores of its node, and the accelerator that it was given
        if it was `on_accelerator`."""
        self.setup = setup
        self._on_accelerator = on_accelerator
        self._models: OrderedDict[Variant, LoadedModel] = OrderedDict()
        """The one used last at the end."""
        self._warm: dict[tuple[Variant, int], list[Reference]] = {}
        """References that are kept warm, by the model and the total that they hold."""
        self._texts: dict[str, TokenStream] = {}
        self._count = cores
        self._owner = owner

    def place(self) -> WorkerPlace:
        """Answers as soon as the process is there."""
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def load(self) -> WorkerDescription:
        """Pins itself, loads the model; says what this worker is, sees, and finds wrong (`warnings`).

        Raises UsageError for a model it cannot use, or that is not what the driver has under that name."""
        os.environ.update(self.setup.environment)  # before what reads it is imported
        import_libraries()
        accelerator = own_accelerator(self._on_accelerator)
        warnings = self._claim(accelerator.name, accelerator.near) if accelerator else self._claim()

        from streamllm.engine.device import limit_threads, unverified
        from streamllm.engine.energy import why_uncounted

        if self.setup.directory is not None:
            with suppress(OSError):  # where it is missing, so is what would be looked for in it
                os.chdir(self.setup.directory)  # a process on a cluster starts where Ray did
        limit_threads(len(self.cores) or None)
        loaded = self._loaded(self.setup.variant)
        self._check_same(loaded)
        return {
            **self.place(),
            "conditions": self.conditions(self.setup.variant),
            "device_type": loaded.device.type,
            "visible_devices": accelerator.visible if accelerator else "",
            "cores": self.cores,
            "uncounted": why_uncounted(loaded.device),
            "warnings": [*warnings, *_mismatches(self.cores), *filter(None, [unverified(loaded.device)])],
        }

    def conditions(self, variant: Variant) -> Conditions:
        """Those that this worker measures under with the model as `variant`, which is loaded for it. Raises as
        `measure`."""
        from streamllm.measuring.conditions import Conditions

        return self._with_room({variant}, lambda: Conditions.of(self._loaded(variant)))

    def measure(self, assignment: Assignment, text: TokenStream, against: Sequence[Arrays] = ()) -> Measurement:
        """Measures, against the arrays that the job names; where memory is short, once more without the models it can
        spare.

        Raises MemoryError, NonFiniteLossError, WorkerUnusableError if nothing can be measured here any more, UsageError
        for a quantization that is not to be had here, and whatever torch raises."""
        subject = assignment.subject
        needed = {subject.variant, subject.beside or subject.variant}
        if subject.text not in self._texts:
            self._texts[subject.text] = replace(text, tokens=text.tokens.copy())  # Ray's cannot be written to
        return self._with_room(needed, lambda: self._measure(assignment, against))

    def _measure(self, assignment: Assignment, against: Sequence[Arrays]) -> Measurement:
        bench = self._bench(assignment.subject, assignment.side_by_side)
        return bench.measure(assignment.job, against=against)

    def _with_room(self, needed: Collection[Variant], do: Callable[[], T]) -> T:
        """Does it, again and again while memory is short and there are models that are not `needed` for it."""
        import torch

        from streamllm.engine.device import empty_cache

        while True:
            try:
                return do()
            except torch.OutOfMemoryError as error:
                reason = f"out of accelerator memory: {error}"
            except torch.AcceleratorError as error:
                raise WorkerUnusableError(f"AcceleratorError: {error}") from None
            spared = self._spare_model(needed)
            gc.collect()  # only here are the frames gone that held the memory
            empty_cache()
            if not spared:
                raise MemoryError(reason)

    def _bench(self, subject: Subject, side_by_side: bool = False) -> Bench:
        """All is timed beside one reference where the subject says by which model."""
        from streamllm.measuring.bench import Bench

        beside = None
        if subject.beside is not None:
            beside = self._bench(replace(subject, variant=subject.beside, beside=None))
        loaded = self._loaded(subject.variant, {subject.beside or subject.variant})
        warm = self._warm.setdefault((subject.variant, subject.total), [])
        return Bench(
            loaded,
            self._texts[subject.text],
            subject.total,
            leases_on(loaded.device.type, side_by_side),
            beside,
            partial(self._megabytes_beside, subject.variant),
            warm,
        )

    def _loaded(self, variant: Variant, needed: Collection[Variant] = ()) -> LoadedModel:
        """The model as that variant, which is loaded the first time and then kept; the `needed` ones stay."""
        from streamllm.engine.loading import load_model

        if variant not in self._models:
            while self._is_short() and self._spare_model({variant, *needed}):
                gc.collect()
            self._models[variant] = load_model(self.setup.model, variant.dtype, quantization=variant.quantization)
        self._models.move_to_end(variant)
        return self._models[variant]

    def _is_short(self) -> bool:
        """Whether one model more may not fit."""
        from streamllm.engine.device import free_memory

        sizes = [_bytes(loaded) for loaded in self._models.values()]
        device = next(iter(self._models.values())).device if sizes else None
        return device is not None and free_memory(device) < _ROOM * max(sizes)

    def _spare_model(self, needed: Collection[Variant]) -> bool:
        """Lets go of the model that was not used for longest, but for those needed. Returns whether there was one."""
        variant = next((variant for variant in self._models if variant not in needed), None)
        if variant is not None:
            del self._models[variant]
            self._warm = {of: warm for of, warm in self._warm.items() if of[0] != variant}
        return variant is not None

    def _megabytes_beside(self, variant: Variant) -> float:
        """MiB of the weights of all models but that one."""
        return sum(_bytes(of) for other, of in self._models.items() if other != variant) / 2**20

    def _check_same(self, loaded: LoadedModel) -> None:
        """Checks that the weights are those that the driver has under the same name. Raises UsageError."""
        found, expected = loaded.digest.partition(" ")[0], self.setup.model_digest
        if expected is not None and found != expected:
            raise UsageError(
                f"model {self.setup.model!r} on {socket.gethostname()} differs from the one where the sweep was "
                f"started ({found:.12}..., not {expected:.12}...); give every node the same files"
            )

    def _claim(self, accelerator: str = "", near: Collection[int] = ()) -> list[str]:
        """Makes the accelerator of that name and cores its own, those `near` it first, and says with whom it has to
        share them."""
        self._claims = []
        self.cores: list[int] = []
        if hasattr(os, "sched_setaffinity"):
            allowed = sorted(os.sched_getaffinity(0), key=lambda core: (core not in near, core))
            cores = claim([f"core-{core}" for core in allowed], self._count, self._owner)
            self._claims.append(cores)
            self.cores = sorted(int(name.removeprefix("core-")) for name in cores.names)
            _pin(self.cores)
        if accelerator:
            self._claims.append(claim([f"accelerator-{accelerator}"], 1, self._owner))
        return [f"{' '.join(c.names)}: also used by {c.shared_with}" for c in self._claims if c.shared_with]


def _bytes(loaded: LoadedModel) -> int:
    return sum(p.nbytes for p in (*loaded.model.parameters(), *loaded.model.buffers()))


def _pin(cores: list[int]) -> None:
    """Every thread of this process: an affinity is a thread's own, and Ray's have been started."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def _mismatches(cores: list[int]) -> list[str]:
    """Everything in which the system and torch give this process something other than what was asked for."""
    import torch

    found = []
    if cores and os.sched_getaffinity(0) != set(cores):
        found.append(f"asked for cores {cores}, runs on {sorted(os.sched_getaffinity(0))}")
    if cores and torch.get_num_threads() != len(cores):
        found.append(f"{len(cores)} cores, but torch runs {torch.get_num_threads()} threads")
    return found
