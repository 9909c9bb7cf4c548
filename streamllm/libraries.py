"""The libraries underneath: which versions are installed here, and what they are kept from printing."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from logging import getLogger


@cache
def installed(name: str) -> str | None:
    """The version of an installed distribution; None if there is none of that name."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def hush_libraries() -> None:
    """No progress bars and no remarks of transformers, the hub and torchao, which transformers imports where it is."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    for name in ("torchao", "torch.utils._pytree"):
        getLogger(name).setLevel("ERROR")
