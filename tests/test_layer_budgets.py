"""Layers that hold different numbers of tokens under one mean total."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.search.front_sampler import Candidates
from orchestrator.search.points import check_possible, configuration_of, point_of
from search_spaces import SpaceError, load_matrix, load_space
from streamllm import __main__ as commands
from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_logits
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.loading import prepare
from streamllm.engine.methods import OFFERED
from streamllm.engine.methods.ring import RingCache
from streamllm.errors import UsageError
from streamllm.harness.scoring import Request, feed, scored
from streamllm.measuring.evaluation import evaluate_chunked, evaluate_decode_loop, evaluate_fast, measure_quality
from streamllm.measuring.text import TokenStream
from streamllm.measuring.timing import Reference
from streamllm.policy import (
    EvictionPolicy,
    PolicyError,
    evicted_before,
    for_chunks,
    longest_kv,
    peak_kv,
    steady_state,
    with_derived_window,
)
from streamllm.results.schema import Row

from .dispatched import decode, looking, no_waiting
from .plain import layered_logits, surviving_logits
from .refusals import run
from .test_layer_kinds import IDENTITY, in_double, ring_logits_far_on, streamed_logits, tokens_of
from .tiny_models import random_models, tiny_model
from .zoo import KINDS, tiny

WAYS = ("evaluator", "ring", "mit")
WORDS = ("pyramid:50", "pyramid:-80", "retrieval:1/2:25", "retrieval:3:40", "9,18,4+5,0+24", "2+1,30,14,13")
"""Of a mean of 15 tokens, two of them sinks unless they say so, in four layers."""
SOFTLITE = {"compress_every": 4, "cache_slack": 2, "max_drop": 3}


def policy_of(word, mean=15, **more):
    return EvictionPolicy(n_sink=2, window_size=mean - 2, layer_budgets=word, **more)


def budgets(word, n_layers, total=100, n_sink=4):
    policy = EvictionPolicy(n_sink=n_sink, window_size=total - n_sink, layer_budgets=word)
    return [(own.n_sink, own.window_size) for own in policy.of_layers(n_layers)]


def test_what_the_words_mean():
    assert budgets("uniform", 3) == [(4, 96)] * 3
    assert budgets("pyramid:50", 4) == [(4, 144), (4, 112), (4, 80), (4, 48)]
    assert budgets("pyramid:-50", 3) == [(4, 48), (4, 96), (4, 144)]
    assert budgets("pyramid:50", 1) == [(4, 96)]
    assert budgets("retrieval:1/2:25", 4) == [(4, 168)] * 2 + [(4, 24)] * 2
    assert budgets("retrieval:2/3:50", 3) == [(4, 48), (4, 192), (4, 48)]
    assert budgets("retrieval:2,0:50", 3, total=9) == [(4, 7), (4, 2), (4, 6)], "what cannot be halved: to the first"
    assert budgets("150,4+46,0+100", 3) == [(4, 146), (4, 46), (0, 100)]


words = st.one_of(
    st.builds("pyramid:{}".format, st.integers(-99, 99).filter(bool)),
    st.builds("retrieval:{}/{}:{}".format, st.integers(1, 2), st.integers(2, 3), st.integers(1, 99)),
    st.builds("retrieval:{},{}:{}".format, st.integers(0, 3), st.integers(0, 3), st.integers(1, 99)),
)


@given(words, st.integers(4, 40), st.integers(0, 8), st.integers(1, 4000))
def test_the_mean_is_exact(word, n_layers, n_sink, window):
    try:
        found = budgets(word, n_layers, n_sink + window, n_sink)
    except PolicyError as error:
        assert window < 100 and "raise the total" in str(error)
        return
    assert sum(own for _, own in found) == n_layers * window and {sinks for sinks, _ in found} == {n_sink}
    assert min(own for _, own in found) >= 1


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("pyramid", "must be one of uniform, pyramid:PERCENT"),
        ("pyramid:100", "-99 to 99"),
        ("pyramid:0", "-99 to 99"),
        ("retrieval:3/2:50", "no part 3 of 2"),
        ("retrieval:1/1:50", "no part 1 of 1"),
        ("10,11", "the mean of its 2 totals, 10.5, must be a whole number; take 1 off"),
        ("10,,11", "TOTAL,..."),
        (7, "must be one of uniform"),
    ],
)
def test_what_no_model_can_have_is_refused(word, reason):
    with pytest.raises(PolicyError, match=reason):
        EvictionPolicy(layer_budgets=word)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("15,15", "has 2 totals; the model has 4 layers"),
        (
            "16,16,16,16",
            r"mean of its totals is 16, n_sink 2 \+ window_size 13 is 15; leave out window_size, or give 14",
        ),
        ("1,15,15,29", "leaves layer 0 a window of -1 behind 2 sinks"),
        ("retrieval:4:50", "of the model's 4 layers, 0 to 3, some must be meant"),
        ("retrieval:2/9:50", "some must be meant"),
        ("retrieval:0,1,2,3:50", "and not all"),
    ],
)
def test_what_the_model_cannot_have_is_refused(word, reason):
    with pytest.raises(PolicyError, match=reason):
        policy_of(word).of_layers(4)


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize(
    ("architecture", "word"),
    [
        *(("llama", word) for word in WORDS),
        *((name, word) for name in ("gpt_neox", "gemma3_text", "gpt_oss") for word in (WORDS[0], WORDS[-1])),
    ],
)
def test_every_way_is_the_models_own_forward(architecture, word, positions):
    """Against `plain`, which knows nothing of ours: each layer over its own survivors, at places in its own cache. Two
    of four layers of the last two architectures have a window of their own, which some budgets exceed."""
    changed, tokens = KINDS[architecture] | {"num_hidden_layers": 4}, tokens_of(60)
    model, loaded = tiny(architecture, **changed), prepare(tiny(architecture, **changed), architecture, "")
    policy = policy_of(word, positions=positions, **SOFTLITE)
    alone = [
        {"n_sink": own.n_sink, "window": own.window_size, "every": 4, "slack": 2, "drop": 3}
        for own in policy.of_layers(4)
    ]
    with in_double():
        stream = torch.from_numpy(tokens)[None, :-1]
        expected = layered_logits(model, stream, alone, keep=positions == "keep").log_softmax(-1)
        for way in WAYS:
            found = streamed_logits(way, loaded, policy, tokens).log_softmax(-1)
            torch.testing.assert_close(
                found, expected, rtol=0, atol=IDENTITY, msg=lambda text, way=way: f"{way}: {text}"
            )


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_two_references_are_one_where_all_layers_are_alike(architecture):
    model, stream = tiny(architecture, **KINDS[architecture]), torch.from_numpy(tokens_of(50))[None]
    policy = {"n_sink": 2, "window": 9, "every": 4, "slack": 2, "drop": 3}
    count = model.config.num_hidden_layers
    for keep in (False, True):
        expected = surviving_logits(model, stream, keep=keep, **policy)
        torch.testing.assert_close(layered_logits(model, stream, [policy] * count, keep), expected, rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(
    random_models(),
    words,
    st.sampled_from(["ring", "mit"]),
    st.integers(0, 4),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from(["auto", "float16", "float8_e4m3"]),
    st.integers(1, 40),
)
def test_the_evaluator_is_the_loop(loaded, word, method, n_sink, every, slack, drop, kv_dtype, block):
    policy = EvictionPolicy(
        n_sink=n_sink, window_size=14, compress_every=every, cache_slack=slack, max_drop=drop, kv_dtype=kv_dtype,
        layer_budgets=word,
    )  # fmt: skip
    try:
        policy.of_layers(len(loaded.layers))
    except PolicyError:
        assume(False)
    tokens = np.random.default_rng(0).integers(61, size=60)
    what = Configuration(method, policy)
    found = torch.cat([logits for _, logits in block_logits(loaded, tokens, what.effective, block, keys=what.keys)])
    torch.testing.assert_close(found, streamed_logits(method, loaded, policy, tokens), rtol=0, atol=IDENTITY)


def test_a_million_tokens_on():
    """A ring in float32, told that a million tokens came and went behind each layer's sinks."""
    policy, tokens = EvictionPolicy(n_sink=4, window_size=11, layer_budgets="24,12,9,15"), tokens_of(60) % 61
    expected = streamed_logits("evaluator", tiny_model("Llama", num_hidden_layers=4), policy, tokens)
    found = ring_logits_far_on(tiny_model("Llama", torch.float32, num_hidden_layers=4), policy, tokens)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


