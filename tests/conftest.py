"""Models shared by all tests, loaded once."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamllm.loaded import LoadedModel
from streamllm.models import load_model

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("neox-tiny", "llama-tiny")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_tokens() -> np.ndarray:
    return np.array(json.loads((GOLDEN / "tokens.json").read_text()))


@pytest.fixture(scope="session")
def golden_model() -> Callable[..., LoadedModel]:
    return cache(lambda family, dtype="float32": load_model(str(GOLDEN / family), dtype))


def golden_cases() -> list[Any]:
    """(family, entry) of every policy the original implementation was run with."""
    return [
        pytest.param(family, entry, id=f"{family}-{'-'.join(str(v) for v in entry['policy'].values())}")
        for family in FAMILIES
        for entry in json.loads((GOLDEN / family / "mit_losses.json").read_text())
    ]
