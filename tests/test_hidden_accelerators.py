"""Tests that count cores and feed tokens of the CPU see no accelerator, whatever the machine has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import HIDDEN, is_gpu_session

ROOT = Path(__file__).parent.parent
SEEN = dict.fromkeys(HIDDEN, "7")
"""As a user's shell may have them."""
LOOK = "import json, os, torch; print(json.dumps([torch.accelerator.device_count(), dict(os.environ)]))"


def test_the_processes_that_tests_start_see_none():
    found = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    count, environment = json.loads(found.stdout)
    assert count == 0
    assert {name: environment.get(name) for name in HIDDEN} == HIDDEN


def test_ray_reads_it_as_no_accelerator_of_any_kind():
    """Not as one called -1, or as all."""
    from ray._private.accelerators import get_all_accelerator_managers

    gpus = [manager for manager in get_all_accelerator_managers() if manager.get_resource_name() == "GPU"]
    able = [manager for manager in gpus if manager.get_visible_accelerator_ids_env_var() in HIDDEN]
    assert len(able) >= 3, "NVIDIA's, AMD's, Intel's"
    assert [manager.get_current_process_visible_accelerator_ids() for manager in able] == [[]] * len(able)


@pytest.mark.parametrize(
    ("markers", "of_gpus"),
    [("", False), ("not gpu", False), ("gpu", True), ("gpu and slow", True), ("slow and not gpu", False)],
)
def test_which_sessions_are_of_gpus(markers, of_gpus):
    assert is_gpu_session(markers) == of_gpus


PROBE = """
import json, os, pathlib
def pytest_collection_finish(session):
    found = [sorted(item.nodeid for item in session.items), dict(os.environ)]
    pathlib.Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""


@pytest.mark.parametrize("options", [(), ("-m", "gpu")], ids=["usual", "gpu"])
def test_a_session_of_its_own_sees_the_gpus(options, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    environment = os.environ | SEEN | {"PYTHONPATH": path, "FOUND": str(tmp_path / "found")}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "probe", "--collect-only", *options]
    command += ["tests/gpu/test_session.py", "tests/test_sample.py"]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    collected, seen = json.loads((tmp_path / "found").read_text())
    assert {Path(name.partition("::")[0]).parent.name for name in collected} == {"gpu" if options else "tests"}
    assert {name: seen[name] for name in HIDDEN} == (SEEN if options else HIDDEN)
