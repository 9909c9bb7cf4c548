"""A sweep that is asked to end hears it, whatever it is doing."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from orchestrator.ending import AskedToEnd, Ending

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_asks(number):
    before = signal.getsignal(number)
    with Ending() as ending:
        with pytest.raises(AskedToEnd):
            signal.raise_signal(number)
        ending.was_heard()
        signal.raise_signal(number)  # the same one again, as shells send it
    assert ending.exit_code == 128 + number and signal.getsignal(number) == before


def test_it_is_asked_again_until_it_was_heard():
    with Ending() as ending:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except AskedToEnd:
            pass  # as a library might
        with pytest.raises(AskedToEnd):
            time.sleep(30)
        ending.was_heard()
        time.sleep(1.5)


def test_a_loss_that_is_found_while_it_is_asked_again_is_the_same_end():
    with Ending() as ending:
        assert not ending.is_why(RuntimeError("Ray's head is gone"))
        with contextlib.suppress(AskedToEnd):  # as a library might
            signal.raise_signal(signal.SIGTERM)
        assert ending.is_why(RuntimeError("Ray's head is gone")) and ending.exit_code == 143
        time.sleep(1.5)  # heard: not asked again


def run(program, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*arguments, sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_what_hears_nothing_is_ended():
    said = run("""
        import ctypes, os, signal
        from orchestrator import ending
        ending._HEARD_SEC = 1.0
        with ending.Ending():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                ctypes.PyDLL(None).getpid()
            except KeyboardInterrupt:
                pass
            while True:
                try:
                    ctypes.CDLL(None).sleep(600)
                except KeyboardInterrupt:
                    pass
    """)
    assert said.returncode == 143 and said.stderr.strip() == "interrupted: the same command goes on from here"


def test_what_was_ignored_before_still_is():
    said = run("""
        import os, signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        from orchestrator.ending import Ending
        with Ending():
            os.kill(os.getpid(), signal.SIGHUP)
        print("goes on")
    """)
    assert said.stdout == "goes on\n" and said.returncode == 0
