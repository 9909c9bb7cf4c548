"""Damaged files of a study: what can still be read of them, what is wrong, and how they are kept aside.

What is wrong is a sentence without its end that names file and line.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UsageError
from ..terminal.printing import say
from .schema import NewerFormatError

T = TypeVar("T")
AGAIN = "the sweep's command, given again, makes it anew"


class DamagedError(UsageError):
    """A file without which a study cannot be read."""


def parsed(content: bytes) -> Any:
    """What JSON says. Raises ValueError, RecursionError; for halves of characters too, which JSON can say and nobody
    write."""
    value = json.loads(content.decode())
    if b"\\ud" in content.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path, parse: Callable[[object], T]) -> T:
    """What `parse` makes of the JSON in a file; it raises ValueError for what is none of its own. Raises DamagedError,
    for a file that is not there too."""
    try:
        return parse(parsed(path.read_bytes()))
    except OSError as error:
        raise DamagedError(f"{path}: {_cannot(error)}") from None
    except json.JSONDecodeError as error:
        raise DamagedError(f"{path}, line {error.lineno}: no JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: {_reason(error)}") from None


def read_lines(path: Path, parse: Callable[[object], T]) -> tuple[dict[int, T], list[str]]:
    """What `parse` makes of each line of a JSON-lines file that has its end, by number, counted from 1; and what is
    wrong with the others, which it raises ValueError for. A last line without its end is being written, or was when the
    sweep was killed: it is none. Nor is anything wrong with a file that is not there.

    Raises NewerFormatError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        return {}, [f"{path}: {_cannot(error)}"] if path.is_symlink() else []
    except OSError as error:
        return {}, [f"{path}: {_cannot(error)}"]
    found: dict[int, T] = {}
    wrong = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            found[number] = parse(parsed(line))
        except NewerFormatError as error:
            raise NewerFormatError(f"{path}, line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            wrong.append(f"{path}, line {number}: {_reason(error)}")
    return found, wrong


def all_told(wrong: Sequence[str]) -> str:
    """The first, and how many more there are."""
    more = len(wrong) - 1
    return wrong[0] + (f", and {more} more line{'s' * (more > 1)} of it" if more else "")


def keep_aside(path: Path, wrong: Sequence[str], instead: str) -> None:
    """Takes what is damaged out of the way, and says so in a line. instead: what takes its place. Raises UsageError."""
    aside = f"; the damaged one is kept as {_renamed(path)}" if os.path.lexists(path) else ""
    say(f"warning: {all_told(wrong)}; {instead}{aside}", sys.stderr)


def _renamed(path: Path) -> str:
    names = (f"{path.name}.damaged-{number}" for number in itertools.count(1))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    try:
        path.rename(aside)
    except OSError as error:
        why = f"cannot be renamed ({error.strerror})"
        raise UsageError(f"{path}: damaged, and {why}; make its folder writable") from None
    return aside.name


def _cannot(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "no UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON ({error.msg})"
    return "too deeply nested" if isinstance(error, RecursionError) else " ".join(str(error).split())
