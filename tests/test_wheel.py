"""The wheel by itself: built, unpacked elsewhere, and used from an empty folder with what it carries."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .test_docs import ROOT

PACKAGES = ("streamllm", "orchestrator", "dashboards", "search_spaces")
EVALUATE = ["-m", "streamllm", "evaluate", "--max-eval-tokens", "300", "--window-size", "60"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with nothing but the wheel's contents."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-compile", "--target", str(target), str(source)], check=True)
    return target


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["-c", "import {0}; print(*(one.__file__ for one in ({0})))".format(", ".join(PACKAGES))], "{target}"),
        (EVALUATE, "perplexity"),
        (["-m", "orchestrator.sweep", "--dry-run", "--space", "kv_budget"], "perplexity"),
        (["-m", "dashboards.deploy", "nowhere"], "error: study"),
    ],
)
def test_it_works_from_an_empty_folder(command, said, installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert said.format(target=f"{installed}{os.sep}") in done.stdout + done.stderr, done.stderr
    assert done.returncode == (2 if "nowhere" in command else 0)
    assert not {path.name for path in Path(tmp_path).iterdir()} - {"sweeps"}


def test_it_carries_what_the_packages_read(installed):
    """Whatever lies beside the code, but for what is built of it and the README's picture."""
    for name in PACKAGES:
        there = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*") if path.is_file()}
        wanted = {path for path in there if not {"__pycache__", "examples"} & {*path.parts}}
        assert {str(path) for path in wanted if not (installed / path).exists()} == set()
