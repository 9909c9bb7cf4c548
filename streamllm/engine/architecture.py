"""Whether a model is one that can be streamed exactly, asked of the model itself.

All that is done here with a cache rests on one property of attention layers: a key, or a query, at another position is
this one turned on by the distance, and nothing else in the layer depends on positions. `checked_layers` asks single
layers for it, in float32, where a wrong rotation is a thousand times the rounding, whatever the model's dtype: each by
the angles that it turns by, which are found by trying. `check_distance` asks the whole model, by its own noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .attention import StateDroppedError, UnseenAttentionError, causal_mask, eager_attention
from .layers import Layer, LayerAttention, ask_layers, check_windows, hand_on_state
from .model import changes_at
from .plain_forward import run
from .rotary import Rotary, RotaryEmbedding, distinct_rotaries, text_config

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


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """(1, n) token ids."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.arange(7, 7 + _TOKENS, device=model.device)[None] % vocabulary


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
        (getattr(config, "is_encoder_decoder", False), "an encoder"),
    ]
    attended = [
        (getattr(config, "cross_attention_layers", None), "layers that attend to something else than the text"),
    ]
    for found, what in cached if own_attention else cached + attended:
        if found:
            raise UnsupportedModelError(f"{name} has {what}")


@dataclass(frozen=True)
class _Call:
    """An attention layer, and what the model called it with."""

    module: nn.Module
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Calls:
    """An AttentionState that notes how the model calls its attention layers."""

    def __init__(self, model: nn.Module, layers: Mapping[int, LayerAttention]) -> None:
        self.of: dict[int, _Call] = {}
        self.twice = False
        """Whether a layer's attention was computed more than once."""
        self._model = model
        self._layers = layers

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
        return _plainly(self._layers[layer], query, key, value, scaling).to(value.dtype)


class _Rotated:
    """An AttentionState that keeps what a single layer attends with, in float32."""

    def __init__(self, layer: LayerAttention) -> None:
        self._layer = layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.queries, self.keys, self.values = query, key, value
        return _plainly(self._layer, query, key, value, scaling)


