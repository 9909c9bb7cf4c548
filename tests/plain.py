"""A policy by plain forward passes over the tokens that survive, and a StreamingCache to hold against it."""

import re
from collections import Counter

import torch
from transformers import DynamicCache

from streamllm.engine.generation import StreamingCache

_ATTENTION = re.compile(r"\b(self_attn|attention|self_attention|attn)(\.\d+)?$")
"""The end of an attention layer's name; a block may have several (LongCat)."""


@torch.no_grad()
def streamed(model, stream, n_sink, window, start=0):
    """The logits after the last token, fed one by one, the first at position `start`."""
    return streamed_each(model, stream, n_sink, window, start)[-1]


@torch.no_grad()
def streamed_each(model, stream, n_sink, window, start=0):
    """The same after each token."""
    cache, found = StreamingCache(model, n_sink, window), []
    for at, token in enumerate(stream.split(1, dim=1), start):
        where = {"position_ids": torch.tensor([[at]])} if start else {}
        found.append(model(token, past_key_values=cache, **where).logits[0, -1])
    return torch.stack(found)


def by_surviving_inputs(model, stream, n_sink, window):
    """The logits after the last token."""
    return surviving_logits(model, stream, n_sink, window)[-1]


def survivors(count, n_sink, window, every=1, slack=0, drop=0):
    """For each of so many tokens those that are left when it comes, and itself: evictions written out anew."""
    held, pruning, total = [], False, n_sink + window
    for t in range(count):
        held.append(t)
        yield list(held)
        pruning |= every > 0 and (t + 1) % every == 0 and len(held) > total + slack
        if pruning:
            most = len(held) - total
            del held[n_sink : n_sink + (min(most, drop) if drop else most)]
            pruning = len(held) > total


@torch.no_grad()
def surviving_logits(model, stream, n_sink, window, keep=False, **policy):
    """The logits after each token, by plain forward passes over the tokens that survive, at positions 0, 1, ..., or at
    those that they keep; a layer's own window is then by these.

    Uses nothing of ours. Every attention layer is fed, for all tokens but the last, the inputs that those had when
    they were last, so that what they know of evicted tokens stays."""
    inputs, calls = {}, Counter()
    before, kept, found = [], [], []

    def feed(name):
        def hook(module, arguments, options):
            hidden = arguments[0] if arguments else options["hidden_states"]
            calls[name] += 1
            call = name, calls[name]  # a layer may be run several times over
            if call in inputs:
                hidden = torch.cat((inputs[call][:, kept], hidden[:, -1:]), 1)
            inputs[call] = hidden
            if arguments:
                return (hidden, *arguments[1:]), options
            return arguments, options | {"hidden_states": hidden}

        return hook

    hooks = [
        module.register_forward_pre_hook(feed(name), with_kwargs=True)
        for name, module in model.named_modules()
        if _ATTENTION.search(name) and _has_weights(module)
    ]
    try:
        for held in survivors(stream.shape[1], n_sink, window, **policy):
            kept[:] = [before.index(token) for token in held[:-1]]
            before = held
            positions = torch.tensor([held]) if keep else torch.arange(len(held))[None]
            calls.clear()
            mask = windows_by_position(model, positions[0]) if keep else None
            output = model(stream[:, held], position_ids=positions, attention_mask=mask, past_key_values=DynamicCache())
            found.append(output.logits[0, -1])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def _has_weights(module):
    return any(True for _ in module.parameters())


def windows_by_position(model, positions):
    """A model's masks, where each layer's window is by positions (n), not by places; None if no layer has one."""
    window, kinds = getattr(model.config, "sliding_window", None), getattr(model.config, "layer_types", None)
    if window is None:
        return None
    distances = positions[:, None] - positions
    full = torch.zeros_like(distances, dtype=model.dtype).masked_fill(distances < 0, torch.finfo(model.dtype).min)
    sliding = full.masked_fill(distances >= window, torch.finfo(model.dtype).min)
    masks = {"full_attention": full[None, None], "sliding_attention": sliding[None, None]}
    return masks if kinds else masks["sliding_attention"]


@torch.no_grad()
def layered_logits(model, stream, policies, keep=False):
    """As `surviving_logits`, where each attention layer has a policy of its own: what `survivors` is called with.

    Uses nothing of ours. The model is called with the newest token alone; each attention layer is fed the inputs that
    its own survivors had when they were last, with what the model itself gives a layer about the places 0, 1, ... (or
    about those that tokens keep): angles and masks, seen in one call over the whole stream."""
    layers = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("self_attn", "attention") and _has_weights(module)
    ]
    assert len(layers) == len(policies)
    about, inputs, now = {}, {layer: [] for layer in layers}, {}

    def note(module, arguments, options):
        about[module] = options["position_embeddings"], options["attention_mask"]

    def feed(module, arguments, options):
        hidden = arguments[0] if arguments else options["hidden_states"]
        inputs[module].append(hidden)
        places = torch.tensor(now[module] if keep else range(len(now[module])))
        angles, mask = about[module]
        options = options | {
            "hidden_states": torch.cat([inputs[module][token] for token in now[module]], dim=1),
            "position_embeddings": tuple(x[:, places] for x in angles),
            "attention_mask": mask[:, :, places][..., places],
        }
        return arguments[1:], options

    def cut(module, arguments, output):
        return (output[0][:, -1:], *output[1:])

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    model(stream, use_cache=False)
    for hook in hooks:
        hook.remove()
    hooks = [layer.register_forward_pre_hook(feed, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(cut) for layer in layers]
    found = []
    try:
        held = zip(*(survivors(stream.shape[1], **policy) for policy in policies), strict=True)
        for t, each in enumerate(held):
            now = dict(zip(layers, each, strict=True))
            found.append(model(stream[:, t : t + 1], use_cache=False).logits[0, -1])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
