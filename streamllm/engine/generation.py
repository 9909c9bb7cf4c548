"""The ring as a `transformers` cache: `model.generate(..., past_key_values=StreamingCache(model))` streams without end
in constant memory.

As in `methods.ring`, keys stay as the model rotated them, at their position in the stream, and only the sinks are
turned on; here the model keeps its own attention, of whatever implementation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging

from ..errors import UnsupportedModelError, UsageError
from ..policy import EvictionPolicy
from .architecture import Kept, check_distance, check_features, checked_layers, probe_tokens
from .attention import ATTENTION_NAME, UnseenAttentionError, register_attention
from .layers import Layer, span_of
from .model import changes_at, trained_length
from .rotary import Rotary, RotaryEmbedding, rotary_embeddings, text_config, text_part
from .slots import RingSlots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StreamingCache(Cache):  # type: ignore[misc]
    """Attention sinks and a window (Xiao et al. 2023): every new token sees the first `n_sink` tokens, the last
    `window_size`, and itself.

    Several tokens given in one piece, as a prompt is, see what the cache holds and all of the piece before them, as
    they would with any cache; then all but sinks and window is forgotten. From now on the model rotates by angles
    computed in float64: float32 ones are off by hundredths at position 1,000,000.

    =====================================  ===========================================================================
    greedy, sampling, beams, several       yes
    sequences for one prompt
    a prompt in pieces (chunked prefill),  yes: give `generate` the whole text so far, or the model the new part
    many turns                             (`prefill_chunk_size` not with transformers 5.2, which misplaces the chunks)
    batches                                of equally long prompts; a mask with zeros (padding) is refused
    assisted and prompt-lookup decoding    yes: what was drafted is forgotten again. What is verified is a piece: while
                                           nothing is evicted the text is the greedy one, later on it may differ
    another text                           after `reset()`, of another batch size too
    a shorter text than it has seen        refused
    models of images and text              their text; refused where positions are not those of a text
    masks or positions of one's own,       refused, as far as the model sees them
    another model, gradient checkpointing
    =====================================  ===========================================================================

    Raises UnsupportedModelError if the model's keys cannot be turned on, which is tried (three short forward passes,
    once for a model), or with a sliding window of the model's own; PolicyError for sizes out of range.
    """

    def __init__(self, model: PreTrainedModel, n_sink: int = 4, window_size: int = 1020) -> None:
        policy = EvictionPolicy(n_sink=n_sink, window_size=window_size)
        check_features(model, own_attention=True)
        config = text_config(model)
        if span_of(config) is not None:
            raise UnsupportedModelError(f"{type(model).__name__} has a sliding window of its own, and no use for sinks")
        changes = self.changes = changes_at(config)
        if changes is not None and changes.of_queries:  # or, up to transformers 5.3, by what a cache has seen
            raise UnsupportedModelError(
                f"{type(model).__name__} {changes.what} by where in the text they are, not in the cache"
            )
        if changes is not None and policy.kept + 1 > changes.length:
            raise UsageError(
                f"n_sink + window_size + 1 = {policy.kept + 1} positions: {type(model).__name__} {changes.what} "
                f"beyond {changes.length}; use a window_size of {changes.length - n_sink - 1} or less"
            )
        trained = trained_length(config)
        if trained is not None and changes is None and policy.kept + 1 > trained:
            warnings.warn(
                f"n_sink + window_size + 1 = {policy.kept + 1} is more than the {trained} positions the model was "
                f"trained on: perplexity will suffer",
                stacklevel=2,
            )
        self.offset = 0
        """Offset of the positions that are given to the model: that of the first token."""
        self.turning = _streaming_rotation(model)
        turns = {rotary: _SinkTurn(rotary) for rotary in self.turning.rotaries}
        layers = [_RingLayer(policy, turns[rotary], self.turning.kept) for rotary in self.turning.rotaries]
        super().__init__(layers=layers)


_KNOWN = "_streaming_rotation"


class _Turning(NamedTuple):
    """How what a model gives to its cache turns."""

    rotaries: list[Rotary]
    """One for each layer."""
    kept: Kept
    """Under which name. What latent attention keeps as keys is what keys and values are made of, and as values that
    part of its keys that turns (transformers 5.2: keys and values)."""


class _Known(NamedTuple):
    """A decoder's record of the rotation that it was seen to be right with."""

    where: tuple[torch.device, torch.dtype]
    embeddings: list[RotaryEmbedding]
    turning: _Turning


