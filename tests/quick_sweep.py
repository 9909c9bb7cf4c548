"""Timings of a moment: what they mean stays, only their intervals are wide. `python -m tests.quick_sweep` is the
sweep's command with such timings."""

import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from orchestrator import sweep
from orchestrator.workers import pool
from orchestrator.workers.worker import Worker


def shorten(set_attribute: Callable[[Any, str, float], object] = setattr) -> None:
    from streamllm.measuring import pairing, timing

    set_attribute(timing, "SEGMENT_SEC", 0.01)
    set_attribute(timing, "LONGEST_SEGMENT_SEC", 0.02)  # of a model of 30 layers, a token
    set_attribute(pairing, "ENOUGH_SEC", 0.1)


class Quick(Worker):
    def load(self):
        shorten()
        described = super().load()
        gc.freeze()  # each timing begins with a collection, which need not go through all that was imported
        return described


def main() -> int:
    if "--dry-run" not in sys.argv:
        shorten()
    pool.WorkerPool = partial(pool.WorkerPool, worker_class=Quick)
    return sweep.main()


if __name__ == "__main__":
    from tests.quick_sweep import main  # of the module by whose name Ray's workers find `Quick`

    sys.exit(main())