def test_peaks_are_those_of_the_caches():
    """The largest mean is what decoding finds, weighted by the bytes of layers where these differ; a layer's own is in
    the warning."""
    loaded, policy = tiny_model("Llama", num_hidden_layers=4), policy_of("retrieval:1/4:25", **SOFTLITE)
    tokens = np.random.default_rng(0).integers(61, size=80)
    run = decode_loop(make_decoder(loaded, Configuration("ring", policy)), tokens, loaded.device)
    assert run.peak_kv == peak_kv(policy, 79, loaded.kv_sizes) > 15
    assert longest_kv(policy, 79, 4) == peak_kv(policy.of_layers(4)[0], 79) > 2 * run.peak_kv
    assert peak_kv(policy_of("5,25"), 79, [1, 0]) == 6 and peak_kv(policy_of("5,25"), 79, [1, 3]) == 21
    short = tiny_model("Llama", num_hidden_layers=4, max_position_embeddings=20)
    for word, warned in (("uniform", False), ("pyramid:50", True), ("pyramid:10", False)):
        quality = measure_quality(short, Configuration("ring", policy_of(word)), TokenStream(tokens, "random", ""))
        assert quality.peak_kv == 16
        assert ("queries attend to up to 22 keys, the model was trained on 20" in str(quality.warning)) == warned