def _streaming_rotation(model: PreTrainedModel) -> _Turning:
    """Has the model rotate by exact angles, and refuse what a StreamingCache cannot see; tried once for each dtype and
    device. Raises UnsupportedModelError, or UsageError for a model of the engine's."""
    decoder = text_part(model)
    if model.config._attn_implementation == ATTENTION_NAME:
        raise UsageError(f"{type(model).__name__} was loaded for the engine; load another one for `generate`")
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output layer: it is not a language model")
    known: _Known | None = getattr(decoder, _KNOWN, None)
    if known is not None and known.where == (model.device, model.dtype):
        _take_over(known.embeddings, in_its_dtype=True)
        return known.turning
    embeddings = rotary_embeddings(model)
    with torch.autocast(model.device.type, enabled=False):
        turning = _tried(model, embeddings)
    if known is None:
        decoder.register_forward_pre_hook(_refuse, with_kwargs=True)
    setattr(decoder, _KNOWN, _Known((model.device, model.dtype), embeddings, turning))
    return turning


def _take_over(embeddings: list[RotaryEmbedding], in_its_dtype: bool) -> None:
    for embedding in embeddings:
        embedding.take_over(in_its_dtype)


def _tried(model: PreTrainedModel, embeddings: list[RotaryEmbedding]) -> _Turning:
    """Leaves the model as it was, but for the angles. Raises UnsupportedModelError."""
    register_attention()
    tokens = probe_tokens(model)
    own, training = model.config._attn_implementation, model.training
    layers: dict[int, Layer] = {}
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # of a model with attention code of its own, that it has
    model.eval()
    try:
        _take_over(embeddings, in_its_dtype=False)
        with suppress(UnseenAttentionError):
            layers = checked_layers(model, embeddings, tokens, ATTENTION_NAME, outputs=False)
        _take_over(embeddings, in_its_dtype=True)
        model.set_attn_implementation(own)
        return _first_right(model, _ways_to_turn(embeddings, layers, text_config(model).num_hidden_layers), tokens)
    except BaseException:
        for embedding in embeddings:
            embedding.give_back()
        raise
    finally:
        model.set_attn_implementation(own)
        model.train(training)
        logging.set_verbosity(said)


def _ways_to_turn(embeddings: list[RotaryEmbedding], seen: Mapping[int, Layer], count: int) -> list[_Turning]:
    """All that may be: layers that cannot be seen turn in any way that there is, and a cache of latent attention, whose
    keys turn at their end, has them under one name or the other."""
    unseen = embeddings[0].rotaries if len(seen) < count else embeddings[0].rotaries[:1]
    each = [[seen[n].rotary if n in seen else rotary for n in range(count)] for rotary in unseen]
    ways = [_Turning(rotaries, "keys") for rotaries in each]
    return ways + [_Turning(way.rotaries, "values") for way in ways if way.rotaries[0].at_end]


def _first_right(model: PreTrainedModel, ways: list[_Turning], tokens: Tensor) -> _Turning:
    """Raises UnsupportedModelError of the first if none is."""
    failures = []
    for way in ways:
        try:
            check_distance(model, way.rotaries, tokens, way.kept)
        except UnsupportedModelError as failure:
            failures.append(failure)
        else:
            return way
    raise failures[0]


