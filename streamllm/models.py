"""Loading: any causal language model with rotary positions that `transformers` knows, prepared for the engine.

Nothing here depends on a model family. What cannot be evaluated exactly is refused: by what its configuration says, and
by a short forward pass through the engine that must give the model's own logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import ATTENTION_NAME, register_attention
from .backends import BACKENDS
from .block_parallel import BlockState
from .device import default_device, resolve_dtype
from .errors import UnsupportedModelError, UsageError
from .loaded import LoadedModel
from .methods.ours import RerotatedCache
from .policy import EvictionPolicy
from .quantization import quantize
from .rotary import Rotary
from .testbed import MODEL_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelNotFoundError(UsageError):
    """No such model folder, or a hub id that cannot be had now."""


def resolve_model(name: str) -> str:
    """`testbed` is the embedded checkpoint; anything else is a local folder or a hub id."""
    return str(MODEL_FOLDER) if name == "testbed" else name


def load_model(
    name: str, dtype: str = "auto", device: torch.device | None = None, quantization: str = "none"
) -> LoadedModel:
    """Loads safetensors weights only, and no remote code.

    Raises ModelNotFoundError, or UnsupportedModelError for what the engine cannot evaluate exactly."""
    from transformers import AutoModelForCausalLM

    device = device or default_device()
    torch_dtype = resolve_dtype(dtype, device)
    model = _from_pretrained(
        AutoModelForCausalLM.from_pretrained, name, dtype=torch_dtype, use_safetensors=True, attn_implementation="sdpa"
    )
    digest = _digest(resolve_model(name), model)
    model = model.to(device)
    quantize(model, quantization)
    return prepare(model, name, digest if quantization == "none" else f"{digest} {quantization}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer.from_pretrained, name)
    return tokenizer


def trained_length(name: str) -> int | None:
    """`max_position_embeddings` of a model, from its configuration alone."""
    from transformers import AutoConfig

    return getattr(_from_pretrained(AutoConfig.from_pretrained, name), "max_position_embeddings", None)


def prepare(model: PreTrainedModel, name: str, digest: str) -> LoadedModel:
    """Hands a model's attention to the engine, once the engine was seen to give the model's own logits."""
    _check_configuration(model)
    register_attention()
    model.eval().requires_grad_(False)
    loaded = LoadedModel(name, model, Rotary(model), model.device, model.dtype, digest)
    probe = torch.arange(7, 7 + min(48, loaded.attention_span or 48), device=model.device) % model.config.vocab_size
    with torch.inference_mode():
        expected = model(input_ids=probe[None], use_cache=False).logits[0].log_softmax(-1)
        model.set_attn_implementation(ATTENTION_NAME)
        loaded.rotary.take_over()
        _check_layers(loaded, probe, expected)
    return loaded


def _check_configuration(model: PreTrainedModel) -> None:
    config = model.config
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(f"{type(model).__name__} has layers of another kind: {', '.join(sorted(unknown))}")


def _check_layers(loaded: LoadedModel, probe: Tensor, expected: Tensor) -> None:
    """The probe's logits, once rotated by the model at our angles, once all by ourselves."""
    positions = torch.arange(len(probe), device=loaded.device)
    whole = RerotatedCache(loaded, BACKENDS["auto"])
    _check_logits(loaded, loaded.forward(probe[None], positions, whole).logits[0], expected)
    layers = loaded.model.config.num_hidden_layers
    if len(whole.keys) != layers:
        raise UnsupportedModelError(
            f"{loaded.name}: {len(whole.keys)} of {layers} layers use transformers' attention interface"
        )
    block = BlockState(loaded, EvictionPolicy(compress_every=0), len(probe))
    block.begin_block(0, len(probe))
    _check_logits(loaded, loaded.forward(probe[None], torch.zeros_like(positions), block).logits[0], expected)


def _check_logits(loaded: LoadedModel, logits: Tensor, expected: Tensor) -> None:
    found = logits.log_softmax(-1)
    # A wrong rotation or visibility moves log-probabilities by a tenth and more; rounding stays far below.
    coarse = any(parameter.element_size() < 4 for parameter in loaded.model.parameters())
    allowed = 0.2 if coarse else 2e-3
    difference = (found - expected).abs()
    if loaded.dtype == torch.float16:  # what overflows is not the architecture's fault: `check_finite` reports it
        difference = difference[difference.isfinite()]
    error = difference.mean().item() if difference.numel() else 0.0
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{loaded.name}: the engine's logits differ from the model's own by {error:.2g} on average "
            f"(allowed {allowed:g}); its attention is more than rotary positions and a softmax"
        )


def _from_pretrained(load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Calls a `from_pretrained`, turning the many ways a name can be wrong into one line."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    for name_of_logger in ("torchao", "torch.utils._pytree"):  # transformers imports torchao where it is installed
        getLogger(name_of_logger).setLevel("ERROR")
    try:
        return load(resolve_model(name), trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        if name == "testbed" or isinstance(error, UnsupportedModelError):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "folder" if Path(name).exists() else "hub id that is cached or can be downloaded now"
        raise ModelNotFoundError(
            f"model {name!r}: not a usable {where} ({reason[:200]}); give 'testbed', a folder or a hub id"
        ) from error


def _digest(source: str, model: PreTrainedModel) -> str:
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.sha256()
    for path in [*sorted(Path(source).glob("*.safetensors")), Path(source) / "config.json"]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
