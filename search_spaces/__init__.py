"""Declarative search spaces: YAML files, in this folder or anywhere, and a loader that explains what is wrong with one.

A parameter is a list of choices, a range of whole numbers `{low, high, step}`, or a single fixed value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streamllm.backends import BACKENDS
from streamllm.errors import UsageError
from streamllm.methods import METHODS
from streamllm.options import EXECUTIONS
from streamllm.policy import CapAccounting

FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))

OBJECTIVES = {
    "tpot_ms": "minimize",
    "speedup": "maximize",
    "perplexity": "minimize",
    "ppl_increase_percent": "minimize",
    "peak_kv": "minimize",
}
"""What a sweep can optimise, and which way."""

# Parameter -> the words it may take, or (None) whole numbers from 0.
_PARAMETERS: dict[str, tuple[str, ...] | None] = {
    "method": METHODS,
    "attn_backend": tuple(BACKENDS),
    "execution": EXECUTIONS,
    "n_sink": None,
    "compress_every": None,
    "cache_slack": None,
    "max_drop": None,
}
_DEFAULTS: dict[str, str | int] = {
    "method": "ours",
    "attn_backend": "auto",
    "execution": "eager",
    "n_sink": 4,
    "compress_every": 1,
    "cache_slack": 0,
    "max_drop": 0,
}
_KEYS = ("description", "cap", "cap_accounting", "objectives", "parameters", "known")
_ACCOUNTINGS: tuple[CapAccounting, ...] = ("nominal", "peak")

Value = str | int


class SpaceError(UsageError):
    """A space that does not exist or says something that cannot be meant; the message names file, line and key."""


@dataclass(frozen=True, slots=True)
class SearchSpace:
    name: str
    description: str
    cap: int
    cap_accounting: CapAccounting
    objectives: tuple[str, ...]
    parameters: Mapping[str, tuple[Value, ...]]
    """Every parameter with its choices in order; a fixed one has one."""
    known: tuple[Mapping[str, Value], ...]
    """Complete configurations to try first."""

    @property
    def size(self) -> int:
        return math.prod(len(choices) for choices in self.parameters.values())


def load_space(name: str) -> SearchSpace:
    """A shipped space by name, or a YAML file by path. Raises SpaceError."""
    path = FOLDER / f"{name}.yaml" if name in SHIPPED else Path(name)
    if not path.is_file():
        raise SpaceError(f"space {name!r}: neither a file nor one of {', '.join(SHIPPED)}")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpaceError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    return _Reader(path).space(node)


class _Reader:
    """Turns YAML nodes into values, knowing the line each came from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, node: yaml.Node, message: str) -> SpaceError:
        return SpaceError(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def space(self, node: yaml.Node | None) -> SearchSpace:
        if node is None:
            raise SpaceError(f"{self.path}: empty; a space needs at least 'parameters'")
        entries = self.mapping(node, "the space", _KEYS)
        if "parameters" not in entries:
            raise self.fail(node, "key 'parameters' is missing")
        parameters = self.parameters(entries["parameters"])
        return SearchSpace(
            name=self.path.stem,
            description=str(self.scalar(entries["description"])) if "description" in entries else "",
            cap=self.whole(entries["cap"], "cap", 1) if "cap" in entries else 2048,
            cap_accounting=self.word(entries, "cap_accounting", _ACCOUNTINGS, "nominal"),
            objectives=self.objectives(entries.get("objectives")),
            parameters=parameters,
            known=self.known(entries.get("known"), parameters),
        )

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

    def scalar(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.fail(node, "a single value is expected here")
        return yaml.safe_load(yaml.serialize(node))

    def whole(self, node: yaml.Node, key: str, least: int) -> int:
        value = self.scalar(node)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fail(node, f"{key} {value!r}: must be a whole number >= {least}")
        return value

    def word(self, entries: dict[str, yaml.Node], key: str, allowed: Sequence[Any], default: Any) -> Any:
        if key not in entries:
            return default
        value = self.scalar(entries[key])
        if value not in allowed:
            raise self.fail(entries[key], f"{key} {value!r}: must be one of {', '.join(allowed)}")
        return value

    def objectives(self, node: yaml.Node | None) -> tuple[str, ...]:
        if node is None:
            return ("tpot_ms", "ppl_increase_percent")
        values = [self.scalar(entry) for entry in self.sequence(node, "objectives")]
        for entry, value in zip(node.value, values, strict=True):
            if value not in OBJECTIVES:
                raise self.fail(entry, f"objective {value!r}: must be one of {', '.join(OBJECTIVES)}")
        if len(values) not in (2, 3) or len(set(values)) < len(values):
            raise self.fail(node, "objectives: give two or three different ones")
        return tuple(values)

    def parameters(self, node: yaml.Node) -> dict[str, tuple[Value, ...]]:
        entries = self.mapping(node, "parameters", tuple(_PARAMETERS))
        return {
            name: self.choices(name, entries[name]) if name in entries else (_DEFAULTS[name],) for name in _PARAMETERS
        }

    def choices(self, name: str, node: yaml.Node) -> tuple[Value, ...]:
        if isinstance(node, yaml.SequenceNode):
            values = tuple(self.value(name, entry) for entry in self.sequence(node, name))
            if len(set(values)) < len(values):
                raise self.fail(node, f"{name}: a choice is given twice")
            return values
        if isinstance(node, yaml.MappingNode) and _PARAMETERS[name] is None:
            limits = self.mapping(node, f"the range of {name}", ("low", "high", "step"))
            if not {"low", "high"} <= limits.keys():
                raise self.fail(node, f"{name}: a range needs low and high")
            low, high = (self.whole(limits[end], f"{name} {end}", 0) for end in ("low", "high"))
            step = self.whole(limits["step"], f"{name} step", 1) if "step" in limits else 1
            if low > high:
                raise self.fail(node, f"{name}: low {low} is above high {high}")
            return tuple(range(low, high + 1, step))
        return (self.value(name, node),)

    def value(self, name: str, node: yaml.Node) -> Value:
        words = _PARAMETERS[name]
        if words is None:
            return self.whole(node, name, 0)
        value = self.scalar(node)
        if value not in words:
            raise self.fail(node, f"{name} {value!r}: must be one of {', '.join(words)}")
        return str(value)

    def known(self, node: yaml.Node | None, parameters: dict[str, tuple[Value, ...]]) -> tuple[dict[str, Value], ...]:
        configurations = []
        for entry in self.sequence(node, "known") if node is not None else []:
            given = self.mapping(entry, "a known configuration", tuple(_PARAMETERS))
            for name, value in given.items():
                if self.value(name, value) not in parameters[name]:
                    allowed = ", ".join(map(str, parameters[name]))
                    raise self.fail(value, f"known {name} {self.scalar(value)!r} is not among its choices: {allowed}")
            configurations.append(
                {
                    name: self.value(name, given[name]) if name in given else choices[0]
                    for name, choices in parameters.items()
                }
            )
        return tuple(configurations)