@given(words, st.integers(1, 9), st.integers(0, 5), st.integers(0, 5))
def test_a_cycle_is_one_of_every_layer(word, every, slack, drop):
    policy = policy_of(word, 40, compress_every=every, cache_slack=slack, max_drop=drop)
    try:
        steady = steady_state(policy, 5)
    except PolicyError:
        assume(False)
    for own in policy.of_layers(5):
        held = [t - gone for t, gone in enumerate(evicted_before(own, steady.start + 3 * steady.cycle))]
        cycles = [held[steady.start + i * steady.cycle :][: steady.cycle] for i in range(3)]
        assert cycles[0] == cycles[1] == cycles[2]


def test_a_ring_holds_what_its_layers_hold():
    loaded, policy = tiny_model("Llama", num_hidden_layers=4), policy_of("9,18,4+5,0+24", max_drop=0)
    decoder = make_decoder(loaded, Configuration("ring", policy))
    static = []
    for token in torch.arange(40).split(1):
        decoder.feed(token)
        static.append(decoder.cache.is_static)
    held = [part.keys[place].shape[2] for part, place in decoder.cache.places]
    assert held == [10, 19, 10, 25] and decoder.kv_length == 15
    assert static == [False] * 24 + [True] * 16, "when the longest is full"
    assert not decoder.cache.keys, "nothing but what the parts hold"


def test_one_budget_for_all_is_the_plain_ring():
    decoder = make_decoder(tiny_model("Llama"), Configuration("ring", policy_of("15,15")))
    assert type(decoder.cache) is RingCache and decoder.schedule.policy == policy_of("uniform")


