"""Whether the files of a model's folder are whole and belong together, found out before any weight is read."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedModelError, UsageError, reason_of, shown
from ..files import is_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = dict[str, tuple[int, ...]]
_MOST_LAYERS = 10_000
"""transformers writes a list of them before anything else could be looked at."""
_MOST_CONFIG_BYTES = 2**22
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_config_file(name: str, folder: Path) -> None:
    """Raises UsageError for a `config.json` that is none, or of more layers than there can be."""
    config = _json(name, folder / "config.json", _MOST_CONFIG_BYTES)
    for part in filter(lambda part: isinstance(part, dict), (config, config.get("text_config"))):
        for key in _LAYERS:
            count = part.get(key, 1)
            if isinstance(count, int) and not 0 <= count <= _MOST_LAYERS:
                raise _unusable(name, f"{key} {shown(count)} in config.json, must be from 0 to {_MOST_LAYERS}")


def check_weight_files(name: str, folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """The model that the configuration describes, without memory for its weights.

    Raises UsageError for files that are damaged or not all there, UnsupportedModelError if they lack tensors of the
    model that the configuration describes."""
    shapes = _shapes(name, folder)
    model = _empty_model(name, config)
    if getattr(config, "quantization_config", None) is None:  # packed weights have shapes of their own
        _compare(name, shapes, model)
    return model


def _shapes(name: str, folder: Path) -> Shapes:
    """Of all tensors, by the files' headers."""
    from safetensors import safe_open

    found: Shapes = {}
    for file in _weight_files(name, folder):
        try:
            with safe_open(str(file), "pt") as content:
                found |= {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
        except Exception as error:  # the library has one kind, and others for what the operating system says
            raise _unusable(name, f"{file.name} is damaged or not all there: {reason_of(error)}") from error
    return found


def _weight_files(name: str, folder: Path) -> Sequence[Path]:
    """As transformers looks for them."""
    if is_file(single := folder / "model.safetensors"):
        return [single]
    if not is_file(index := folder / "model.safetensors.index.json"):
        raise _unusable(name, "no model.safetensors in it, nor an index of several")
    parts = _json(name, index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
        raise _unusable(name, f"{index.name} has no weight_map of tensors and files")
    names = sorted(set(parts.values()))
    lacking = [part for part in names if not is_file(folder / part)]
    if lacking:
        raise _unusable(name, f"{len(lacking)} of its {len(names)} parts are missing: {shown(lacking[0])}")
    return [folder / part for part in names]


def _json(name: str, file: Path, most: int = 2**28) -> Any:
    """An object. Raises UsageError."""
    try:
        with file.open("rb") as content:
            raw = content.read(most + 1)
        found = json.loads(raw) if len(raw) <= most else None
    except OSError as error:
        raise _unusable(name, f"{file.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _unusable(name, f"{file.name} is not JSON: {reason_of(error, 100)}") from error
    if not isinstance(found, dict):
        raise _unusable(name, f"{file.name} is not one JSON object of at most {most // 2**20} MiB")
    return found


def _empty_model(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights. Raises UsageError where the configuration describes none."""
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise _unusable(name, f"dtype {shown(dtype)} in config.json is none of torch's")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = class_of(config).from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
            vocabulary_of(model)
    except Exception as error:  # of a value of the wrong kind, a model's code raises anything
        raise _unusable(name, f"config.json describes no model: {type(error).__name__}: {reason_of(error)}") from error
    return model


def class_of(config: PretrainedConfig) -> Any:
    """transformers' automatic class of a model that writes text; that of one which sees images too, where it has no
    other."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    sees = config.model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    reads_text_alone = config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if sees and not reads_text_alone else AutoModelForCausalLM


def vocabulary_of(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _compare(name: str, shapes: Mapping[str, tuple[int, ...]], model: PreTrainedModel) -> None:
    """Only what is certain: transformers renames, joins and turns some tensors of some models while it loads them."""
    expected: Shapes = {}
    together = defaultdict(list)
    for key, weight in model.named_parameters(remove_duplicate=False):
        expected[key] = tuple(weight.shape)
        together[id(weight)].append(key)
    for key, shape in shapes.items():
        if math.prod(shape) != math.prod(expected.get(key, shape)):
            raise _unusable(name, f"{key[:100]} has the shape {shape} in its files, {expected[key]} by config.json")
    lacking = [keys[0] for keys in together.values() if not any(key in shapes for key in keys)]
    if lacking and shapes.keys() <= expected.keys():
        lacks(name, lacking)


def lacks(name: str, keys: Sequence[str]) -> None:
    """Raises UnsupportedModelError for tensors that the files do not have."""
    named = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
    raise UnsupportedModelError(
        f"{shown(name)}: its files lack {len(keys)} tensors of the model that config.json describes ({named}); "
        f"they are incomplete, or another model's; get all of them again"
    )


def _unusable(name: str, reason: str) -> UsageError:
    return UsageError(f"model {shown(name)}: not a usable folder ({reason}); get all of its files again")
