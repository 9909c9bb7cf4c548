"""Whether a model is one that can be streamed exactly, asked of the model itself.

All that is done here with a cache rests on one property of attention layers: a key, or a query, at another position is
this one turned on by the distance, and nothing else in the layer depends on positions. `check_layers` asks single
layers for it, in float32, where a wrong rotation is a thousand times the rounding, whatever the model's dtype;
`check_distance` asks the whole model, by its own noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .attention import UnseenAttentionError, eager_attention
from .rotary import Rotary, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 24
_SINKS = 4
_FAR = 1_000_000
"""Tokens evicted. Whatever depends on an absolute position shows there."""
_ROUNDING = 1e-4
"""Rounding error of a float32 layer, relative to the size of its output: right layers are below 1e-6, wrong ones above
a tenth."""
_TIMES_THE_NOISE = 8
_OF_A_KIND = 2
"""Layers that are looked at of those that differ in their weights alone."""


def probe_tokens(model: PreTrainedModel, span: int | None) -> Tensor:
    """(1, n) token ids; no more than a query of the model itself attends to."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.arange(7, 7 + min(_TOKENS, span or _TOKENS), device=model.device)[None] % vocabulary


def difference(found: Tensor, expected: Tensor) -> float:
    """Difference between two models' logits (..., vocabulary): mean |difference of log probabilities|, nats. float16
    may overflow, which is not the architecture's fault: values that are not finite there do not count."""
    error = (_log_probabilities(found) - _log_probabilities(expected)).abs()
    if found.dtype == torch.float16:
        error = error[error.isfinite()]
    return error.mean().item() if error.numel() else 0.0


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def allowed(logits: Tensor, noise: float) -> float:
    """Several times the model's own noise; where that happens to be next to nothing, what rounding may do."""
    size = _log_probabilities(logits).abs()
    size = size[size.isfinite()]
    digits = max(torch.finfo(logits.dtype).eps, 32 * torch.finfo(torch.float32).eps)
    return max(_TIMES_THE_NOISE * noise, digits * (size.mean().item() if size.numel() else 0.0))


