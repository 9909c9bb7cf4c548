"""Our kernels for CPUs ([cpu/](cpu/)) as operators of torch: one query's attention, a matrix times a vector.

The machine's C++ compiler makes them, as compiled steps need one anyway: once for a kind of processor and a version of
torch, in half a minute, kept in `cache_folder`.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..environment import cache_folder
from ..errors import reason_of
from .softmax import Softmax

SOURCES = Path(__file__).with_name("cpu")
_FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-shared", "-fPIC")
_BUILD_SEC = 600

_OPERATORS = torch.library.Library("streamllm", "FRAGMENT")
_OPERATORS.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, float scaling, float cap) "
    "-> Tensor"
)
_OPERATORS.define("matrix_vector(Tensor weight, Tensor vector) -> Tensor")


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softmax: Softmax
) -> Tensor:
    """As `attention`, of one query, in float32; keys and values are read as they are kept: in float32, float16,
    bfloat16 or float8_e4m3fn.

    Raises RuntimeError, as torch's kernels do, for other number formats, and where the kernels cannot be built."""
    load_kernels()
    sinks = None if softmax.sinks is None else softmax.sinks.float()
    given = (query.float(), key, value, mask, sinks)
    parts = (x if x is None else x.contiguous() for x in given)
    output: Tensor = torch.ops.streamllm.decode_attention(*parts, scaling, softmax.cap or 0.0)
    return output.to(query.dtype)


def matrix_vector(weight: Tensor, vector: Tensor) -> Tensor:
    """weight (out, in) in float32, float16, bfloat16 or int8, vector (in) -> weight @ vector (out) in float32.
    Raises RuntimeError as `decode_attention`."""
    load_kernels()
    output: Tensor = torch.ops.streamllm.matrix_vector(weight, vector.float())
    return output


@torch.library.register_fake("streamllm::decode_attention", lib=_OPERATORS)
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.register_fake("streamllm::matrix_vector", lib=_OPERATORS)
def _(weight: Tensor, vector: Tensor) -> Tensor:
    return vector.new_empty(weight.shape[0])


@cache
def has_kernels() -> bool:
    """Whether they can be built here, or are."""
    try:
        load_kernels()
    except RuntimeError:
        return False
    return True


@torch.compiler.assume_constant_result
def load_kernels() -> None:
    """Raises RuntimeError."""
    _loaded()


@cache
def _loaded() -> None:
    library = _library()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # a folder from which nothing may be run
        raise RuntimeError(f"{library}: {reason_of(error)}; set STREAMLLM_CACHE to another folder") from error


def _library() -> Path:
    """Found or made. Raises RuntimeError."""
    compiler = _compiler()
    sources = sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp"))
    what = "\0".join((*(source.read_text() for source in sources), _target(compiler), torch.__version__, *_FLAGS))
    library = cache_folder() / "cpu" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.so"
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one builds
            if not library.is_file():
                _build(compiler, library)
    except OSError as error:
        fix = "set STREAMLLM_CACHE to a folder that can be written to"
        raise RuntimeError(f"{library.parent}: {reason_of(error)}; {fix}") from error
    return library


def _build(compiler: str, library: Path) -> None:
    """Raises OSError, RuntimeError."""
    from torch.utils.cpp_extension import include_paths, library_paths

    print("our kernels for this kind of CPU are being compiled, once; takes half a minute", file=sys.stderr, flush=True)
    headers = (f"-I{path}" for path in include_paths())
    libraries = (f"-L{path}" for path in library_paths())
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        source = str(SOURCES / "operators.cpp")
        said = _run(compiler, *_FLAGS, *headers, source, *libraries, "-ltorch_cpu", "-lc10", "-o", str(made))
        if not made.is_file():
            wrong = next((line for line in said.splitlines() if "error" in line), said.strip() or "without a word")
            raise RuntimeError(f"{compiler} does not compile our kernels: {wrong}")
        made.replace(library)


def _compiler() -> str:
    """Raises RuntimeError."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise RuntimeError("no C++ compiler; install g++ or clang++, or set CXX to one")


def _target(compiler: str) -> str:
    """What the compiler takes this processor for: a home folder may be that of many machines."""
    try:
        return _run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    except OSError as error:
        raise RuntimeError(f"{compiler}: {reason_of(error)}") from error


def _run(*command: str) -> str:
    """What it said, on both outputs. Raises OSError, RuntimeError."""
    try:
        ran = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_BUILD_SEC, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} took more than {_BUILD_SEC} s") from error
    return ran.stdout
