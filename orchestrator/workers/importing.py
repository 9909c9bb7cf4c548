"""Importing torch and transformers: thousands of modules, once in every process."""

from __future__ import annotations

import gc


def import_libraries() -> None:
    """All of them that loading a model needs. They stay, so no garbage is looked for among them, now or later: that
    was a quarter of the time that importing them took, and half a second of each timing, which begins with such a
    search."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        from streamllm.libraries import hush_libraries

        hush_libraries()
        import transformers.modeling_utils  # noqa: F401  # by each model's own code

        import streamllm.engine.loading  # noqa: F401

        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