def _refuse(decoder: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Refuses calls that the model allows but that, with our cache, would be silently wrong."""
    cache = options.get("past_key_values")
    if not isinstance(cache, StreamingCache):
        return
    known: _Known = getattr(decoder, _KNOWN)
    both = zip(known.turning.rotaries, cache.turning.rotaries, strict=False)
    alike = all(one.turns_like(other) for one, other in both) and known.turning.kept == cache.turning.kept
    if not alike or len(cache.layers) < text_config(decoder).num_hidden_layers:
        raise UsageError("this StreamingCache was made for another model, of other rotary angles or fewer layers")
    if options.get("use_cache") is False:
        raise UsageError("use_cache=False with a StreamingCache: give use_cache=True, or no cache")
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        raise UsageError(
            "gradient checkpointing drops the cache: call model.eval() or gradient_checkpointing_disable()"
        )
    mask = options.get("attention_mask", arguments[1] if len(arguments) > 1 else None)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UsageError(
            "attention_mask: a StreamingCache, whose keys are in an order of its own, takes none but all ones"
        )
    if mask is not None and not mask.all():
        raise UsageError(
            "attention_mask with zeros: a StreamingCache has no place for padding; give prompts of one length, or each "
            "its own cache (without a mask, `generate` takes every pad token of a prompt for padding)"
        )
    tokens = options.get("input_ids", arguments[0] if arguments else None)
    tokens = options.get("inputs_embeds") if tokens is None else tokens
    if isinstance(tokens, Tensor) and tokens.shape[1] == 0:
        raise UsageError(
            f"no new tokens: the cache has seen {cache.get_seq_length()}, the text given is not longer; give all of "
            f"the text so far and what is new, or reset() the cache for another text"
        )
    if isinstance(tokens, Tensor):
        _check_length(decoder, cache, tokens.shape[1])
    _check_positions(cache, options.get("position_ids"))


def _check_length(decoder: Any, cache: StreamingCache, new: int) -> None:
    seen, _ = cache.layers[0].get_mask_sizes(new)
    if cache.changes is not None and seen > cache.changes.length:
        raise UsageError(
            f"{new} tokens in one piece are to see {seen}: {type(decoder).__name__} {cache.changes.what} beyond "
            f"{cache.changes.length}; give pieces of at most {max(cache.changes.length - seen + new, 1)}"
        )


def _check_positions(cache: StreamingCache, given: Tensor | None) -> None:
    if given is None:
        return
    if cache.get_seq_length() == 0:
        cache.offset = int(given.flatten()[0])
    first = cache.get_seq_length() + cache.offset
    if not (given == torch.arange(first, first + given.shape[-1], device=given.device)).all():
        raise UsageError(
            f"position_ids: a StreamingCache counts on and turns its sinks by that, the next is {first}; leave them out"
        )


class _SinkTurn:
    """Turns sinks on; the angles are the same in all layers that turn alike."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.distance = 0
        self.angles = rotary.by(0)

    def __call__(self, keys: Tensor, distance: int) -> Tensor:
        if distance != self.distance:
            self.distance, self.angles = distance, self.rotary.by(distance)
        cos, sin = self.angles
        return self.rotary.rotate(keys, (cos.to(keys.device), sin.to(keys.device)))  # layers may be spread


class _Piece(NamedTuple):
    """The keys and values that several tokens attended to, themselves at the end: from it the cache can be had as it
    was before some of them."""

    keys: Tensor
    values: Tensor
    end: int
    """Tokens of the stream up to here."""
    start: int
    """The least it can be cropped to."""


class _RingLayer(CacheLayerMixin):  # type: ignore[misc]
    """Holds sinks, window and the token that looks at them, in `slots`."""

    is_sliding = False
    is_croppable = True

    def __init__(self, policy: EvictionPolicy, turn: _SinkTurn, turned: Kept) -> None:
        super().__init__()
        self.slots = RingSlots(policy.n_sink, policy.kept + 1)
        self.turn = turn
        self.turned: Kept = turned
        self.seen = 0
        """Tokens of the stream so far."""
        self.piece: _Piece | None = None
        """The last, if it was of several tokens."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, size = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch, heads, self.slots.count, size)
        self.values = value_states.new_zeros(batch, heads, self.slots.count, value_states.shape[3])
        self.sink_keys = getattr(self, self.turned)[:, :, : self.slots.n_sink].clone()
        """What turns of the sinks, as the model rotated it: each turn starts from it."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes in keys and values (batch, KV heads, new, head size); returns those the new tokens are to attend to.
        The order of keys is that of the stream, but for a single token, which may see them in any."""
        if not self.is_initialized or (self.seen == 0 and key_states.shape[0] != self.keys.shape[0]):
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.keys.shape[0]:
            raise UsageError(
                f"{key_states.shape[0]} sequences: this StreamingCache has seen {self.seen} tokens of "
                f"{self.keys.shape[0]}; go on with as many, or reset() it"
            )
        sinks = min(self.slots.n_sink - self.seen, key_states.shape[2])
        if sinks > 0:
            turned = key_states if self.turned == "keys" else value_states
            self.sink_keys[:, :, self.seen : self.seen + sinks] = turned[:, :, :sinks]
        if key_states.shape[2] == 1:
            return self._take_one(key_states, value_states)
        return self._take_block(key_states, value_states)

    def _take_one(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.piece = None
        slot = self.slots.of(self.seen)
        self.keys[:, :, slot : slot + 1] = key
        self.values[:, :, slot : slot + 1] = value
        self.seen += 1
        self._turn_sinks()
        held = min(self.seen, self.slots.count)
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _turn_sinks(self) -> None:
        if self.seen > self.slots.count:
            sinks = getattr(self, self.turned)[:, :, : self.slots.n_sink]
            sinks.copy_(self.turn(self.sink_keys, self.seen - self.slots.count))

    def _take_block(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._turn_sinks()
        start, window = self.seen, self.slots.window
        order = [self.slots.of(t) for t in self.slots.held(self.seen)]
        self.seen += keys.shape[2]
        keys = torch.cat((self.keys[:, :, order], keys), dim=2)
        values = torch.cat((self.values[:, :, order], values), dim=2)
        sinks = min(self.slots.n_sink, self.seen)
        self.keys[:, :, :sinks] = keys[:, :, :sinks]
        self.values[:, :, :sinks] = values[:, :, :sinks]
        self._keep_window(keys, values, self.seen)
        if keys.shape[2] <= 2 * self.slots.count:
            self.piece = _Piece(keys, values, self.seen, start)
        else:  # of a long prompt as much as is needed to crop it by a window
            recent = keys[:, :, -2 * window :].clone(), values[:, :, -2 * window :].clone()
            self.piece = _Piece(*recent, self.seen, max(start, self.seen - window))
        return keys, values

    def _keep_window(self, keys: Tensor, values: Tensor, end: int) -> None:
        """Puts the window as it is now into its slots; the last of `keys` is of the token before position `end`."""
        recent = [t for t in self.slots.held(self.seen) if t >= self.slots.n_sink]
        slots, places = [self.slots.of(t) for t in recent], [t - end for t in recent]
        self.keys[:, :, slots] = keys[:, :, places]
        self.values[:, :, slots] = values[:, :, places]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens: so many, if negative; else all beyond that length (transformers up to 5.3).

        Raises UsageError if that would bring back what was evicted: only the last piece of several tokens is held."""
        length = self.seen + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.seen)
        if length < 0:
            raise UsageError(f"crop by {-tokens_to_remove} tokens: the cache has seen {self.seen}")
        if length == self.seen:
            return
        if self.seen > self.slots.count:
            if self.piece is None or length < self.piece.start:
                raise UsageError(
                    f"crop to {length} of {self.seen} tokens: a StreamingCache has evicted what came before; it can "
                    f"be cropped to the beginning of the last piece of several tokens, or while it is not full"
                )
            self.seen = length
            self.keys, self.values = self.keys.clone(), self.values.clone()  # may be of torch's inference mode
            self._keep_window(self.piece.keys, self.piece.values, self.piece.end)
        self.seen = length

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Keys that `query` new tokens (up to transformers 5.3: their positions) see; how many came before those."""
        new = query if isinstance(query, int) else query.shape[0]
        held = min(self.seen, self.slots.count)
        length = min(held + 1, self.slots.count) if new == 1 else held + new
        return length, self.seen + new - length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.3

    def reset(self) -> None:
        self.seen = 0
        self.piece = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda held: held[indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda held: held.repeat_interleave(repeats, dim=0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the sequences of the batch in all that is held."""
        if self.is_initialized:
            self.keys, self.values, self.sink_keys = map(change, (self.keys, self.values, self.sink_keys))
        self.piece = None
