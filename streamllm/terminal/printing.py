"""The commands' standard output, which may be a pipe that nobody reads to its end."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def tolerate() -> None:
    """Has stdout and stderr print a question mark for what the terminal's encoding lacks. Those that are closed (`>&-`)
    go nowhere: the next file opened would have their number, and be written into by libraries."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests have others
            with suppress(OSError):  # nobody reads it
                stream.reconfigure(errors="replace")


def say(content: str | bytes, stream: TextIO | None = None) -> None:
    """Writes a text and the end of its line, or bytes as they are, to stdout or the given stream, at once.

    Where the reader has gone (`| head`) it goes nowhere, like all that is written there from then on."""
    stream = sys.stdout if stream is None else stream
    try:
        if isinstance(content, bytes):
            stream.buffer.write(content)
            stream.flush()
        else:
            print(content, file=stream, flush=True)
    except BrokenPipeError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """From now on what is written to the stream, and what it still holds, goes nowhere. The interpreter flushes it at
    exit, and would complain if it could not."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
