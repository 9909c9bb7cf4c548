"""No token waits for the device: what a step and a prune need to know, the host knows without asking.

A GPU is fed its operators ahead of time; a value asked for, or a number copied there, costs all that is queued.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from streamllm.engine.generation import StreamingCache
from streamllm.errors import UsageError

from .conftest import GOLDEN
from .dispatched import (
    POLICIES,
    RUNS,
    MixedError,
    WaitError,
    decode,
    decoder_of,
    looking,
    no_waiting,
    on_meta,
    one_device,
)
from .tiny_models import tiny_model

TOKENS = torch.from_numpy(np.arange(40) * 7 % 61)


@pytest.mark.parametrize("family", ["GPTNeoX", "Llama"])
@pytest.mark.parametrize(("method", "policy"), [run for run in RUNS if run[0] != "refresh"])
def test_no_step_and_no_prune_waits(method, policy, family):
    loaded = tiny_model(family, torch.float32)
    with looking(no_waiting):
        decode(decoder_of(method, loaded, POLICIES[policy]), TOKENS)


@pytest.mark.parametrize("policy", ["tail", "order"])
def test_refresh_sends_one_list_per_prune_and_does_not_wait_for_it(policy):
    """Which tokens come back is worked out on the host: the one copy to the device that a method makes."""
    lists = []

    def look(func, args, kwargs):
        if func is torch.ops.aten.lift_fresh.default:
            lists.append(args[0])
        else:
            no_waiting(func, args, kwargs)

    decoder = decoder_of("refresh", tiny_model("Llama", torch.float32), POLICIES[policy])
    with looking(look):
        decode(decoder, TOKENS)
    prunes = decoder.schedule.seen // decoder.schedule.policy.compress_every - 1  # the first finds nothing to evict
    assert len(lists) == prunes

    moved = []

    def note(func, args, kwargs):
        one_device(func, args, kwargs)  # lets pass what is not waited for
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            moved.append(func)

    there, stream = on_meta(tiny_model("Llama", torch.float32, num_hidden_layers=1)), TOKENS[:20].to("meta")
    with looking(note):
        decode(decoder_of("refresh", there, POLICIES[policy]), stream)
    assert moved


def test_the_cache_for_transformers_does_not_wait_either():
    """Its own part; a model and its masks are transformers'."""
    model = AutoModelForCausalLM.from_pretrained(str(GOLDEN / "llama-tiny"))
    cache = StreamingCache(model, 2, 5)
    size = model.config.hidden_size // model.config.num_attention_heads
    key, value = torch.ones(2, 1, model.config.num_key_value_heads, 1, size).unbind()
    with looking(no_waiting):
        for _ in range(20):
            cache.update(key, value, 0)


MASK = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[torch.tensor(1)],
        lambda x: x + torch.tensor([1.0]),
        lambda x: x[[0, 1]],
        lambda x: x[MASK],
        lambda x: x.masked_select(MASK),
        lambda x: torch.where(MASK),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.index_put_((MASK,), torch.zeros(())),
    ],
)
def test_what_waits_is_seen(waits):
    with pytest.raises(WaitError), looking(no_waiting):
        waits(torch.ones(3))


@pytest.mark.parametrize(
    "mixes",
    [
        lambda x: x + torch.ones(3),
        lambda x: x * torch.ones(()),
        lambda x: torch.cat((x, torch.ones(3))),
        lambda x: x.index_select(0, torch.zeros(2, dtype=torch.long)),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x + torch.tensor([1.0], device=x.device),
        lambda x: x + x.new_tensor([1.0]),
        lambda x: x[[0, 1]],
        lambda x: x[:, [0]],
    ],
)
def test_what_mixes_devices_is_seen(mixes):
    with pytest.raises((MixedError, WaitError)), looking(one_device):
        mixes(torch.ones(3, 3, device="meta"))


def test_what_does_neither_passes():
    with looking(no_waiting):
        x = torch.ones(3)
        x.masked_fill_(MASK, 0.0).index_copy_(0, torch.zeros(1, dtype=torch.long), torch.full((1,), 3.0))
    with looking(one_device):
        there = torch.ones(3, device="meta")
        there.copy_(torch.ones(3).to("meta", non_blocking=True)).fill_(2.0)
        there[0] = 2.0


def test_a_cluster_that_asks_for_a_token_has_its_remedy_named(monkeypatch):
    import ray

    from orchestrator.workers import cluster

    def refuse(**_):
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UsageError, match="RAY_AUTH_MODE=token before the command"):
        cluster._init(ray, "127.0.0.1:6379")
