"""Loading: any causal language model with rotary positions that `transformers` knows, prepared for the engine.

Nothing here depends on a model family. What cannot be evaluated exactly is refused: by what its configuration says, and
by a short forward pass through the engine that must give the model's own logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError, UsageError, reason_of, shown
from ..files import is_folder
from ..libraries import hush_libraries
from ..policy import EvictionPolicy
from ..testbed import MODEL_FOLDER
from .architecture import allowed, check_features, check_finite_weights, difference, engine_layers, probe_tokens
from .attention import ATTENTION_NAME, register_attention
from .backends import BACKENDS
from .block_state import BlockState
from .device import default_device, resolve_dtype, unverified
from .gguf import converted, facts, folder_digest, gguf_file
from .methods.ours import RerotatedCache
from .model import LoadedModel
from .model import trained_length as positions_of
from .plain_forward import run
from .quantization import quantize
from .rotary import rotary_embeddings, text_config
from .weight_files import check_config_file, check_weight_files, class_of, lacks, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelNotFoundError(UsageError):
    """No such model folder, or a hub id that cannot be had now."""


def resolve_model(name: str) -> str:
    """`testbed` is the embedded checkpoint, a GGUF file what was converted of it; anything else is a local folder or a
    hub id. Raises UsageError."""
    if name == "testbed":
        return str(MODEL_FOLDER)
    file = gguf_file(name)
    if file is None:
        _check_name(name)
    return name if file is None else str(converted(file))


def _check_name(name: str) -> None:
    """Raises ModelNotFoundError for what can only be a folder, and is none."""
    if not name.strip():
        raise ModelNotFoundError(f"model {name!r}: no name; give 'testbed', a folder or a hub id")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not is_path or is_folder(Path(name)):
        return
    fix = "leave out the quotes, in which ~ is no home" if name[0] == "~" else "give 'testbed', a folder or a hub id"
    raise ModelNotFoundError(f"model {shown(name)}: no such folder; {fix}")


def load_model(
    name: str, dtype: str = "auto", device: torch.device | None = None, quantization: str = "none"
) -> LoadedModel:
    """Loads safetensors weights only, and no remote code. Warns of a device that is `unverified`.

    Raises ModelNotFoundError, UsageError for a dtype that the device does not have, or UnsupportedModelError for what
    the engine cannot evaluate exactly."""
    device = device or default_device()
    if (doubt := unverified(device)) is not None:
        warnings.warn(doubt, stacklevel=2)
    torch_dtype = resolve_dtype(dtype, device)
    check_files(name)
    model, found = _from_pretrained(
        class_of(configuration_of(name)).from_pretrained,
        name,
        dtype=torch_dtype,
        use_safetensors=True,
        attn_implementation="eager",  # which every architecture has: what it cannot do is asked afterwards
        output_loading_info=True,
    )
    _check_weights(name, found)
    loaded = prepare(model.to(device), name, weights_digest(name), quantization)
    return replace(loaded, weights=facts(Path(resolve_model(name))).get("weights"))


def _check_weights(name: str, found: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError if the files lack weights: transformers would fill in random ones."""
    if found["missing_keys"]:
        lacks(name, sorted(found["missing_keys"]))
    if found["unexpected_keys"]:
        unused = sorted(found["unexpected_keys"])
        warnings.warn(
            f"{name}: {len(unused)} tensors of its files are not part of the model that config.json describes "
            f"({', '.join(unused[:3])}{', ...' * (len(unused) > 3)})",
            stacklevel=2,
        )


def check_files(name: str) -> int | None:
    """The size of a local model's vocabulary; None of one from the hub, whose files are as they were put there.

    Reads no weights. Raises UsageError, UnsupportedModelError for a folder that is damaged or incomplete, and for what
    the model's configuration says it has that the engine has not."""
    source = Path(resolve_model(name))
    if not is_folder(source):
        return None
    model = check_weight_files(name, source, configuration_of(name))
    check_features(model, own_attention=False)
    return vocabulary_of(model)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer.from_pretrained, name)
    if not len(tokenizer):
        raise ModelNotFoundError(f"model {shown(name)}: no tokenizer in its files; give token_ids, a file of them")
    return tokenizer


