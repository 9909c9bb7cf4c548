"""What the source documents report as failures, held to what is measured today (`tests/benchmarks/cliff`,
`tests/benchmarks/negative_results`), on a scale of seconds."""

import json
import sys

import numpy as np
import pytest
import torch
import transformers

from streamllm.__main__ import main
from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop, negative_log_likelihood
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.engine.methods.negative.refresh import thinned
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import EvictionPolicy, RefreshPolicy, Schedule, evicted_before, peak_kv, with_derived_window

from .tiny_models import BASE, tiny_model


@pytest.fixture(scope="module")
def testbed():
    return load_model("testbed", "float32")


@pytest.fixture(scope="module")
def text(testbed):
    source = TextSource(max_eval_tokens=1400)
    return load_tokens(source, load_tokenizer("testbed"), testbed.model.config.vocab_size).tokens


def test_the_cliff_is_where_the_trained_range_ends_and_not_where_r_is_128(testbed, text):
    """The embedded model was trained on 256 positions: at R = 128 a nominal total of 256 grows to 384."""

    def percent_over_vanilla(total, accounting):
        lazy, vanilla = (
            block_parallel_losses(
                testbed, text, with_derived_window(EvictionPolicy(compress_every=r), total, accounting)
            )
            for r in (128, 1)
        )
        return 100 * np.expm1((lazy - vanilla)[400:].mean())

    assert percent_over_vanilla(256, "nominal") > 30
    assert abs(percent_over_vanilla(256, "peak")) < 3
    assert abs(percent_over_vanilla(128, "nominal")) < 3, "the same R and growth, within the trained range"


class EveryQueryByItself:
    """Attention over a whole text at once, from a list, per query, of the tokens it sees in cache order: keys are
    rotated at their place in the list, or in the stream if they `keep` that, the query as the last."""

    def __init__(self, loaded, seen, keep=False):
        self.rotary, self.seen, self.keep = loaded.layers[0].rotary, seen, keep

    def attend(self, layer, query, key, value, scaling):
        outputs = []
        for t, tokens in enumerate(self.seen):
            angles = self.rotary.turn(torch.tensor(tokens) if self.keep else torch.arange(len(tokens)))
            keys = self.rotary.rotate(key[:, :, tokens], angles)
            last = tuple(part[-1:] for part in angles)
            logits = self.rotary.rotate(query[:, :, t : t + 1], last) @ keys.transpose(-1, -2)
            outputs.append((logits * scaling).softmax(-1) @ value[:, :, tokens])
        return torch.cat(outputs, dim=2)


def seen_with_refresh(policy, n_queries):
    """By the definition: a list per query, itself last."""
    sinks, window, refreshed, fresh, seen = [], [], [], [], []
    counts = Schedule(policy)
    for t in range(n_queries):
        behind = window + refreshed if policy.refresh_position == "tail" else refreshed + window
        seen.append(sinks + behind + fresh + [t])
        (sinks if t < policy.n_sink else fresh).append(t)
        if drop := counts.after_token():
            recent = sorted(window + fresh)
            passed_by = sorted(refreshed + recent[: -policy.window_size])
            refreshed = [passed_by[i] for i in thinned(passed_by, drop)]
            window, fresh = recent[-policy.window_size :], []
    return seen


@pytest.mark.parametrize("position", ["tail", "order"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"compress_every": 7, "cache_slack": 2},
        {"compress_every": 9, "max_drop": 4},
        {"compress_every": 9, "max_drop": 4, "positions": "keep"},
    ],
)
def test_a_refreshing_cache_is_what_its_definition_says(position, more):
    policy = RefreshPolicy(n_sink=3, window_size=12, refresh_budget=5, refresh_position=position, **more)
    loaded, tokens = tiny_model("GPTNeoX"), np.random.default_rng(0).integers(61, size=81)
    run = decode_loop(make_decoder(loaded, Configuration("refresh", policy)), tokens, loaded.device)
    seen = seen_with_refresh(policy, 80)
    stream, raw = torch.from_numpy(tokens), torch.zeros(80, dtype=torch.long)
    with torch.inference_mode():
        logits = loaded.forward(
            stream[None, :-1], raw, EveryQueryByItself(loaded, seen, policy.keeps_positions)
        ).logits[0]
    np.testing.assert_allclose(run.losses, negative_log_likelihood(logits, stream[1:]), rtol=0, atol=1e-9)
    without = EvictionPolicy(n_sink=3, window_size=17, **more)
    assert run.peak_kv == peak_kv(policy, 80) == peak_kv(without, 80), "the total is what it is without refresh"
    assert max(abs(run.losses - block_parallel_losses(loaded, tokens, without))) > 0.1


def test_what_is_refreshed_is_spread_over_all_that_passed_by():
    assert thinned([10, 20, 21, 30, 50], 2) == [0, 3, 4], "20 and 21 go: their neighbours are closest together"
    assert thinned([10, 20], 1) == [0]
    held: list[int] = []
    for position in range(4, 2004):
        held.append(position)
        held = [held[i] for i in thinned(held, max(len(held) - 16, 0))]
    gaps = np.diff(held)
    assert (held[0], held[-1], len(held)) == (4, 2003, 16)
    assert 60 <= gaps[:-1].min() <= gaps[:-1].max() <= 260, "2000 / 15 is 133"


