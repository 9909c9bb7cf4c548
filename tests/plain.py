"""A policy by plain forward passes over the tokens that survive, and a StreamingCache to hold against it."""

from collections import Counter

import torch
from transformers import DynamicCache

from streamllm.engine.generation import StreamingCache


@torch.no_grad()
def streamed(model, stream, n_sink, window):
    """The logits after the last token, fed one by one."""
    cache = StreamingCache(model, n_sink, window)
    for token in stream.split(1, dim=1):
        logits = model(token, past_key_values=cache).logits[0, -1]
    return logits


def by_surviving_inputs(model, stream, n_sink, window):
    """The logits after the last token."""
    return surviving_logits(model, stream, n_sink, window)[-1]


@torch.no_grad()
def surviving_logits(model, stream, n_sink, window, keep=False):
    """The logits after each token, by plain forward passes over the tokens that survive, at positions 0, 1, ..., or at
    those that they keep.

    Uses nothing of ours. Every attention layer is fed, for all tokens but the last, the inputs that those had when
    they were last, so that what they know of evicted tokens stays."""
    inputs, calls = {}, Counter()
    survivors = []
    kept = []
    found = []

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
        if name.rpartition(".")[2] in ("self_attn", "attention", "self_attention", "attn") and _has_weights(module)
    ]
    try:
        for t in range(stream.shape[1]):
            before = survivors
            if len(before) > n_sink + window:
                before = before[:n_sink] + before[n_sink + 1 :]
            kept = [survivors.index(s) for s in before]
            survivors = [*before, t]
            positions = torch.tensor([survivors]) if keep else torch.arange(len(survivors))[None]
            calls.clear()
            output = model(stream[:, survivors], position_ids=positions, past_key_values=DynamicCache())
            found.append(output.logits[0, -1])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def _has_weights(module):
    return any(True for _ in module.parameters())
