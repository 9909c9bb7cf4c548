"""Models and a Ray cluster shared by all tests, loaded and started once."""

import json
import os
from collections.abc import Callable, Iterator
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


SWEEPS = ("test_faults", "test_interrupted", "test_lease", "test_printing", "test_smollm2", "test_sweep")
"""Modules whose workers claim all cores of the machine: one after another."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs in one process: a module, and all those that sweep."""
    for item in items:
        module = item.path.stem
        item.add_marker(pytest.mark.xdist_group("sweeps" if module in SWEEPS else module))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_tokens() -> np.ndarray:
    return np.array(json.loads((GOLDEN / "tokens.json").read_text()))


@pytest.fixture(scope="session")
def golden_model() -> Callable[..., LoadedModel]:
    return cache(lambda family, dtype="float32": load_model(str(GOLDEN / family), dtype))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Of one node with two cores, in processes of its own; whoever wants to use it in this one connects."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # where workers find the classes of faulty ones
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def golden_cases() -> list[Any]:
    """(family, entry) of every policy the original implementation was run with."""
    return [
        pytest.param(family, entry, id=f"{family}-{'-'.join(str(v) for v in entry['policy'].values())}")
        for family in FAMILIES
        for entry in json.loads((GOLDEN / family / "mit_losses.json").read_text())
    ]