def _plainly(layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """A layer's attention over the tokens of its own call, in float32."""
    mask = causal_mask(query.shape[-2], query.shape[-2], query.device, layer.window)
    return eager_attention(query.float(), key.float(), value.float(), scaling, mask, layer.softmax)


def engine_layers(
    model: PreTrainedModel, embeddings: list[RotaryEmbedding], tokens: Tensor, attention: str
) -> dict[int, Layer]:
    """As `checked_layers`, outputs too, of a model that nobody else calls. One that scales queries by their position
    (Ministral 3) does not do so up to `changes_at`, which is tried: then its layers are told position 0 whatever their
    angles are, as no cache of the engine's is longer."""
    try:
        ask_layers(model)
    except StateDroppedError:
        hand_on_state(model)
    try:
        return checked_layers(model, embeddings, tokens, attention)
    except UnseenAttentionError:
        raise
    except UnsupportedModelError:
        changes = changes_at(text_config(model))
        if changes is None:
            raise
        checked_layers(model, embeddings, tokens, attention, far=changes.length - tokens.shape[1])
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.register_forward_pre_hook(_at_zero, with_kwargs=True)
        return checked_layers(model, embeddings, tokens, attention)


def _at_zero(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = options.get("position_ids")
    return arguments, options if positions is None else options | {"position_ids": torch.zeros_like(positions)}


@torch.no_grad()
def checked_layers(
    model: PreTrainedModel,
    embeddings: list[RotaryEmbedding],
    tokens: Tensor,
    attention: str,
    outputs: bool = True,
    far: int = _FAR,
) -> dict[int, Layer]:
    """The attention layers of the model by their numbers; it has the attention function of that name from then on.
    Single ones are held, in float32, against what is made of them: turned from position 0 to every other, and on by
    `far`; with `outputs`, the attention itself against the layer's own.

    The model must rotate by `embeddings`. Raises UnsupportedModelError, with what the layer does; UnseenAttentionError
    if that cannot be seen."""
    asked = ask_layers(model)
    if outputs:
        check_windows(model, asked)
    model.set_attn_implementation(attention)
    at = torch.arange(tokens.shape[1], device=tokens.device)
    calls = [_called(model, asked, tokens, positions) for positions in (at, torch.zeros_like(at), at + far)]
    if outputs and calls[0].twice:
        raise UnsupportedModelError(f"{type(model).__name__} computes attention more than once in a layer")
    here, zero, distant = (call.of for call in calls)
    if not here:
        raise UnseenAttentionError(f"{type(model).__name__} has attention code of its own, not transformers' interface")
    rotaries, found = distinct_rotaries(embeddings, model), dict[int, Rotary]()
    for alike in _kinds(here, asked):
        for layer in alike[:_OF_A_KIND]:
            first = here[layer]
            with _seen(first.module):
                module = deepcopy(first.module).float()
                runs = [_run_alone(module, asked[layer], call, first) for call in (first, zero[layer], distant[layer])]
            where = f"{type(model).__name__}, layer {layer}"
            rotary = _rotary_of(where, rotaries, at, far, *(rotated for rotated, _ in runs))
            if outputs:
                _check_output(where, asked[layer], module, first, runs[0][1])
            if found.setdefault(alike[0], rotary) is not rotary:
                raise UnsupportedModelError(
                    f"{where}: its keys are turned in another way than those of a layer like it"
                )
        found |= dict.fromkeys(alike, found[alike[0]])
    return {layer: Layer(**vars(asked[layer]), rotary=found[layer]) for layer in sorted(found)}


def _called(model: PreTrainedModel, layers: Mapping[int, LayerAttention], tokens: Tensor, positions: Tensor) -> _Calls:
    calls = _Calls(model, layers)
    with calls.watched():
        run(model, tokens, position_ids=positions[None], attention_state=calls)
    return calls


def _kinds(calls: Mapping[int, _Call], layers: Mapping[int, LayerAttention]) -> list[list[int]]:
    """The layers in lots that differ in their weights alone."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for layer, call in calls.items():
        facts = {name: value for name, value in vars(call.module).items() if name != "layer_idx"}
        plain = [(name, value) for name, value in facts.items() if isinstance(value, bool | int | float | str | None)]
        attends = {name: value for name, value in vars(layers[layer]).items() if name != "softmax"}
        softmax = layers[layer].softmax
        kind = (type(call.module), *sorted(plain, key=str), *attends.values(), softmax.cap, softmax.sinks is None)
        kinds.setdefault((*kind, *_angles_given(call)), []).append(layer)
    return list(kinds.values())


def _angles_given(call: _Call) -> list[int]:
    """Which tensors the layer was given as cosines and sines; layers of one rotary embedding are given the same."""
    pairs = [value for value in (*call.arguments, *call.options.values()) if isinstance(value, tuple)]
    return [id(part) for pair in pairs for part in pair if isinstance(part, Tensor)]


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_in_float32, value))
    return value


def _run_alone(module: nn.Module, layer: LayerAttention, call: _Call, first: _Call) -> tuple[_Rotated, Tensor]:
    """The layer on the hidden states that it had in `first`, at the positions of `call`; also what it returns."""
    state = _Rotated(layer)
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


def _rotary_of(
    where: str, rotaries: list[Rotary], at: Tensor, far: int, here: _Rotated, zero: _Rotated, distant: _Rotated
) -> Rotary:
    """The one that turns the layer's keys and queries."""
    failures = []
    for rotary in [rotary for rotary in rotaries if rotary.size <= here.keys.shape[-1]]:
        failure = _failure(rotary, at, far, here, zero, distant)
        if failure is None:
            break
        failures.append(failure)
    else:
        raise UnsupportedModelError(f"{where}: {max(failures, key=lambda failure: failure[0])[1]}")
    if not (_alike(zero.values, here.values) and _alike(distant.values, here.values)):
        raise UnsupportedModelError(f"{where}: its values depend on positions")
    return rotary


def _failure(
    rotary: Rotary, at: Tensor, far: int, here: _Rotated, zero: _Rotated, distant: _Rotated
) -> tuple[int, str] | None:
    """What keys or queries do that is not this rotation, after how much that is."""
    rotary.reserve(len(at))
    for done, what in enumerate(("keys", "queries")):
        raw, rotated, turned_on = (getattr(state, what).to(at.device) for state in (zero, here, distant))
        if not _alike(rotary.rotate(raw, rotary.at(at)), rotated):
            return 2 * done, _why(rotary, what, raw, rotated)
        if not _alike(rotary.rotate(rotated, rotary.by(far)), turned_on):
            return 2 * done + 1, _SCALED.format(what)
    return None


_SCALED = "its {} depend on the position itself, not on distances alone (they are scaled by it)"


def _why(rotary: Rotary, what: str, raw: Tensor, rotated: Tensor) -> str:
    if not rotary.size:
        return _SCALED.format(what)
    turned = (raw - rotated).abs().flatten(0, -2).amax(0) > _ROUNDING * raw.abs().amax()
    if turned[rotary.size :].any() and turned[: -rotary.size].any():
        dims, size = turned.nonzero().flatten().tolist(), rotary.size
        return f"its {what} are rotated in dimensions {dims[0]} to {dims[-1]}, not in the first or last {size}"
    return (
        f"its {what} are more than rotated: something follows the rotation, as a norm of unequal weights does, so that "
        f"places count and not distances alone"
    )


def _check_output(where: str, layer: LayerAttention, module: nn.Module, call: _Call, found: Tensor) -> None:
    """Against the layer's own attention, of whatever kind."""
    config = getattr(module, "config", None)
    if config is None:
        return
    arguments, options = _with_input_of(call, call)
    mask = torch.zeros(1, 1, *(2 * [found.shape[-2]]), device=found.device)
    mask.masked_fill_(
        ~causal_mask(len(mask[0, 0]), len(mask[0, 0]), mask.device, layer.window), torch.finfo(torch.float32).min
    )
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


Kept = Literal["keys", "values"]


@torch.no_grad()
def check_distance(model: PreTrainedModel, rotaries: Sequence[Rotary], tokens: Tensor, turned: Kept = "keys") -> None:
    """Checks by the model's own attention that its first keys turned on by a million positions, and the other tokens
    that far away, give the logits that the model has where nothing is between them.

    The model must rotate by `rotaries`, one for each layer. turned: under which name a cache keeps what turns. Raises
    UnsupportedModelError."""
    whole = run(model, tokens)[:, _SINKS:]
    check_finite_weights(model, whole)
    noise = difference(_parted(model, rotaries, tokens, 0, turned), whole)
    if model.dtype.itemsize < 4:  # what is rotated to another position is rounded to something else
        elsewhere = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        noise = max(noise, difference(run(model, tokens, position_ids=elsewhere[None])[:, _SINKS:], whole))
    error, limit = difference(_parted(model, rotaries, tokens, _FAR, turned), whole), allowed(whole, noise)
    if not error <= limit:
        raise UnsupportedModelError(
            f"{type(model).__name__}: with its first keys turned on to a million positions later its logits differ by "
            f"{error:.2g} nats on average (its own noise allows {limit:.2g}); its positions are more than a rotation"
        )


def _parted(model: PreTrainedModel, rotaries: Sequence[Rotary], tokens: Tensor, distance: int, turned: Kept) -> Tensor:
    """The logits of all but the first tokens, `distance` positions behind those."""
    from transformers import DynamicCache

    cache = DynamicCache()
    run(model, tokens[:, :_SINKS], past_key_values=cache, use_cache=True)
    for layer, rotary in zip(cache.layers, rotaries, strict=False):
        setattr(layer, turned, rotary.rotate(getattr(layer, turned), rotary.by(distance)))
    positions = torch.arange(_SINKS, tokens.shape[1], device=tokens.device) + distance
    return run(model, tokens[:, _SINKS:], past_key_values=cache, use_cache=True, position_ids=positions[None])


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= _ROUNDING * expected.norm())
