"""Models and a Ray cluster shared by all tests, loaded and started once. Accelerators are hidden from all tests but
those marked `gpu`; torch and Ray, which look for them, are imported late."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from streamllm.engine.model import LoadedModel

settings.register_profile("any machine", deadline=None)  # or each case would be a timed assertion
settings.load_profile("any machine")

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("neox-tiny", "llama-tiny")


SWEEPS = ("test_copies", "test_faults", "test_interrupted", "test_lease", "test_printing", "test_smollm2", "test_sweep")
"""Modules whose workers claim all cores of the machine: one after another."""
HIDDEN = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "ZE_AFFINITY_MASK": "",
    "ONEAPI_DEVICE_SELECTOR": "*:cpu",
}
"""What hides NVIDIA's, AMD's and Intel's accelerators from torch and from Ray (which would count the usual -1 as one).
Apple's cannot be hidden."""


def is_gpu_session(markers: str) -> bool:
    """Whether `-m` asks for the tests that want a GPU."""
    return "gpu" in markers.split() and "not gpu" not in markers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-architecture", action="store_true", help="all that transformers knows, not the popular ones alone"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The processes that tests start, Ray's workers among them, inherit what is set here. Of the tests' own processes
    none waits for another's timings: nobody keeps what they time. MLflow's servers do without the eight processes for
    jobs, of which we have none, that each import all of it again. Nothing is asked of the model hub, which is asked
    again and again for half a minute where it cannot be reached."""
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["RAY_AUTH_MODE"] = "disabled"  # be there a token on this machine or not
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as scripts have it in what they run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not is_gpu_session(config.option.markexpr):
        os.environ.update(HIDDEN)
        leases = os.environ["STREAMLLM_LEASES"] = tempfile.mkdtemp(prefix="leases-")
        config.add_cleanup(lambda: shutil.rmtree(leases, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs in one process: a module, all those that sweep, and all that want a GPU, if there is one."""
    in_gpu_session = is_gpu_session(config.option.markexpr)
    for item in items:
        module = item.path.stem
        group = "gpu" if in_gpu_session else "sweeps" if module in SWEEPS else module
        item.add_marker(pytest.mark.xdist_group(group))
        if in_gpu_session:
            import torch

            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> None:
    """What was imported so far, millions of objects, is left alone by the collections to come, one of which begins each
    timing: half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quick_timings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules whose subject is how long timings take have a fixture of this name that does nothing."""
    if not is_gpu_session(request.config.option.markexpr):
        from .quick_sweep import shorten

        shorten(monkeypatch.setattr)


@pytest.fixture(scope="session")
def golden_tokens() -> np.ndarray:
    return np.array(json.loads((GOLDEN / "tokens.json").read_text()))


@pytest.fixture(scope="session")
def golden_model() -> Callable[..., LoadedModel]:
    """On the CPU, where the golden losses were computed."""
    import torch

    from streamllm.engine.loading import load_model

    return cache(lambda family, dtype="float32": load_model(str(GOLDEN / family), dtype, torch.device("cpu")))


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, to be copied: creating its tables takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Of one node with two cores, in processes of its own; whoever wants to use it in this one connects."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    os.environ |= {"RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0"}  # as the sweep starts its own
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)  # where workers find the classes of faulty ones
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "no_monitor": True}
    )
    yield cluster
    cluster.shutdown()


def golden_cases() -> list[Any]:
    """(family, entry) of every policy the original implementation was run with."""
    return [
        pytest.param(family, entry, id=f"{family}-{'-'.join(str(v) for v in entry['policy'].values())}")
        for family in FAMILIES
        for entry in json.loads((GOLDEN / family / "mit_losses.json").read_text())
    ]
