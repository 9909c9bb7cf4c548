"""The GPU acceptance runs where there is no GPU, as far as it goes; what breaks in it is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .gpu.acceptance import PARTS, Check, _run, _verdict, report

SHIPPED = sorted((Path(__file__).parent / "gpu" / "results").glob("h*00.json"))


def test_a_check_that_runs(tmp_path):
    command = [sys.executable, "-m", "tests.gpu.acceptance", "--out", tmp_path, "--part", "correctness"]
    chosen = [word for name in ("kernels", "formats", "device_assert") for word in ("--check", name)]
    chosen += ["--scale", "tiny"]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "results.json").read_text())["checks"]
    assert {name: _verdict(result) for name, result in checks.items()} == {
        "correctness: kernels": "right",
        "correctness: formats": "right",
        "correctness: device_assert": "skipped",
    }
    assert {row["auto"] for row in checks["correctness: kernels"]["rows"]} == {"flash"}
    assert "### correctness: kernels: right" in (tmp_path / "README-gpu.md").read_text()


def test_a_check_that_breaks_or_takes_too_long_is_told(tmp_path):
    broken = _run(Check("correctness", "no such check", 60), "tiny", tmp_path)
    assert _verdict(broken) == "broken" and "KeyError" in broken["failed"]
    late = _run(Check("correctness", "losses", 0.5), "tiny", tmp_path)
    assert _verdict(late) == "broken" and late["failed"].endswith("killed after 0.5 s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_what_was_measured_can_be_shown(file):
    results = json.loads(file.read_text())
    assert {name.split(":")[0] for name in results["checks"]} <= set(PARTS)
    assert results["facts"]["device"] in report(results)
    assert not [name for name, result in results["checks"].items() if _verdict(result) in ("wrong", "broken")]
