"""The measurement store: every finished measurement, under a name that says everything that determined it.

It is at once the cache that stops duplicates, the baseline that is run once and reused, and what survives a killed
sweep. Entries are JSON files written atomically; a measurement's losses lie beside it as .npy, its other arrays, which
may be large, as .npz: both are written first.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..engine.methods import module_of
from ..errors import UsageError
from ..files import Json, write_atomically

MEASURING_CODE = (
    "configuration",
    "engine.architecture",
    "engine.attention",
    "engine.backends",
    "engine.block_parallel",
    "engine.block_state",
    "engine.cpu_kernels",
    "engine.decoder",
    "engine.decoding",
    "engine.device",
    "engine.energy",
    "engine.execution",
    "engine.experts",
    "engine.gguf",
    "engine.gguf_header",
    "engine.layered",
    "engine.layers",
    "engine.loading",
    "engine.methods",
    "engine.methods.kvpress",
    "engine.methods.mit",
    "engine.methods.ours",
    "engine.methods.ring",
    "engine.model",
    "engine.plain_forward",
    "engine.probing",
    "engine.quantization",
    "engine.rotary",
    "engine.rounded_blocks",
    "engine.slots",
    "engine.softmax",
    "engine.triton_attention",
    "engine.triton_ring",
    "engine.weight_files",
    "environment",
    "errors",
    "files",
    "layer_budgets",
    "libraries",
    "measuring.bench",
    "measuring.chunked",
    "measuring.conditions",
    "measuring.divergence",
    "measuring.done",
    "measuring.energy",
    "measuring.evaluation",
    "measuring.first_token",
    "measuring.hits",
    "measuring.jobs",
    "measuring.keys",
    "measuring.pairing",
    "measuring.plans",
    "measuring.quality",
    "measuring.sample",
    "measuring.store",
    "measuring.tables",
    "measuring.text",
    "measuring.timing",
    "options",
    "policy",
    "testbed",
)
"""The modules of this package that determine a number: those that load, evaluate and time, whatever they import, the
reference's method, and methods that others are made of. A test holds them to the imports. Not the package itself, which
is its version; nor the words that a configuration is shown in (`results.schema`)."""

KERNELS = Path(__file__).parent.parent / "engine" / "cpu"
"""Where those of its C++ are."""

Arrays = Mapping[str, np.ndarray]
"""A measurement's arrays besides its losses, by name."""


class StoreError(UsageError):
    """The store could not be written; the message names the folder, the reason and what to do."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A flat record, and per-token losses (n, 2: position, nats) where there are any; of hits (n, 3: position, nats,
    1 or 0)."""

    record: dict[str, Any]
    losses: np.ndarray | None = None
    arrays: Arrays | None = None
    """Others; not of what the store found, which reads them by themselves."""
    has_arrays: bool = False
    """Whether the store has them."""

    def without_arrays(self) -> Measurement:
        """As the store would find it."""
        return self if self.arrays is None else replace(self, arrays=None, has_arrays=True)


class MeasurementStore:
    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: Mapping[str, object], with_arrays: bool = False) -> Measurement | None:
        """The measurement of that key, its `arrays` unread; a damaged entry is kept aside as `.damaged` and counts as
        missing. with_arrays: so does one that has none, or whose arrays somebody has removed."""
        path = self._path(key)
        try:
            entry = json.loads(path.read_bytes())
            has_arrays = "arrays_digest" in entry and path.with_suffix(".npz").exists()
            losses = path.with_suffix(".npy").read_bytes() if entry["has_losses"] else b""
            if entry["digest"] != _digest(entry["record"], losses):
                raise ValueError("not what was written")
            table = np.load(io.BytesIO(losses), allow_pickle=False) if entry["has_losses"] else None
            found = Measurement(entry["record"], table, has_arrays=has_arrays)
            return found if has_arrays or not with_arrays else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            with suppress(OSError):  # another worker was first; what cannot be moved, cannot be written either
                path.rename(path.with_suffix(".damaged"))
            return None

    def put(self, key: Mapping[str, object], measurement: Measurement) -> None:
        """Raises StoreError, and leaves nothing half-written behind."""
        path = self._path(key)
        losses = arrays = b""
        if measurement.losses is not None:
            buffer = io.BytesIO()
            np.save(buffer, measurement.losses, allow_pickle=False)
            losses = buffer.getvalue()
        if measurement.arrays is not None:
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **measurement.arrays)
            arrays = buffer.getvalue()
        entry = {
            "key": key,
            "record": measurement.record,
            "has_losses": measurement.losses is not None,
            "digest": _digest(measurement.record, losses),
            **({"arrays_digest": hashlib.sha256(arrays).hexdigest()} if arrays else {}),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if arrays:
                write_atomically(path.with_suffix(".npz"), arrays)
            if losses:
                write_atomically(path.with_suffix(".npy"), losses)
            write_atomically(path, json.dumps(entry, indent=1).encode())
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written ({error.strerror}): make room there, then give the same "
                f"command again; what is finished is kept"
            ) from error

    def key(self, name: str) -> dict[str, Json] | None:
        """All that determined the entry of that name; None if it is not there, or is damaged."""
        try:
            key: Json = json.loads(self.losses_file(name).with_suffix(".json").read_bytes())["key"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return key if isinstance(key, dict) else None

    def losses_file(self, name: str) -> Path:
        """Where the per-token losses of the entry of that name lie, if it has any."""
        return self.root / name[:2] / f"{name}.npy"

    def losses(self, name: str) -> np.ndarray:
        """(n, 2): position, nats. Raises OSError if there are none, or they are damaged."""
        path = self.losses_file(name)
        try:
            table: np.ndarray = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise OSError(f"{path}: damaged") from error
        return table

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The other arrays of the entry of that name. Raises StoreError if they are gone, or are not what was written:
        they are then kept aside, and count as missing."""
        path = self.losses_file(name).with_suffix(".npz")
        try:
            content = path.read_bytes()
            entry = json.loads(path.with_suffix(".json").read_bytes())
            if entry["arrays_digest"] != hashlib.sha256(content).hexdigest():
                raise ValueError("not what was written")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, BadZipFile) as error:
            with suppress(OSError):
                path.rename(path.with_suffix(".npz.damaged"))
            raise StoreError(
                f"{path}: damaged, or removed while it was needed; give the same command again, it is then measured "
                f"anew"
            ) from error

    def _path(self, key: Mapping[str, object]) -> Path:
        return self.losses_file(entry_name(key)).with_suffix(".json")


def entry_name(key: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


@cache
def code_digest(*methods: str) -> str:
    """Names the code that determines a number, that of the given methods included: results of different code are
    different measurements. Comments, docstrings and layout are no code."""
    modules = digest_of_modules(*sorted({*MEASURING_CODE, *map(module_of, methods)}))
    kernels = [path.read_text(encoding="utf-8") for path in sorted(KERNELS.iterdir()) if path.suffix in (".h", ".cpp")]
    words = [word for text in kernels for word in re.sub("//.*", "", text).split()]
    return hashlib.sha256(" ".join((modules, *words)).encode()).hexdigest()[:16]


def digest_of_modules(*modules: str) -> str:
    """As `code_digest`, of these."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(f"{module}\n{_code(_source(module).read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def _source(module: str) -> Path:
    path = Path(__file__).parent.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _code(source: str) -> str:
    """The code in the source: without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def _digest(record: dict[str, Any], losses: bytes) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode() + losses).hexdigest()