def run(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    """Logits (1, n, vocabulary) of a plain forward pass. Raises UnsupportedModelError if the model has none."""
    try:
        logits: Tensor = model(input_ids=tokens, **{"use_cache": False} | options).logits
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's code raises anything
        reason = " ".join(str(error).split())
        dtype = str(model.dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{type(model).__name__}: its forward pass fails on {tokens.shape[1]} tokens of text in {dtype} "
            f"({type(error).__name__}: {reason[:200]})"
        ) from error
    return logits


def check_finite_weights(model: PreTrainedModel, logits: Tensor) -> None:
    """Raises UnsupportedModelError if the model's own logits are no numbers; float16 may overflow, which is said where
    it is measured."""
    if logits.isfinite().all():
        return
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if not broken and model.dtype == torch.float16:
        return
    reason = f"weights that are not finite in {', '.join(broken[:3])}" if broken else "logits that are not finite"
    raise UnsupportedModelError(f"{type(model).__name__} has {reason}: the files are damaged, or its dtype too narrow")


def check_features(model: PreTrainedModel, own_attention: bool) -> None:
    """Refuses everything that is known, by the model's own words, not to be rotary positions and (unless the model's
    own attention is used) a softmax. Raises UnsupportedModelError."""
    config, name = text_config(model), type(model).__name__
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    cached = [
        (getattr(config, "num_hidden_layers", 1) < 1, f"{getattr(config, 'num_hidden_layers', 1)} layers"),
        (getattr(config, "alibi", None), "linear biases (ALiBi) for positions"),
        (bool(unknown), f"layers of another kind: {', '.join(sorted(unknown))}"),
        (
            getattr(config, "kv_lora_rank", None),
            "latent attention: of a key a part is rotated, and values are narrower",
        ),
        (getattr(config, "is_encoder_decoder", False), "an encoder"),
    ]
    attended = [
        (getattr(config, "attn_logit_softcapping", None), "soft caps on its attention logits"),
        (_parameter(model, "sinks"), "learned sinks in the softmax of its attention"),
        (getattr(config, "cross_attention_layers", None), "layers that attend to something else than the text"),
    ]
    for found, what in cached if own_attention else cached + attended:
        if found:
            raise UnsupportedModelError(f"{name} has {what}")


def _parameter(model: nn.Module, ending: str) -> bool:
    return any(name.rpartition(".")[2] == ending for name, _ in model.named_parameters())


@dataclass(frozen=True)
class _Call:
    """An attention layer, and what the model called it with."""

    module: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Calls:
    """An AttentionState that notes how the model calls its attention layers."""

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[int, _Call] = {}
        self.twice = False
        """Whether a layer's attention was computed more than once."""
        self._model = model

    @contextmanager
    def watched(self) -> Iterator[None]:
        layers = [module for module in self._model.modules() if hasattr(module, "layer_idx")]
        hooks = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._last = _Call(module, arguments, options)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.twice |= layer in self.of
        self.of[layer] = self._last
        # In float32, or what overflows in one layer would be no numbers in the next.
        output = eager_attention(query.float(), key.float(), value.float(), scaling, _causal(query))
        return output.to(value.dtype)


class _Rotated:
    """An AttentionState that keeps what a single layer attends with, in float32."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.queries, self.keys, self.values = query, key, value
        return eager_attention(query, key, value, scaling, _causal(query))


def _causal(query: Tensor) -> Tensor:
    new = query.shape[-2]
    return torch.ones(new, new, dtype=torch.bool, device=query.device).tril()


@torch.no_grad()
def check_layers(model: PreTrainedModel, rotary: Rotary, tokens: Tensor, outputs: bool) -> None:
    """Holds single attention layers, in float32, against what is made of them: turned from position 0 to every other,
    and on by a million positions; with `outputs`, the attention itself against the layer's own.

    The model must rotate by `rotary`. Raises UnsupportedModelError, with what the layer does; UnseenAttentionError if
    that cannot be seen."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    calls = [_called(model, tokens, positions) for positions in (at, torch.zeros_like(at), at + _FAR)]
    if outputs and calls[0].twice:
        raise UnsupportedModelError(f"{type(model).__name__} computes attention more than once in a layer")
    here, zero, far = (call.of for call in calls)
    if not here:
        raise UnseenAttentionError(f"{type(model).__name__} has attention code of its own, not transformers' interface")
    for layer, first in _one_of_each_kind(here).items():
        with _seen(first.module):
            module = deepcopy(first.module).float()
            runs = [_run_alone(module, call, first) for call in (first, zero[layer], far[layer])]
        where = f"{type(model).__name__}, layer {layer}"
        _check_rotation(where, rotary, at, *(rotated for rotated, _ in runs))
        if outputs:
            _check_output(where, module, first, runs[0][1])


def _called(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> _Calls:
    calls = _Calls(model)
    with calls.watched():
        run(model, tokens, position_ids=positions[None], attention_state=calls)
    return calls


def _one_of_each_kind(calls: Mapping[int, _Call]) -> dict[int, _Call]:
    """The first layers of those that differ in their weights alone."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for layer, call in calls.items():
        facts = {name: value for name, value in vars(call.module).items() if name != "layer_idx"}
        plain = [(name, value) for name, value in facts.items() if isinstance(value, bool | int | float | str | None)]
        kinds.setdefault((type(call.module), *sorted(plain, key=str)), []).append(layer)
    return {layer: calls[layer] for layers in kinds.values() for layer in layers[:_OF_A_KIND]}


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_in_float32, value))
    return value


def _run_alone(module: nn.Module, call: _Call, first: _Call) -> tuple[_Rotated, Tensor]:
    """The layer on the hidden states that it had in `first`, at the positions of `call`; also what it returns."""
    state = _Rotated()
    arguments, options = _with_input_of(call, first)
    found = module(*arguments, **options | {"attention_state": state})
    return state, found[0] if isinstance(found, tuple) else found


@contextmanager
def _seen(module: nn.Module) -> Iterator[None]:
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's code raises anything; its weights may be another library's, or elsewhere
        raise UnseenAttentionError(
            f"{type(module).__name__} cannot be computed with by itself ({type(error).__name__}: {error})"
        ) from error


def _with_input_of(call: _Call, first: _Call) -> tuple[Any, dict[str, Any]]:
    arguments, options = _in_float32(call.arguments), {name: _in_float32(v) for name, v in call.options.items()}
    if arguments:
        return (_in_float32(first.arguments[0]), *arguments[1:]), options
    name = next(iter(inspect.signature(call.module.forward).parameters))
    return (), options | {name: _in_float32(first.options[name])}


def _check_rotation(where: str, rotary: Rotary, at: Tensor, here: _Rotated, zero: _Rotated, far: _Rotated) -> None:
    rotary.reserve(len(at))
    onwards = rotary.by(_FAR)
    for what in ("keys", "queries"):
        raw, rotated, distant = (getattr(state, what).to(at.device) for state in (zero, here, far))
        if not _alike(rotary.rotate(raw, rotary.at(at)), rotated):
            raise UnsupportedModelError(f"{where}: {_why(rotary, at, what, raw, rotated)}")
        if not _alike(rotary.rotate(rotated, onwards), distant):
            raise UnsupportedModelError(
                f"{where}: its {what} depend on the position itself, not on distances alone (they are scaled by it)"
            )
    if not (_alike(zero.values, here.values) and _alike(far.values, here.values)):
        raise UnsupportedModelError(f"{where}: its values depend on positions")


def _why(rotary: Rotary, at: Tensor, what: str, raw: Tensor, rotated: Tensor) -> str:
    cos, sin = rotary.at(at)
    if _alike(raw, rotated):
        return f"its {what} have no rotary positions, other layers' may have"
    if _alike(rotary.rotate(raw, (cos, -sin)), rotated):
        return f"its {what} are turned the other way round"
    turned = (raw - rotated).abs().flatten(0, -2).amax(0) > _ROUNDING * raw.abs().amax()
    if turned[rotary.size :].any():
        dims = turned.nonzero().flatten().tolist()
        return f"its {what} are rotated in dimensions {dims[0]} to {dims[-1]}, not in the first {rotary.size}"
    return f"its {what} are more than rotated: something follows the rotation, as a norm does"


def _check_output(where: str, module: nn.Module, call: _Call, found: Tensor) -> None:
    """Against the layer's own attention, of whatever kind."""
    config = getattr(module, "config", None)
    if config is None:
        return
    arguments, options = _with_input_of(call, call)
    mask = torch.zeros(1, 1, *(2 * [found.shape[-2]]), device=found.device)
    mask.masked_fill_(~_causal(mask), torch.finfo(torch.float32).min)
    config._attn_implementation = "eager"
    names = list(inspect.signature(module.forward).parameters)
    if "attention_mask" in names[: len(arguments)]:
        place = names.index("attention_mask")
        arguments = (*arguments[:place], mask, *arguments[place + 1 :])
    else:
        options["attention_mask"] = mask
    options.pop("attention_state", None)
    own = module(*arguments, **options)
    own = own[0] if isinstance(own, tuple) else own
    if not _alike(found, own):
        raise UnsupportedModelError(f"{where}: its attention is more than a softmax of queries and keys")


@torch.no_grad()
def check_distance(model: PreTrainedModel, rotary: Rotary, tokens: Tensor) -> None:
    """Checks by the model's own attention that its first keys turned on by a million positions, and the other tokens
    that far away, give the logits that the model has where nothing is between them.

    The model must rotate by `rotary`. Raises UnsupportedModelError."""
    whole = run(model, tokens)[:, _SINKS:]
    check_finite_weights(model, whole)
    noise = difference(_parted(model, rotary, tokens, 0), whole)
    if model.dtype.itemsize < 4:  # what is rotated to another position is rounded to something else
        elsewhere = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        noise = max(noise, difference(run(model, tokens, position_ids=elsewhere[None])[:, _SINKS:], whole))
    error, limit = difference(_parted(model, rotary, tokens, _FAR), whole), allowed(whole, noise)
    if not error <= limit:
        raise UnsupportedModelError(
            f"{type(model).__name__}: with its first keys turned on to a million positions later its logits differ by "
            f"{error:.2g} nats on average (its own noise allows {limit:.2g}); its positions are more than a rotation"
        )


def _parted(model: PreTrainedModel, rotary: Rotary, tokens: Tensor, distance: int) -> Tensor:
    """The logits of all but the first tokens, `distance` positions behind those."""
    from transformers import DynamicCache

    cache = DynamicCache()
    run(model, tokens[:, :_SINKS], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys = rotary.rotate(layer.keys, rotary.by(distance))
    positions = torch.arange(_SINKS, tokens.shape[1], device=tokens.device) + distance
    return run(model, tokens[:, _SINKS:], past_key_values=cache, use_cache=True, position_ids=positions[None])


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= _ROUNDING * expected.norm())
