"""Damage to what was right: to bytes, to trees of JSON or YAML, to the arguments of a command."""

from __future__ import annotations

import math
import random
import re
from copy import deepcopy
from typing import Any

NUMBERS = (
    -1, 0, 1, 2, 3, 7, 2**24, 2**31, 2**32, 2**63 - 1, 2**63, 10**12, 10**30, 0.5, -0.0, 1e300, math.inf, math.nan,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "-1", "x", "1e5", "1e400", "0x10", "0o17", "1_000", "nan", "inf", "true", "null", "~", "٣", "²",
    "a\nb", "a\0b", "\x07", "é", "\ufeff", "\u202e", "🙂", "2024-13-45", "2024-12-31", "12:30:45", "x" * 300,
    "y" * 5000, "9" * 40, "9" * 5000, "/", ".", "..", "../" * 30, "/dev/null", "/dev/null/a", "/proc/self/mem",
    "{method}", "{0}", "%s", "none", "auto", "all", "speedup >= 2", "*a", "&a", "!!python/object:os.system", "!foo",
    "<<", "=", "testbed",
)  # fmt: skip
BYTES = (
    b"\0", b"\0" * 64, b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\x80", b"\r\n", b"\t", b"[" * 3000, b"{" * 3000,
    b'"', b"'", b"\\", b"- " * 300, b"9" * 5000, b"-", b"1e999", b"NaN", b"!!python/name:os.system ", b"!x ", b"&a ",
    b"*a", b"? ", b": ", b"<<: ", b"%TAG ! x\n---\n", b"---\n", b"|\n", b"#", b"null", b"true", b"[]", b"{}", b",",
    b"}", b"]",
)  # fmt: skip


def odd_value(chance: random.Random) -> Any:
    """Of any kind that JSON and YAML have."""
    kind = chance.randrange(6)
    if kind == 0:
        return None
    if kind == 1:
        return chance.choice((True, False))
    if kind == 2:
        return chance.choice(NUMBERS)
    if kind == 3:
        return chance.choice(TEXTS)
    inner = [odd_value(chance) for _ in range(chance.randrange(4))] if chance.random() < 0.5 else []
    if kind == 4:
        for _ in range(chance.choice((0, 0, 1, 3, 60))):
            inner = [inner]
        return inner
    return {str(odd_word(chance)): value for value in inner}


def odd_word(chance: random.Random) -> str:
    return chance.choice(TEXTS)


def damaged_bytes(chance: random.Random, content: bytes) -> bytes:
    """With one to four injuries."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        to = min(to, at + chance.choice((1, 4, 30, len(content))))
        kind = chance.randrange(6)
        if kind == 0:
            content = content[:at]
        elif kind == 1 and content:
            flipped = content[at : at + 1] or b"\0"
            content = content[:at] + bytes([flipped[0] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
        elif kind == 2:
            content = content[:at] + content[to:]
        elif kind == 3:
            content = content[:at] + chance.choice(BYTES) + content[at:]
        elif kind == 4:
            content = content[:to] + content[at:to] * chance.choice((1, 2, 50)) + content[to:]
        else:
            content = _with_another_word(chance, content)
        content = content[: 2**21]
    return content


def _with_another_word(chance: random.Random, content: bytes) -> bytes:
    words = list(re.finditer(rb"[\w.-]+", content))
    if not words:
        return content
    word = chance.choice(words)
    value = odd_word(chance) if chance.random() < 0.5 else repr(chance.choice(NUMBERS))
    return content[: word.start()] + value.encode() + content[word.end() :]


def damaged_tree(chance: random.Random, tree: Any) -> Any:
    """With one to three of its parts replaced, left out, doubled, renamed or nested deeper."""
    tree = deepcopy(tree)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        holders = list(_holders(tree))
        if not holders:
            return odd_value(chance)
        holder, key = chance.choice(holders)
        _injure(chance, holder, key)
    return odd_value(chance) if chance.random() < 0.02 else tree


def _holders(tree: Any) -> Any:
    """Every (container, key or index) in the tree."""
    inner = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in inner:
        yield tree, key
        yield from _holders(value)


def _injure(chance: random.Random, holder: Any, key: Any) -> None:
    kind = chance.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[odd_word(chance)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * chance.choice((1, 2, 200)))
    elif kind == 3:
        holder[key] = [holder[key]]
    elif kind == 4:
        holder[key] = {odd_word(chance): holder[key]}
    elif kind == 5 and isinstance(holder[key], int | float):
        holder[key] = chance.choice(NUMBERS)
    elif kind == 6 and isinstance(holder[key], int | float):
        holder[key] = str(holder[key])
    else:
        holder[key] = odd_value(chance)
