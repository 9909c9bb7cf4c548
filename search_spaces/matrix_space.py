"""A matrix: every combination of settings that one study cannot vary, each a cell that is measured on its own.

`comprehensive.yaml` begins with the syntax.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from streamllm.errors import shown
from streamllm.options import DTYPES, PROTOCOLS
from streamllm.policy import TOTAL_KV_CAP, KvDtype, Positions
from streamllm.results.schema import FIELDS

from .knobs import CHECKS, LEAST, WORDS
from .reader import Reader, SpaceError, compose
from .space import Value

MEASURES = tuple(field.name for field in FIELDS.values() if field.mlflow == "metric" and not field.of_study)
"""Measures that a matrix's table can show."""
_TIMED = ("perplexity", "ppl_increase_percent", "runtime_sec", "runtime_change_percent", "tpot_ms", "speedup")
_COLUMNS = {
    "fast": ("perplexity", "ppl_increase_percent", "tpot_ms", "speedup"),
    "decode-loop": _TIMED,
    "chunked": _TIMED,
}
"""A table's measures by protocol, where a matrix does not say."""

_MOST_CELLS = 100_000
_LONGEST = 200
"""Bytes of a file's name, less `.json`: file systems take 255."""
_BASELINES = ("recompute", "dense")
_WORDS = {**WORDS, "protocol": tuple(PROTOCOLS), "dtype": DTYPES}
_AXES = ("dataset", *_WORDS, *LEAST)
_KEYS = (
    "description", "cap", "baseline", "max_eval_tokens", "file", "names", "columns", "configurations", "matrix",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The settings of one measurement; the defaults are what a matrix does not say."""

    dataset: str | None = None
    """None: the text of the command line."""
    configuration: str = ""
    """The name of an explicit one."""
    method: str = "ours"
    protocol: str = "fast"
    attn_backend: str = "auto"
    execution: str = "eager"
    dtype: str = "auto"
    quantization: str = "none"
    total_kv: int | None = None
    """None: the cap. The window is what it leaves, unless `window_size` is given."""
    n_sink: int = 4
    window_size: int | None = None
    compress_every: int = 1
    cache_slack: int = 0
    max_drop: int = 0
    positions: Positions = "compact"
    kv_dtype: KvDtype = "auto"
    layer_budgets: str = "uniform"


@dataclass(frozen=True, slots=True)
class Matrix:
    name: str
    description: str
    cap: int
    baseline: str
    """The method that all others are compared with, at a cell's own settings."""
    axes: Mapping[str, tuple[Value, ...]]
    configurations: tuple[Mapping[str, Value], ...] = ()
    """Named settings, which every point of the grid is combined with."""
    max_eval_tokens: Mapping[str, int] = field(default_factory=dict)
    """The tokens to evaluate by data set; under "" for all others."""
    file: str = ""
    """Name of the file with a cell's results, less `.json`; {axis} stands for the cell's value. Empty: every axis that
    varies."""
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Axis -> what stands in file names for some of its values."""
    columns: tuple[str, ...] = ()
    """Measures of the table; empty: what the protocol usually shows."""

    def cells(self) -> list[Cell]:
        """Every one once, the first axis varying slowest."""
        found = []
        for values in itertools.product(*self.axes.values()):
            point: dict[str, Any] = dict(zip(self.axes, values, strict=True))
            found += [Cell(**point | dict(one)) for one in self.configurations or ({},)]
        return list(dict.fromkeys(found))

    def varying(self) -> list[str]:
        """The fields that differ between cells."""
        cells = self.cells()
        return [f.name for f in fields(Cell) if len({getattr(cell, f.name) for cell in cells}) > 1]

    def stem(self, cell: Cell) -> str:
        """The name of the cell's file, less `.json`."""
        values = asdict(cell) | {"dataset": Path(cell.dataset or "text").name}
        words = {axis: self.names.get(axis, {}).get(str(value), str(value)) for axis, value in values.items()}
        return re.sub(r"[^\w.+-]", "_", (self.file or self._usual_file()).format_map(words))

    def tokens_of(self, dataset: str) -> int | None:
        """The number of tokens to evaluate of that text; None: all."""
        return self.max_eval_tokens.get(dataset, self.max_eval_tokens.get(""))

    def shown(self, protocol: str) -> tuple[str, ...]:
        """Measures of the table of that protocol."""
        return self.columns or _COLUMNS[protocol]

    def with_axis(self, axis: str, *values: Value) -> Matrix:
        """The matrix where the axis has these values; of several, files name theirs."""
        named = not self.file or len(values) == 1 or f"{{{axis}}}" in self.file
        file = self.file if named else f"{self.file}_{axis}-{{{axis}}}"
        return replace(self, axes={**self.axes, axis: values}, file=file)

    def _usual_file(self) -> str:
        parts = ["{configuration}"] if self.configurations else []
        for axis, values in self.axes.items():
            if len(values) > 1:
                parts.append(f"{axis}-{{{axis}}}" if axis in LEAST else f"{{{axis}}}")
        return "_".join(parts) or "{method}"


def is_matrix(name: str) -> bool:
    """Whether a space is one: it has the key `matrix`. Raises SpaceError."""
    _, node = compose(name)
    return isinstance(node, yaml.MappingNode) and any(key.value == "matrix" for key, _ in node.value)


def load_matrix(name: str) -> Matrix:
    """A shipped matrix by name, or a YAML file by path. Raises SpaceError."""
    path, node = compose(name)
    if node is None:
        raise SpaceError(f"{path}: empty; a matrix needs at least 'matrix'")
    return _MatrixReader(path).matrix(node)


class _MatrixReader(Reader):
    def matrix(self, node: yaml.Node) -> Matrix:
        entries = self.mapping(node, "the matrix file", _KEYS)
        if "matrix" not in entries:
            raise self.fail(node, "key 'matrix' is missing")
        grid = self.mapping(entries["matrix"], "matrix", _AXES)
        matrix = Matrix(
            name=self.path.stem,
            description=str(self.scalar(entries["description"])) if "description" in entries else "",
            cap=self.whole(entries["cap"], "cap", 1) if "cap" in entries else TOTAL_KV_CAP,
            baseline=self.word(entries["baseline"], "baseline", _BASELINES) if "baseline" in entries else "recompute",
            axes={name: self.values(name, axis) for name, axis in grid.items()},
            configurations=self.configurations(entries["configurations"], grid) if "configurations" in entries else (),
            max_eval_tokens=self.lengths(entries["max_eval_tokens"]) if "max_eval_tokens" in entries else {},
            file=self.file(entries["file"]) if "file" in entries else "",
            names=self.names(entries["names"]) if "names" in entries else {},
            columns=self.columns(entries["columns"]) if "columns" in entries else (),
        )
        count = math.prod(len(values) for values in matrix.axes.values()) * max(len(matrix.configurations), 1)
        if count > _MOST_CELLS:
            raise self.fail(entries["matrix"], f"{count} cells; give at most {_MOST_CELLS}, with fewer values")
        if conflict := next((c for c in matrix.cells() if c.window_size and c.total_kv), None):
            raise self.fail(
                entries["matrix"], f"window_size {conflict.window_size}, total_kv {conflict.total_kv}: give one of them"
            )
        self.check_files(matrix, entries.get("file", node))
        return matrix

    def values(self, name: str, node: yaml.Node) -> tuple[Value, ...]:
        entries = self.sequence(node, name) if isinstance(node, yaml.SequenceNode) else [node]
        values = tuple(self.value(name, entry) for entry in entries)
        if len(set(values)) < len(values):
            raise self.fail(node, f"{name}: a value is given twice")
        return values

    def value(self, name: str, node: yaml.Node) -> Value:
        if name in LEAST:
            return self.whole(node, name, LEAST[name])
        if name in CHECKS:
            return self.formed(node, name, CHECKS[name])
        if name in _WORDS:
            return self.word(node, name, _WORDS[name])
        return self.text(node, name)

    def file(self, node: yaml.Node) -> str:
        """Names stand in it and nothing else: a width, say, could be as large as memory."""
        pattern = self.text(node, "file")
        allowed = [f.name for f in fields(Cell)]
        try:
            parts = [(axis, bool(how or conversion)) for _, axis, how, conversion in Formatter().parse(pattern)]
        except ValueError:
            parts = [("", True)]
        if any(how or axis not in (None, *allowed) for axis, how in parts):
            raise self.fail(node, f"file {shown(pattern)}: may name {{{'}, {'.join(allowed)}}}")
        return pattern

    def configurations(self, node: yaml.Node, grid: Mapping[str, yaml.Node]) -> tuple[Mapping[str, Value], ...]:
        found = []
        for entry in self.sequence(node, "configurations"):
            given = self.mapping(entry, "a configuration", ("name", *_AXES))
            if "name" not in given:
                raise self.fail(entry, "a configuration needs a name")
            if twice := next((name for name in given if name in grid), None):
                raise self.fail(given[twice], f"{twice}: is an axis of the matrix, a configuration cannot set it too")
            values = {name: self.value(name, value) for name, value in given.items() if name != "name"}
            found.append({"configuration": self.text(given["name"], "name"), **values})
        return tuple(found)

    def lengths(self, node: yaml.Node) -> dict[str, int]:
        if not isinstance(node, yaml.MappingNode):
            return {"": self.whole(node, "max_eval_tokens", 2)}
        lengths = self.by_word(node, "max_eval_tokens")
        return {name: self.whole(value, f"max_eval_tokens of {name[:60]}", 2) for name, value in lengths.items()}

    def names(self, node: yaml.Node) -> dict[str, dict[str, str]]:
        axes = self.mapping(node, "names", _AXES)
        return {
            axis: {value: str(self.scalar(word)) for value, word in self.by_word(words, f"names of {axis}").items()}
            for axis, words in axes.items()
        }

    def columns(self, node: yaml.Node) -> tuple[str, ...]:
        entries = self.sequence(node, "columns")
        return tuple(self.word(entry, "columns", MEASURES) for entry in entries)

    def check_files(self, matrix: Matrix, node: yaml.Node) -> None:
        """Every cell has a file of its own, by a name that a file can have."""
        stems = Counter(matrix.stem(cell) for cell in matrix.cells())
        longest = max(stems, key=lambda stem: len(stem.encode(errors="replace")))
        if (size := len(longest.encode(errors="replace"))) > _LONGEST:
            raise self.fail(node, f"file {shown(longest)}: {size} bytes long; use at most {_LONGEST}")
        stem, count = stems.most_common(1)[0]
        if count > 1:
            raise self.fail(
                node, f"file {shown(stem)}: {count} cells have it; name all of {', '.join(matrix.varying())}"
            )
