"""A GGUF file's header, walked through: the library would follow any count in it, for minutes and gigabytes."""

from __future__ import annotations

import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type's number."""
_STRING, _ARRAY = 8, 9
_DEEPEST = 4
_MOST = 5_000_000
"""Values, tensors, or texts in a list: many times those of any model."""


def check_header(file: Path) -> None:
    """Raises OSError, ValueError if something that it announces is not in the file. One for other processors, whose
    numbers are turned round, is left to the library."""
    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
        _walk(content)


def _walk(content: mmap) -> None:
    if len(content) < 24 or content[:4] != b"GGUF":
        raise ValueError("it does not begin with a GGUF header")
    version, tensors, values = struct.unpack_from("<IQQ", content, 4)
    if version & 0xFFFF == 0:
        return
    at = 24
    for _ in range(_possible(values)):
        at = _after_string(content, at)
        at = _after_value(content, at + 4, _number(content, at, 4))
    for _ in range(_possible(tensors)):
        at = _after_string(content, at)
        at += 4 + 8 * _number(content, at, 4) + 4 + 8
        _number(content, at - 1, 1)


def _possible(count: int) -> int:
    if count > _MOST:
        raise ValueError(f"its header announces {count} things of a kind")
    return count


def _number(content: mmap, at: int, size: int) -> int:
    if not 0 <= at <= len(content) - size:
        raise ValueError(f"its header ends in byte {len(content)} and goes on to {at + size}")
    return int.from_bytes(content[at : at + size], "little")


def _after_string(content: mmap, at: int) -> int:
    end = at + 8 + _number(content, at, 8)
    if end > len(content):
        raise ValueError(f"a text in its header is {end - at - 8} bytes long, more than there are")
    return end


def _after_value(content: mmap, at: int, kind: int, depth: int = 0) -> int:
    if kind == _STRING:
        return _after_string(content, at)
    if kind in _SIZES:
        _number(content, at, _SIZES[kind])
        return at + _SIZES[kind]
    if kind != _ARRAY or depth == _DEEPEST:
        raise ValueError(f"a value in its header is of a kind {kind} that there is not")
    kind, count, at = _number(content, at, 4), _number(content, at + 4, 8), at + 12
    if kind in _SIZES:
        end = at + count * _SIZES[kind]
        _number(content, end - 1, 1)
        return end
    for _ in range(_possible(count)):
        at = _after_value(content, at, kind, depth + 1)
    return at
