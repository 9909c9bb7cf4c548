"""The limits that the tests themselves have: what hangs or takes the interpreter with it is named, and all comes to an
end."""

import os
import re
import subprocess
import sys
from pathlib import Path

SETTINGS = Path(__file__).parent.parent / "pyproject.toml"
BROKEN = """
import ctypes, signal, time
import pytest

def test_before(): pass
def test_crashes(): ctypes.string_at(0)

@pytest.mark.xdist_group("other")
@pytest.mark.timeout(1)
def test_hangs(): time.sleep(600)

@pytest.mark.xdist_group("other")
def test_after(): pass

@pytest.mark.xdist_group("other")
def test_hangs_where_no_signal_reaches():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(600)
"""


def test_what_hangs_or_crashes_is_named_and_the_run_ends(tmp_path):
    (tmp_path / "test_broken.py").write_text(BROKEN)
    command = [sys.executable, "-m", "pytest", "-c", str(SETTINGS), "--rootdir", str(tmp_path)]
    command += ["-o", "faulthandler_timeout=6", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "crashed while running 'test_broken.py::test_crashes" in done.stdout
    assert "Fatal Python error: Segmentation fault" in done.stderr and "in test_crashes" in done.stderr
    assert re.search(r"^FAILED test_broken.py::test_hangs@\w+ - Failed: Timeout \(>1.0s\)", done.stdout, re.MULTILINE)
    assert "crashed while running 'test_broken.py::test_hangs_where_no_signal_reaches" in done.stdout
    assert "in test_hangs_where_no_signal_reaches" in done.stderr
