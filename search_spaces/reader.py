"""Reads YAML node by node, and explains what is wrong with a file: its name, the line, the key, what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import yaml

from streamllm.errors import UsageError, reason_of, shown

T = TypeVar("T")

FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
"""Search spaces and matrices."""


class SpaceError(UsageError):
    """A space that does not exist or says something that cannot be meant; the message names file, line and key."""


_MOST_BYTES = 2**18
"""Of a file: of as many, YAML takes seconds."""
MOST = 2**63 - 1
"""Of a whole number: beyond it neither a study's journal nor a table could hold it."""

_YAML = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float", "str", "binary", "timestamp")


def compose(name: str) -> tuple[Path, yaml.Node | None]:
    """The file and its content, of a shipped space by name, or of a YAML file by path. Raises SpaceError."""
    path = FOLDER / f"{name}.yaml" if name in SHIPPED else Path(name)
    try:
        if not path.is_file():
            raise FileNotFoundError
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except PermissionError as error:
        raise SpaceError(f"{path}: cannot be read ({error.strerror}); let yourself read it") from error
    except (OSError, ValueError) as error:  # of a name too long for a file, or one with a NUL
        raise SpaceError(f"space {shown(name)}: neither a file nor one of {', '.join(SHIPPED)}") from error
    if len(content) > _MOST_BYTES:
        raise SpaceError(f"{path}: more than {_MOST_BYTES // 2**10} KiB; give the YAML file of a space")
    try:
        return path, yaml.compose(content.decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise SpaceError(f"{path}: not UTF-8 ({error.reason} in byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise SpaceError(f"{path}: not YAML ({' '.join(str(error).split())[:300]})") from error
    except RecursionError as error:
        raise SpaceError(f"{path}: nested too deeply; a space has a few levels") from error


class Reader:
    """Turns YAML nodes into values, knowing the line each came from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, node: yaml.Node, message: str) -> SpaceError:
        return SpaceError(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def mapping(self, node: yaml.Node, what: str, allowed: Sequence[str]) -> dict[str, yaml.Node]:
        entries = {}
        for key, value in self.entries(node, what, allowed):
            if key.value not in allowed:
                raise self.fail(key, f"unknown key {shown(key.value)} in {what}; allowed: {', '.join(allowed)}")
            if key.value in entries:
                raise self.fail(key, f"key {key.value!r} is given twice in {what}")
            entries[key.value] = value
        return entries

    def by_word(self, node: yaml.Node, what: str) -> dict[str, yaml.Node]:
        """A mapping of any words."""
        found = {}
        for key, value in self.entries(node, what, ("words",)):
            self.scalar(key)
            if key.value in found:
                raise self.fail(key, f"key {shown(key.value)} is given twice in {what}")
            found[str(key.value)] = value
        return found

    def entries(self, node: yaml.Node, what: str, allowed: Sequence[str]) -> list[tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping of {', '.join(allowed)}")
        self.check_tag(node, "map")
        return list(node.value)

    def sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail(node, f"{what} must be a list of at least one entry")
        self.check_tag(node, "seq")
        return list(node.value)

    def check_tag(self, node: yaml.Node, usual: str) -> None:
        if node.tag != _YAML + usual:
            raise self.fail(node, f"{_tag(node)}: a tag that means nothing here; leave it out")

    def scalar(self, node: yaml.Node) -> object:
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node, "a single value is expected here")
        kind = node.tag.removeprefix(_YAML)
        if kind not in _SCALARS:
            raise self.fail(node, f"{_tag(node)}: a tag that means nothing here; leave it out")
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](yaml.SafeLoader(""), node)
        except (yaml.YAMLError, ValueError, LookupError, OverflowError) as error:  # a 13th month, thousands of digits
            raise self.fail(node, f"{shown(node.value)}: not a value ({kind}: {reason_of(error, 100)})") from error

    def whole(self, node: yaml.Node, key: str, least: int) -> int:
        value = self.scalar(node)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
            most = f"from {least} to 2^63 - 1" if isinstance(value, int) and value > MOST else f">= {least}"
            raise self.fail(node, f"{key} {shown(value)}: must be a whole number {most}")
        return value

    def text(self, node: yaml.Node, key: str) -> str:
        value = self.scalar(node)
        if value is None or value == "":
            raise self.fail(node, f"{key} {value!r}: must be a word or more; leave it out if there is none")
        return str(value)

    def formed(self, node: yaml.Node, key: str, check: Callable[[str], None]) -> str:
        """check: raises UsageError for what is no such word."""
        value = self.text(node, key)
        try:
            check(value)
        except UsageError as error:
            raise self.fail(node, str(error)) from None
        return value

    def word(self, node: yaml.Node, key: str, allowed: Sequence[T]) -> T:
        value = self.scalar(node)
        for word in allowed:
            if word == value:
                return word
        raise self.fail(node, f"{key} {shown(value)}: must be one of {_listed(str(value), list(map(str, allowed)))}")


def _listed(given: str, words: list[str]) -> str:
    """All, or of many those that are spelled most like it."""
    if len(words) <= _MANY:
        return ", ".join(words)
    near = get_close_matches(given, words, _MANY // 4, cutoff=0.0)
    return f"{', '.join(near)} or {len(words) - len(near)} others"


_MANY = 32


def _tag(node: yaml.Node) -> str:
    return shown(node.tag.replace(_YAML, "!!"))
