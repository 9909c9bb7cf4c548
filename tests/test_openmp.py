"""OpenMP is asked itself what it does: with OMP_DISPLAY_ENV=VERBOSE it prints its settings when torch loads it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import GOLDEN

ROOT = Path(__file__).parent.parent
ENTRY_POINTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("streamllm", "orchestrator", "dashboards")
    for path in (ROOT / folder).rglob("*.py")
    if path.name == "__main__.py" or 'if __name__ == "__main__":' in path.read_text()
)
HELP_AND_OPENMP = """
import ctypes, glob, importlib.util, runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
except SystemExit:
    found = glob.glob(importlib.util.find_spec("torch").submodule_search_locations[0] + "/lib/libgomp*")
    ctypes.CDLL(found[0]) if found else importlib.import_module("torch")
"""
"""What a command does first; then torch's own OpenMP is loaded, if torch was not: a hundred times faster than torch."""


def spin_count(*arguments, cwd=None, **variables):
    """How often a waiting thread of a Python process looks again before it sleeps; None if OpenMP does not say."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE", **variables}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    return int(found[0]) if found else None


@pytest.fixture(scope="module", autouse=True)
def gnu_openmp():
    spins = spin_count("-c", "import torch")
    if spins is None:
        pytest.skip("torch's OpenMP is not GNU's: it does not say how it waits")
    assert spins > 0, "what would be without us"


def test_the_entry_points_are_all_there():
    assert {"streamllm", "streamllm.testbed.train", "orchestrator.sweep", "orchestrator.sync"} < set(ENTRY_POINTS)
    assert {"dashboards.report", "dashboards.serve", "dashboards.pareto", "dashboards.figures"} < set(ENTRY_POINTS)


@pytest.mark.parametrize("module", [*ENTRY_POINTS, "tests.benchmarks.decode"])
def test_when_a_command_loads_torch_its_threads_wait_passively(module):
    assert spin_count("-c", HELP_AND_OPENMP, module) == 0


MODEL = ("--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("streamllm", "backends"),
        ("orchestrator.sweep", "--dry-run", *MODEL),
    ],
    ids=lambda arguments: arguments[0],
)
def test_whole_commands(arguments, tmp_path):
    assert spin_count("-m", *arguments, cwd=tmp_path) == 0


def test_a_users_own_setting_wins():
    assert spin_count("-c", HELP_AND_OPENMP, "streamllm", OMP_WAIT_POLICY="ACTIVE") > 300000


@pytest.mark.parametrize(
    ("first", "variables", "times"),
    [("torch", {}, 1), ("json", {}, 0), ("torch", {"OMP_WAIT_POLICY": "ACTIVE"}, 0)],
)
def test_a_program_that_imported_torch_first_is_told(first, variables, times):
    """Nothing can be done for it any more; a setting of its own, whichever, says that it knows."""
    code = (
        "import sys, types\n"
        f"sys.modules.setdefault({first!r}, types.ModuleType({first!r}))\n"
        "import streamllm, streamllm.errors\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | variables
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("torch was imported before streamllm: OMP_WAIT_POLICY=PASSIVE comes too late") == times
    assert (":3: UserWarning" in done.stderr) == bool(times), "it names the line of the import"