@pytest.fixture
def evaluate(tmp_path, capsys, monkeypatch):
    """Runs the command in an empty folder; returns its exit code, what it printed and what it complained of."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["streamllm", "evaluate", *options])
        code = main()
        return code, *capsys.readouterr()

    return run


def saved(folder, tokens, model):
    """The options that name a model and a text saved there."""
    model.save_pretrained(folder / "model")
    (folder / "ids.json").write_text(json.dumps(np.random.default_rng(0).integers(61, size=tokens).tolist()))
    options = ["--model", str(folder / "model"), "--token-ids", str(folder / "ids.json")]
    return [*options, "--protocol", "decode-loop", "--json"]


@pytest.fixture
def evaluated(evaluate, tmp_path):
    """The record of a small model trained on 64 positions, which are the total."""
    options = saved(tmp_path, 200, tiny_model("GPTNeoX", torch.float32, max_position_embeddings=64).model)

    def run(*more):
        code, printed, _ = evaluate(*options, *more)
        assert code == 0
        return json.loads(printed)

    return run


def test_an_overlap_at_a_constant_total_is_a_window_of_another_name(evaluated):
    keys = ("window_size", "peak_kv", "perplexity", "evaluated_tokens")
    plain = evaluated("--compress-every", "16", "--per-token-losses", "plain.npy")
    overlap = evaluated("--compress-every", "16", "--overlap", "8", "--per-token-losses", "overlap.npy")
    assert {key: plain[key] for key in keys} == {key: overlap[key] for key in keys}
    assert np.array_equal(np.load("plain.npy"), np.load("overlap.npy")), "to the last bit"
    assert (overlap["window_size"], overlap["same_policy_as"]) == (60, "overlap 0")
    given = evaluated("--compress-every", "16", "--window-size", "52", "--overlap", "8")
    assert {key: given[key] for key in keys} == {key: plain[key] for key in keys}, "a given window is what it says"


def test_an_overlap_taken_literally_sees_what_the_wider_window_sees():
    """A prune that leaves W + o tokens, on lists, without any schedule."""
    window, overlap, interval, cache, evicted = 20, 6, 8, [], []
    for t in range(200):
        evicted.append(t - len(cache))
        cache.append(t)
        if (t + 1) % interval == 0 and len(cache) > 4 + window + overlap:
            cache = cache[:4] + cache[-window - overlap :]
    wider = EvictionPolicy(n_sink=4, window_size=window + overlap, compress_every=interval)
    assert evicted_before(wider, 200) == evicted


def test_refresh_by_the_command_keeps_the_total(evaluated):
    found = evaluated("--compress-every", "16", "--refresh-budget", "8", "--refresh-position", "order")
    names = ("method", "window_size", "refresh_budget", "refresh_position", "peak_kv")
    assert [found[name] for name in names] == ["refresh", 52, 8, "order", 64 + 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--refresh-budget", "8", "--protocol", "fast"],
            "protocol 'fast': method 'refresh' is measured by decode-loop only",
        ),
        (["--refresh-budget", "8", "--method", "ring"], "refresh_budget 8: method 'ring' keeps a window only"),
        (["--refresh-budget", "-1"], "refresh_budget -1: must be a whole number >= 0"),
        (["--overlap", "-1"], "overlap -1: must be a whole number >= 0"),
        (["--overlap", "252"], "overlap 252 and refresh_budget 0: the total leaves 252 tokens"),
        (["--method", "refresh", "--protocol", "decode-loop"], "method 'refresh': needs a budget"),
    ],
)
def test_what_cannot_be_meant_says_so_in_a_line(options, message, evaluate):
    code, printed, complaint = evaluate(*options)
    assert (code, printed) == (2, "")
    assert complaint.startswith(f"error: {message}") and complaint.count("\n") == 1


@pytest.fixture
def overflowing(tmp_path):
    """A model whose logits pass float16's 65504, though its queries and keys do not."""
    model = tiny_model("Llama", torch.float32).model
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 200
            layer.self_attn.k_proj.weight *= 200
    return [*saved(tmp_path, 60, model), "--window-size", "20"]


def test_eager_attention_that_overflows_in_float16_is_a_failure_and_no_number(evaluate, overflowing):
    """Nor does the evaluator make a number of it, whose logits overflow where eager ones do."""
    for options in (["--attn-backend", "eager"], ["--protocol", "fast"]):
        code, printed, complaint = evaluate(*overflowing, "--dtype", "float16", *options)
        assert (code, printed) == (1, ""), complaint
        assert "is nan in torch.float16" in complaint and "use --dtype bfloat16 or float32" in complaint
    for dtype, backend in (("bfloat16", "eager"), ("float16", "auto")):
        code, printed, _ = evaluate(*overflowing, "--dtype", dtype, "--attn-backend", backend)
        assert code == 0, (dtype, backend)
        assert np.isfinite(json.loads(printed)["perplexity"])


def test_transformers_static_cache_ends_where_the_ring_goes_on():
    loaded, tokens = tiny_model("Llama", torch.float32), np.random.default_rng(0).integers(61, size=82)
    ring = make_decoder(loaded, Configuration("ring", EvictionPolicy(n_sink=4, window_size=11)))
    assert np.isfinite(decode_loop(ring, tokens, loaded.device).losses).all()
    assert ring.cache.keys[0].shape[2] == 16, "slots for S + W and the query's own key"

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).eval()
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.inference_mode(), pytest.raises(IndexError, match="out of bounds"):
        for position, token in enumerate(tokens[:17]):
            at = torch.tensor([position])
            model(torch.tensor([[token]]), past_key_values=cache, position_ids=at[None], cache_position=at)
    assert position == 16
