"""Reads YAML node by node, and explains what is wrong with a file: its name, the line, the key, what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml

from streamllm.errors import UsageError

T = TypeVar("T")

FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
"""Search spaces and matrices."""


class SpaceError(UsageError):
    """A space that does not exist or says something that cannot be meant; the message names file, line and key."""


def compose(name: str) -> tuple[Path, yaml.Node | None]:
    """The file and its content, of a shipped space by name, or of a YAML file by path. Raises SpaceError."""
    path = FOLDER / f"{name}.yaml" if name in SHIPPED else Path(name)
    if not path.is_file():
        raise SpaceError(f"space {name!r}: neither a file nor one of {', '.join(SHIPPED)}")
    try:
        return path, yaml.compose(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpaceError(f"{path}: not YAML ({' '.join(str(error).split())})") from error


class Reader:
    """Turns YAML nodes into values, knowing the line each came from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, node: yaml.Node, message: str) -> SpaceError:
        return SpaceError(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def mapping(self, node: yaml.Node, what: str, allowed: Sequence[str]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping of {', '.join(allowed)}")
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if key.value not in allowed:
                raise self.fail(key, f"unknown key {key.value!r} in {what}; allowed: {', '.join(allowed)}")
            if key.value in entries:
                raise self.fail(key, f"key {key.value!r} is given twice in {what}")
            entries[key.value] = value
        return entries

    def sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail(node, f"{what} must be a list of at least one entry")
        return list(node.value)

    def scalar(self, node: yaml.Node) -> object:
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node, "a single value is expected here")
        return yaml.safe_load(yaml.serialize(node))

    def whole(self, node: yaml.Node, key: str, least: int) -> int:
        value = self.scalar(node)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fail(node, f"{key} {value!r}: must be a whole number >= {least}")
        return value

    def word(self, node: yaml.Node, key: str, allowed: Sequence[T]) -> T:
        value = self.scalar(node)
        for word in allowed:
            if word == value:
                return word
        raise self.fail(node, f"{key} {value!r}: must be one of {', '.join(map(str, allowed))}")