def weights_digest(name: str) -> str:
    """Names the weights and what they mean: the hub's commit, or a hash of the local files, of a GGUF file itself.
    Raises UsageError if what was converted of that is not what it was."""
    source = Path(resolve_model(name))
    if not is_folder(source):
        commit = configuration_of(name)._commit_hash
        assert commit, "what comes from the hub has a commit"
        return str(commit)
    digest = folder_digest(source)
    kept = facts(source)
    if kept and kept["converted"] != digest:
        raise UsageError(f"model {name!r}: its converted copy has been changed; remove {str(source)!r}")
    return str(kept.get("digest", digest))


def trained_length(name: str) -> int | None:
    """`max_position_embeddings` of a model, from its configuration alone."""
    return positions_of(configuration_of(name).get_text_config(decoder=True))


def configuration_of(name: str) -> Any:
    """Raises UsageError."""
    from transformers import AutoConfig

    if is_folder(source := Path(resolve_model(name))):
        check_config_file(name, source)
    return _from_pretrained(AutoConfig.from_pretrained, name)


def prepare(model: PreTrainedModel, name: str, digest: str, quantization: str = "none") -> LoadedModel:
    """Hands a model's attention to the engine, once both were seen to do the same.

    Raises UnsupportedModelError with what the model has that the engine has not."""
    check_features(model, own_attention=False)
    register_attention()
    model.eval().requires_grad_(False)
    embeddings = rotary_embeddings(model)
    tokens = probe_tokens(model)
    with torch.inference_mode():
        expected, noise = _own_logits(model, tokens)
        check_finite_weights(model, expected)
        for embedding in embeddings:
            embedding.take_over()
        layers = engine_layers(model, embeddings, tokens, ATTENTION_NAME)
    count = text_config(model).num_hidden_layers
    if len(layers) != count:
        raise UnsupportedModelError(f"{name}: {len(layers)} of {count} layers use transformers' attention interface")
    loaded = LoadedModel(name, model, tuple(layers.values()), model.device, model.dtype, digest)
    _check_logits(loaded, tokens, expected, noise)
    quantize(model, quantization)
    return loaded if quantization == "none" else replace(loaded, digest=f"{digest} {quantization}")


def _own_logits(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, float]:
    """The logits of the model by itself, and their noise: how far they are from those in a batch, and by its other
    attention; where it has none, from those at other positions, where it rounds other numbers."""
    model.set_attn_implementation("eager")
    expected = run(model, tokens)
    others = [run(model, tokens.repeat(2, 1))]
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        elsewhere = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        others.append(run(model, tokens, position_ids=elsewhere[None]))
    else:
        others.append(run(model, tokens))
    return expected, max(difference(logits, expected) for logits in others)


def _check_logits(loaded: LoadedModel, tokens: Tensor, expected: Tensor, noise: float) -> None:
    """The probe's logits, once rotated by the model at our angles, once all by ourselves."""
    limit = allowed(expected, noise)
    for way, logits in _engine_logits(loaded, tokens):
        error = difference(logits, expected)
        if not error <= limit:
            raise UnsupportedModelError(
                f"{loaded.name}: {way}, the engine's logits differ from the model's own by {error:.2g} nats on average "
                f"(its own noise allows {limit:.2g}); it is more than rotary positions and a softmax"
            )


@torch.inference_mode()
def _engine_logits(loaded: LoadedModel, tokens: Tensor) -> list[tuple[str, Tensor]]:
    n = tokens.shape[1]
    positions, backend = torch.arange(n, device=loaded.device), BACKENDS["auto"]
    whole = RerotatedCache(loaded, backend)
    found = [("with keys as it rotates them", loaded.forward(tokens, positions, whole).logits)]
    block = BlockState(loaded, EvictionPolicy(compress_every=0), n)
    block.begin_block(0, n)
    found.append(("with keys rotated afterwards", loaded.forward(tokens, torch.zeros_like(positions), block).logits))
    return found


def _from_pretrained(load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Calls a `from_pretrained`, turning the many ways a name can be wrong into one line."""
    hush_libraries()
    source = resolve_model(name)
    try:
        return load(source, trust_remote_code=False, **options)
    except BaseException as error:  # of what is damaged or mistyped, libraries raise anything, and Rust's panic
        if name == "testbed" or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        where = "folder" if is_folder(Path(source)) else "hub id that is cached or can be downloaded now"
        raise ModelNotFoundError(
            f"model {shown(name)}: not a usable {where} ({reason_of(error)}); give 'testbed', a folder or a hub id"
        ) from error
