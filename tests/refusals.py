"""What a command says to bad input: one line, soon, and in little memory."""

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from orchestrator import sweep
from streamllm import __main__ as commands

MOST_CHARACTERS = 600
"""Of a refusal."""


class TooLongError(BaseException):
    """No library catches it as one of its own."""


@contextlib.contextmanager
def within(seconds: int, mib: int = 4096) -> Iterator[None]:
    """Raises TooLongError, or MemoryError where it wants more memory than that beside what there is."""

    def late(*_: object) -> None:
        raise TooLongError(f"longer than {seconds} s")

    with Path("/proc/self/statm").open() as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    left = signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (held + mib * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
        signal.alarm(left)


def run(main: Callable[[], int], *arguments: str, cwd: object = ".") -> subprocess.CompletedProcess[str]:
    """A command in this process, with its exit code and what it prints; a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(str(cwd)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["x", *arguments]),
        mock.patch.dict(os.environ),
        within(60),
    ):
        try:
            code = main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def dry_run(*arguments: str, cwd: object = ".") -> subprocess.CompletedProcess[str]:
    """`python -m orchestrator.sweep --dry-run`."""
    return run(sweep.main, "--dry-run", *arguments, cwd=cwd)


def command(*arguments: str, cwd: object = ".") -> subprocess.CompletedProcess[str]:
    """`python -m streamllm`."""
    return run(commands.main, *arguments, cwd=cwd)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The line that it refused with."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("error: "), done.stderr
    assert len(said[0]) <= MOST_CHARACTERS, said[0]
    return said[0].removeprefix("error: ")
