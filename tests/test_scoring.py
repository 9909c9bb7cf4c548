"""Scores of requests are those of one forward pass each, or of decoding, whatever is batched and shared."""

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_logits
from streamllm.engine.decoder import make_decoder
from streamllm.engine.methods.recompute import losses_at
from streamllm.errors import UsageError
from streamllm.harness import scoring
from streamllm.harness.scoring import Request, evaluated, feed, scored
from streamllm.harness.writing import EvaluatingDecoder, Writing, check_decoder, sampler
from streamllm.policy import EvictionPolicy

from .tiny_models import tiny_model

POLICIES = [
    EvictionPolicy(n_sink=2, window_size=9),
    EvictionPolicy(n_sink=3, window_size=7, compress_every=6, cache_slack=2, max_drop=4),
    EvictionPolicy(n_sink=0, window_size=8),
    EvictionPolicy(n_sink=4, window_size=200),
]


@pytest.fixture(scope="module")
def loaded():
    return tiny_model("Llama")


def requests_of(seed=0):
    """Contexts of 1 to 40 tokens with one to five answers each; some that begin alike; a long one."""
    random = np.random.default_rng(seed)

    def some(count):
        return tuple(int(token) for token in random.integers(1, 60, count))

    requests = []
    for length in (1, 3, 17, 17, 30, 40):
        context, start = some(length), some(3)
        requests += [Request(context, start[:1]), Request(context, some(1)), Request(context, start + some(1))]
        requests += [Request(context, start + some(1)), Request(context, some(12))]
    random.shuffle(requests)
    return [Request((1,), some(70)), *requests]


def plain(loaded, policy, request):
    """By one forward pass of the evaluator for one stream."""
    tokens = np.array(request.context + request.answer)
    logits = torch.cat([logits for _, logits in block_logits(loaded, tokens, policy)])[len(request.context) - 1 :]
    answer = torch.tensor(request.answer)
    likelihood = logits.log_softmax(-1).gather(-1, answer[:, None]).sum()
    return float(likelihood), bool((logits.argmax(-1) == answer).all())


@pytest.mark.parametrize("most", [16, 60, 4096])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_batches_and_shared_contexts_change_nothing(loaded, policy, most, monkeypatch):
    monkeypatch.setattr(scoring, "default_block", lambda _: most)
    requests = requests_of()
    for request, score in zip(requests, evaluated(loaded, policy, requests), strict=True):
        likelihood, greedy = plain(loaded, policy, request)
        assert score.log_likelihood == pytest.approx(likelihood, abs=1e-9)
        assert score.is_greedy == greedy


def greedy_answer(loaded, policy, context, count):
    decoder = make_decoder(loaded, Configuration("ring", policy))
    logits, answer = list(feed(decoder, [policy], torch.tensor(context), len(context) - 1))[-1], []
    for _ in range(count):
        answer.append(int(logits.argmax()))
        logits = decoder.feed(torch.tensor(answer[-1:]))
    return tuple(answer)


@torch.inference_mode()
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_an_answer_is_greedy_if_decoding_writes_it(loaded, policy):
    context = requests_of()[0].answer[:30]
    answer = greedy_answer(loaded, policy, context, 6)
    wrong = (*answer[:-1], (answer[-1] + 1) % 60)
    found = evaluated(loaded, policy, [Request(context, answer), Request(context, wrong), Request(context, answer[:1])])
    assert [score.is_greedy for score in found] == [True, False, True]


@torch.inference_mode()
@pytest.mark.parametrize("method", ["ours", "ring", "mit"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_is_fed_in_pieces_is_what_is_fed_token_by_token(loaded, policy, method):
    tokens = torch.tensor(requests_of()[0].answer)
    what = Configuration(method, policy)
    pieces = torch.cat(list(feed(make_decoder(loaded, what), [policy], tokens, 20)))
    one = make_decoder(loaded, what)
    single = torch.cat([one.feed(token) for token in tokens.split(1)])[20:]
    torch.testing.assert_close(pieces, single, atol=1e-9, rtol=0)


def test_recomputation_is_scored_by_its_own_losses(loaded):
    policy = EvictionPolicy(n_sink=0, window_size=12)
    tokens = requests_of()[0].answer
    just_beside = [Request(tokens[:8], tokens[8:end]) for end in range(11, 16)]  # the window's length, and one more
    requests = [*just_beside, *(request for request in requests_of() if request.queries > 1)]
    for request, score in zip(requests, scored(loaded, Configuration("recompute", policy), requests), strict=True):
        tokens, first = np.array(request.context + request.answer), len(request.context) - 1
        losses = losses_at(loaded, tokens, 12, range(first, len(tokens) - 1), Configuration("ours", policy).kernel)
        assert score.log_likelihood == pytest.approx(-losses.sum(), abs=1e-9)


class Letters:
    """A tokenizer of numbers: 5 is `5 `."""

    def encode(self, text, add_special_tokens=True):
        return [int(word) for word in text.split()]

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(f"{token} " for token in tokens)


@pytest.mark.parametrize("method", ["ours", "ring", "mit", "dense", "recompute"])
def test_text_is_what_greedy_decoding_writes_until_it_stops(loaded, method):
    policy = EvictionPolicy(n_sink=2, window_size=9, compress_every=3)
    what, prompt = Configuration(method, policy), requests_of()[0].answer[:30]
    decoder, written = make_decoder(loaded, what), []
    with torch.inference_mode():
        for token in prompt:
            logits = decoder.feed(torch.tensor([token]))
        for _ in range(8):
            written.append(int(logits.argmax()))
            logits = decoder.feed(torch.tensor(written[-1:]))
    pick = sampler({}, loaded.device, 0).pick
    whole = Writing(loaded, Letters(), what).write(prompt, [], 8, pick)
    assert whole == Letters().decode(written)
    stop = f"{written[3]} {written[4]} "
    until = Letters().decode(written).index(stop) + len(stop)
    assert Writing(loaded, Letters(), what).write(prompt, [stop], 8, pick) == whole[:until]
    if method != "recompute":
        assert Writing(loaded, Letters(), what, "evaluator").write(prompt, [], 8, pick) == whole


@torch.inference_mode()
def test_the_evaluator_decodes_as_the_method(loaded):
    policy, tokens = POLICIES[1], torch.tensor(requests_of()[0].answer)
    what = Configuration("ring", policy)
    evaluator, ring = EvaluatingDecoder(loaded, what, 70), make_decoder(loaded, what)
    expected = torch.cat([ring.feed(token) for token in tokens.split(1)])
    found = [evaluator.feed(tokens[:40], 0), evaluator.feed(tokens[40:41]), evaluator.feed(tokens[41:], 5)]
    torch.testing.assert_close(torch.cat(found), torch.cat((expected[:41], expected[-5:])), atol=1e-9, rtol=0)


def test_what_cannot_be_meant_is_refused(loaded):
    with pytest.raises(UsageError, match="decoder 'ring': must be method or evaluator"):
        check_decoder("ring", "ring")
    with pytest.raises(UsageError, match="method 'recompute' is not what it computes"):
        check_decoder("evaluator", "recompute")
    with pytest.raises(UsageError, match="generation_kwargs num_beams 4: not known"):
        sampler({"num_beams": 4}, loaded.device, 0)
