"""Whole commands as processes of their own that have everything imported already: a server imported it once, and they
are forks of it. What a command imports by itself, and how its interpreter ends, is seen only by `python -m` itself."""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
_IMPORTED = ["tests.quick_sweep", "tests.mortal_sweep", "mlflow", "ray", "optuna", "matplotlib.pyplot", "pandas"]
_IMPORTED += ["transformers.models.gpt_neox.modeling_gpt_neox", "transformers.modeling_utils", "torch._dynamo"]
_IMPORTED += ["transformers.quantizers.auto", "transformers.integrations", "transformers.models.auto.modeling_auto"]


@cache
def context() -> ForkServerContext:
    os.environ["PYTHONPATH"] = str(ROOT)  # where the server and Ray's workers find this package
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_IMPORTED)
    return made


def run(
    main: Callable[[], int | None],
    *arguments: str,
    cwd: Path,
    unread: Sequence[int] = (),
    seconds: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """What a command with that `main` does there, given such arguments; of the file descriptors `unread` the reader has
    gone before anything is written. Raises AssertionError when it has not ended in so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        how = (cwd, Path(folder), {**os.environ}, unread)
        process = context().Process(target=_command, args=(main, arguments, *how), name=main.__module__)
        process.start()
        ended(process, seconds)
        said = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, process.exitcode or 0, *said)


def ended(process: ForkServerProcess, seconds: float = 300.0) -> None:
    """Waits for its end. Raises AssertionError, and ends it, when that does not come in so many seconds."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join(30)
        raise AssertionError(f"{process.name} had not ended after {seconds:g} s")


def begin(cwd: Path, said: Path) -> None:
    """In a process of its own: what it prints goes to `said/stdout` and `said/stderr`."""
    gc.freeze()  # what was imported is left alone by collections, one of which begins each timing
    os.setsid()  # as from a terminal: its Ctrl-C is sent to a group
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)


def _command(
    main: Callable[[], int | None],
    arguments: Sequence[str],
    cwd: Path,
    said: Path,
    environment: dict[str, str],
    unread: Sequence[int],
) -> None:
    begin(cwd, said)
    for number in unread:
        reading, writing = os.pipe()
        os.dup2(writing, number)
        os.close(reading)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [main.__module__, *arguments]
    sys.exit(main())