@pytest.mark.parametrize("word", ["pyramid:50", "2+1,30,14,13"])
def test_a_compiled_ring(word):
    loaded, policy = tiny_model("Llama", torch.float32, num_hidden_layers=4), policy_of(word)
    tokens = np.random.default_rng(0).integers(61, size=60)
    found, expected = (streamed_logits("ring", loaded, policy, tokens, execution=how) for how in ("compile", "eager"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", ["ring", "mit"])
def test_no_step_and_no_prune_waits_for_the_device(method):
    loaded = tiny_model("Llama", torch.float32, num_hidden_layers=4)
    decoder = make_decoder(loaded, Configuration(method, policy_of("pyramid:50", **SOFTLITE)))
    with looking(no_waiting):
        decode(decoder, torch.arange(40))


def test_every_protocol():
    """A time is taken of the steady state of all layers; the losses are the same, whoever computes them."""
    loaded, policy = tiny_model("Llama", torch.float32, num_hidden_layers=4), policy_of("pyramid:-50", compress_every=4)
    stream = TokenStream(np.random.default_rng(0).integers(61, size=300), "random", "")
    reference, what = Reference.start(loaded, 15, stream.tokens), Configuration("ring", policy)
    fast, record = evaluate_fast(loaded, what, stream, reference)
    looped, of_loop = evaluate_decode_loop(loaded, what, stream, reference)
    np.testing.assert_allclose(looped.losses, fast.losses, rtol=0, atol=1e-4)
    assert record["tokens_per_segment"] % 4 == 0 and record["peak_kv"] == of_loop["peak_kv"] == 19
    _, of_chunks = evaluate_chunked(loaded, replace(what, policy=for_chunks(policy, 40)), stream, reference)
    assert of_chunks["peak_kv"] == 15 + 32
    with pytest.raises(UsageError, match=r"prefill_tokens 20: must exceed n_sink \+ window_size = 21"):
        evaluate_chunked(loaded, replace(what, policy=for_chunks(policy, 20)), stream, reference)


def test_answers_of_tasks():
    """By the evaluator, many at once; and decoded, after a prompt in pieces that no layer evicts in."""
    loaded, what = tiny_model("Llama", num_hidden_layers=4), Configuration("ring", policy_of("pyramid:50", **SOFTLITE))
    tokens = np.random.default_rng(0).integers(61, size=51)
    expected = streamed_logits("mit", loaded, what.policy, tokens)
    with torch.inference_mode():
        pieces = feed(make_decoder(loaded, what), what.policy.of_layers(4), torch.from_numpy(tokens[:-1]), 39)
        torch.testing.assert_close(torch.cat(list(pieces)), expected[39:], rtol=0, atol=IDENTITY)
    likely = expected.log_softmax(-1)
    answers = [tokens[40:43], tokens[40:51], tokens[41:51]]
    requests = [Request(tuple(tokens[:40].tolist()), tuple(answer.tolist())) for answer in answers]
    found = [one.log_likelihood for one in scored(loaded, what, requests)]
    wanted = [sum(float(likely[39 + i, token]) for i, token in enumerate(answer)) for answer in answers[:2]]
    assert found[:2] == pytest.approx(wanted, abs=1e-9)
    assert found[2] == pytest.approx(scored(loaded, what, requests[2:])[0].log_likelihood, abs=1e-9)


@pytest.mark.parametrize("method", [name for name in OFFERED if name not in ("ring", "mit")])
def test_methods_that_cannot_are_refused(method):
    with pytest.raises(UsageError, match=f"method '{method}' holds as many tokens in every layer; use uniform, or --m"):
        _ = Configuration(method, policy_of("pyramid:50")).effective


def test_what_knows_one_schedule_is_refused():
    policy = policy_of("pyramid:50")
    for asked in (lambda: evicted_before(policy, 9), lambda: with_derived_window(policy, 15, "peak")):
        with pytest.raises(PolicyError, match="knows one schedule for all layers; use uniform"):
            asked()
    ended = run(commands.main, "diagnose", "--layer-budgets", "pyramid:50")
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("diagnose knows one schedule for all layers; use uniform, or evaluate")


def test_a_window_that_a_list_gives():
    assert with_derived_window(policy_of("10,20"), 20).window_size == 13
    with pytest.raises(PolicyError, match="mean of its totals is 15, must be from 3 to 14"):
        with_derived_window(policy_of("10,20", cache_slack=1), 15)
    assert with_derived_window(policy_of("pyramid:50"), 20).window_size == 18


def test_without_evictions_they_mean_nothing():
    assert policy_of("pyramid:50", compress_every=0).canonical == policy_of("uniform", compress_every=0)


SPACE = """
parameters:
  method: [ring, mit]
  n_sink: 2
  layer_budgets: [uniform, pyramid:50, "retrieval:1/2:25", "10,20"]
"""


def test_a_space_searches_them(tmp_path):
    (tmp_path / "s.yaml").write_text(SPACE)
    space = load_space(str(tmp_path / "s.yaml"))
    whats = {str(configuration_of(point, space, 15)): point for point in space.points()}
    assert len(whats) == 8 and all("W=13" in name for name in whats)
    for name, point in whats.items():
        what = configuration_of(point, space, 15)
        row = Row.of({"method": what.method, "backend_requested": "auto", "execution": "eager", **asdict(what.policy)})
        assert point_of(row, space, 15) == point and str(Configuration.of_row(row)) == name
    assert len(Candidates(space, 15, 0).representatives) == 4, "policies"
    assert "layer_budgets" not in load_space("default").parameters
    (tmp_path / "s.yaml").write_text(SPACE.replace("[ring, mit]", "ours"))
    check_possible(load_space(str(tmp_path / "s.yaml")), 15)  # uniform is
    for wrong, why in (("pyramid:100", "layer_budgets 'pyramid:100': must be one of uniform"), ("[]", "at least one")):
        (tmp_path / "s.yaml").write_text(f"parameters:\n  layer_budgets: {wrong}\n")
        with pytest.raises(SpaceError, match=f"line 2: .*{why}"):
            load_space(str(tmp_path / "s.yaml"))


def test_a_matrix_may_have_them(tmp_path):
    (tmp_path / "m.yaml").write_text("matrix:\n  method: ring\n  layer_budgets: [uniform, pyramid:20]\n")
    assert [cell.layer_budgets for cell in load_matrix(str(tmp_path / "m.yaml")).cells()] == ["uniform", "pyramid:20"]
    (tmp_path / "m.yaml").write_text("matrix:\n  method: ring\n  layer_budgets: [uniform, pyramid]\n")
    with pytest.raises(SpaceError, match="line 3: layer_budgets 'pyramid': must be one of"):
        load_matrix(str(tmp_path / "m.yaml"))


def test_a_command_measures_it(tmp_path):
    rows = []
    for number, word in enumerate(("uniform", "4+36,10,70,70,100,70")):
        command = ["evaluate", "--max-eval-tokens", "400", "--method", "ring", "--mode", "streaming", "--threads", "1"]
        command += ["--layer-budgets", word, "--store", str(tmp_path / "store"), "--output", str(tmp_path / "a.json")]
        command += ["--window-size", "56"] * (not number)
        ended = run(commands.main, *command)
        assert ended.returncode == 0, ended.stderr
        rows.append(json.loads((tmp_path / "a.json").read_text())["streaming"])
    assert [row["layer_budgets"] for row in rows] == ["uniform", "4+36,10,70,70,100,70"]
    assert rows[0]["window_size"] == rows[1]["window_size"] == 56
    assert rows[0]["peak_kv_mib"] == rows[1]["peak_kv_mib"] > 0
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    for word, why in (("50,70", "has 2 totals; the model has 6 layers"), ("300,300", "300, must be from 5 to 256")):
        ended = run(commands.main, *command, "--layer-budgets", word)
        assert ended.returncode == 2 and why in ended.stderr and ended.stderr.count("\n") == 1
