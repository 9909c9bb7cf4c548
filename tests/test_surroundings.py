"""Commands are given among other people's files, some of which are called as modules of ours, or of a library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.workers import cluster
from streamllm.terminal.program import COMMANDS

ROOT = Path(__file__).parent.parent
SCRIPT = Path(sys.executable).with_name("streamllm")


@pytest.fixture
def trap(tmp_path):
    for name in ("search_spaces", "yaml", "random", "json", "torch", "ray", "mlflow", "types"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('trapped by {name}')")
    return tmp_path


def said(command, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", ["--version", "evaluate --help", *(f"{name} --help" for name in COMMANDS)])
def test_the_command_is_immune(command, trap):
    if not SCRIPT.exists():
        pytest.skip("not installed, but on the path")
    shown = said([str(SCRIPT), *command.split()], trap)
    assert "streamllm" in shown and "trapped" not in shown
    assert command == "--version" or f"usage: streamllm {command.split()[0]} " in shown


@pytest.mark.parametrize("module", ["streamllm", "orchestrator.sweep", "orchestrator.sync", "dashboards.pareto"])
def test_so_are_the_modules_by_their_own_names(module, trap):
    shown = said([sys.executable, "-m", module, "--help"], trap)
    assert f"usage: python -m {module} " in shown
    paths = [sys.executable, "-c", "import streamllm, dashboards, orchestrator, sys; print(sys.path[0] == '')"]
    (trap / "random.py").unlink()
    assert said(paths, trap) == "True\n", "whoever imports us keeps the path as it is"


def test_workers_do_not_look_for_modules_in_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    where = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: where.append(Path.cwd()))  # Ray sends it to its workers
    monkeypatch.setattr(cluster, "_vital", lambda ray: {})
    cluster.Cluster.join(None)
    assert where == [ROOT] and Path.cwd() == tmp_path


@pytest.mark.parametrize("module", ["streamllm", "orchestrator.sweep", "dashboards.pareto"])
def test_a_working_directory_that_is_no_more(module, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    home = "streamllm.__main__" if module == "streamllm" else module
    program = f"import shutil; shutil.rmtree({str(here)!r}); from {home} import main; raise SystemExit(main(['x']))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == "error: the working directory has been removed; change to one that is there\n"
