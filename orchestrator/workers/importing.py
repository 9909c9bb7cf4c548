"""Importing torch and transformers: thousands of modules, once in every process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """What is imported meanwhile stays, so no garbage is looked for among it, now or later: that was a quarter of the
    time that importing took, and half a second of each timing, which begins with such a search."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def import_libraries() -> None:
    """All of them that loading a model needs."""
    with lasting_imports():
        from streamllm.libraries import hush_libraries

        hush_libraries()
        import transformers.modeling_utils  # noqa: F401  # by each model's own code

        import streamllm.engine.loading  # noqa: F401
