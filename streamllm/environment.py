"""Settings from the environment, and from a file `.env` in the working directory, which says the same less strongly.

STREAMLLM_MODEL and STREAMLLM_DATASET are the defaults of --model and --dataset-name, STREAMLLM_N_SINK and
STREAMLLM_WINDOW_SIZE those of --n-sink and --window-size; in the folder STREAMLLM_DATA data sets are looked for before
the hub is asked; FLASH_SDPA and the Hugging Face libraries' own HF_* are as everywhere. The file may have the source
documents' names too. OMP_WAIT_POLICY is PASSIVE unless the environment, not the file, says otherwise.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from .errors import UsageError, shown

_MOST_BYTES = 2**18
NAMES = (
    "STREAMLLM_MODEL",
    "STREAMLLM_DATASET",
    "STREAMLLM_N_SINK",
    "STREAMLLM_WINDOW_SIZE",
    "STREAMLLM_DATA",
    "STREAMLLM_CACHE",
)
SOURCES_NAMES = {
    "MODEL_NAME": "STREAMLLM_MODEL",
    "DATASET_NAME": "STREAMLLM_DATASET",
    "N_SINK": "STREAMLLM_N_SINK",
    "WINDOW_SIZE": "STREAMLLM_WINDOW_SIZE",
}
"""Names in the source documents' `.env` -> ours. Heeded in the file only: words so plain may be anybody's in an
environment."""
HELP = """environment:
  STREAMLLM_MODEL, STREAMLLM_DATASET  defaults of --model and --dataset-name
  STREAMLLM_N_SINK, ..._WINDOW_SIZE   defaults of --n-sink and --window-size, where a command has them
  STREAMLLM_DATA                      a folder with data sets, asked before the hub: NAME.txt, .jsonl, .parquet or NAME/
  STREAMLLM_CACHE                     where converted GGUF files and our kernels for CPUs are kept (~/.cache/streamllm)
  FLASH_SDPA, HF_HOME, HF_*           attention kernel (1: flash, 0: math); the Hugging Face libraries' own
  A file .env in the working directory may say the same, a line NAME=VALUE each; there MODEL_NAME, DATASET_NAME, N_SINK
  and WINDOW_SIZE mean the first four. Arguments win over the environment, the environment over the file.
"""


def read_env_file(path: Path = Path(".env")) -> None:
    """Puts what the file says into the environment where that does not say it already; other names are not ours.

    Before anything of Hugging Face is imported, which reads HF_* only then. A line on stderr for each of the source
    documents' names that counts. Raises UsageError for a misspelt name, for a variable in a value that nobody set, and
    for a file that is not text in UTF-8."""
    if not path.is_file():  # a folder of that name is a virtual environment
        return
    from dotenv import dotenv_values

    values: dict[str, str] = {}
    for name, value in dotenv_values(stream=io.StringIO(_read(path)), interpolate=False).items():
        if name.startswith("STREAMLLM_") and name not in NAMES:
            raise UsageError(
                f"{path}: unknown name {shown(name)}; must be one of {', '.join(NAMES)}, FLASH_SDPA or HF_*"
            )
        is_ours = name in NAMES or name in SOURCES_NAMES or name == "FLASH_SDPA" or name.startswith("HF_")
        if value is not None:  # what is not ours may yet be part of a value that is
            values[name] = _expanded(path, name, value, {**values, **os.environ}) if is_ours else value
            if is_ours and name not in SOURCES_NAMES:
                os.environ.setdefault(name, values[name])
    for name, ours in SOURCES_NAMES.items():
        if name in values and ours not in os.environ:
            os.environ[ours] = values[name]
            print(f"{path}: {name} is read as {ours}", file=sys.stderr)


def _expanded(path: Path, name: str, value: str, known: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced, as a shell that reads the file would. Raises UsageError."""

    def replaced(found: re.Match[str]) -> str:
        variable = found[1] or found[2]
        if variable not in known:
            raise UsageError(
                f"{path}: {name} {shown(value)}: {variable} is set neither above it nor in the environment; set it, or "
                f"write out what is meant"
            )
        return known[variable]

    return re.sub(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", replaced, value)


def _read(path: Path) -> str:
    """Raises UsageError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); let yourself read it, or remove it") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} in byte {error.start}); save it as UTF-8") from error
    if len(content) > _MOST_BYTES:
        raise UsageError(f"{path}: more than {_MOST_BYTES // 1024} KiB; a line NAME=VALUE for each name will do")
    if "\0" in text:
        raise UsageError(f"{path}: has NUL characters; save it as plain text in UTF-8")
    return text


def wait_passively() -> None:
    """Has OpenMP's threads sleep while they wait, unless OMP_WAIT_POLICY is set already. By default they spin, and
    where processes share cores a token then takes several times as long.

    OpenMP reads the variable once, when torch is imported, so importing `streamllm` calls this, before any command can
    load torch. In a program that has imported torch before, only the processes that it starts obey: it is warned. The
    cure is to import `streamllm` first, or to set the variable outside; either value silences the warning."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if "torch" in sys.modules:
        warnings.warn(
            "torch was imported before streamllm: OMP_WAIT_POLICY=PASSIVE comes too late for this process, whose "
            "waiting threads take cores from others; import streamllm first, or set the variable outside",
            stacklevel=3,
        )


def cache_folder() -> Path:
    """$STREAMLLM_CACHE, or `streamllm` where the system keeps what can be made again."""
    given = os.environ.get("STREAMLLM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamllm"


def default_model() -> str:
    return os.environ.get("STREAMLLM_MODEL") or "testbed"


def default_dataset() -> str | None:
    return os.environ.get("STREAMLLM_DATASET") or None


def default_knob(name: str, usual: str | int | None) -> str | int | None:
    """The default of a knob of the policy: STREAMLLM_NAME, where there is such a name and it is set. Raises
    UsageError."""
    variable = f"STREAMLLM_{name.upper()}"
    value = os.environ.get(variable) if variable in NAMES else None
    if not value:
        return usual
    if not re.fullmatch(r"\d{1,18}", value):
        raise UsageError(f"{variable} {shown(value)}: must be a whole number, as --{name.replace('_', '-')} takes")
    return int(value)
