"""Settings from the environment, and from a file `.env` in the working directory, which says the same less strongly.

STREAMLLM_MODEL and STREAMLLM_DATASET are the defaults of --model and --dataset-name; in the folder STREAMLLM_DATA data
sets are looked for before the hub is asked; FLASH_SDPA and the Hugging Face libraries' own HF_* are as everywhere.
OMP_WAIT_POLICY is PASSIVE unless the environment, not the file, says otherwise.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path

from .errors import UsageError, shown

_MOST_BYTES = 2**18
NAMES = ("STREAMLLM_MODEL", "STREAMLLM_DATASET", "STREAMLLM_DATA", "STREAMLLM_CACHE")
HELP = """environment:
  STREAMLLM_MODEL, STREAMLLM_DATASET  defaults of --model and --dataset-name
  STREAMLLM_DATA                      a folder with data sets, asked before the hub: NAME.txt, .jsonl, .parquet or NAME/
  STREAMLLM_CACHE                     where GGUF files are converted to (~/.cache/streamllm)
  FLASH_SDPA, HF_HOME, HF_*           attention kernel (1: flash, 0: math); the Hugging Face libraries' own
  A file .env in the working directory may say the same, a line NAME=VALUE each. Arguments win over the environment, the
  environment over the file.
"""


def read_env_file(path: Path = Path(".env")) -> None:
    """Puts what the file says into the environment where that does not say it already; other names are not ours.

    Before anything of Hugging Face is imported, which reads HF_* only then. Raises UsageError for a misspelt name,
    and for a file that is not text in UTF-8."""
    if not path.is_file():  # a folder of that name is a virtual environment
        return
    from dotenv import dotenv_values

    for name, value in dotenv_values(stream=io.StringIO(_read(path)), interpolate=False).items():
        if name.startswith("STREAMLLM_") and name not in NAMES:
            raise UsageError(
                f"{path}: unknown name {shown(name)}; must be one of {', '.join(NAMES)}, FLASH_SDPA or HF_*"
            )
        if value is not None and (name in NAMES or name == "FLASH_SDPA" or name.startswith("HF_")):
            os.environ.setdefault(name, value)


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


def default_model() -> str:
    return os.environ.get("STREAMLLM_MODEL") or "testbed"


def default_dataset() -> str | None:
    return os.environ.get("STREAMLLM_DATASET") or None
