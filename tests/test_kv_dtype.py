"""Caches of another number format than the model: what is kept, what it is rounded to, and everything that names it.

That every method's loop and the evaluator round the same, at any policy, is in `test_exactness`."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from orchestrator.search.front_sampler import Candidates
from orchestrator.search.points import configuration_of, point_of
from search_spaces import load_space
from streamllm.__main__ import main
from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.errors import UsageError
from streamllm.harness.scoring import Request, scored
from streamllm.harness.writing import EvaluatingDecoder
from streamllm.measuring.conditions import Conditions
from streamllm.measuring.jobs import Job
from streamllm.measuring.keys import Keys, task_key
from streamllm.measuring.text import TextSource, TokenStream
from streamllm.measuring.timing import bytes_per_token
from streamllm.policy import KV_DTYPES, EvictionPolicy
from streamllm.results.schema import Row, knobs_in_short, words_of

from .tiny_models import tiny_model

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn}
METHODS = ("mit", "ours", "ring")
POLICY = EvictionPolicy(n_sink=3, window_size=20, compress_every=4)


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(61, size=count)


class PlainLoop:
    """One token at a time on lists of what is left, by the definitions: raw keys and their rounding as each method has
    it, in formulas of their own."""

    def __init__(self, loaded, method, kept):
        self.rotary, self.method, self.kept = loaded.layers[0].rotary, method, kept
        self.held, self.keys, self.values, self.evicted = [], {}, {}, 0

    def rounded(self, x):
        return x.clamp(-448, 448).to(self.kept).to(x.dtype) if self.kept.itemsize == 1 else x.to(self.kept).to(x.dtype)

    def turned(self, x, by):
        return self.rotary.rotate(x, self.rotary.turn(torch.tensor([by])))

    def key(self, raw, position, came):
        """came: tokens evicted before it came."""
        is_sink = position < POLICY.n_sink
        if self.method == "mit":
            return self.turned(self.rounded(raw), position - (0 if is_sink else self.evicted))
        if self.method == "ring":
            return self.rounded(self.turned(raw, position + (self.evicted if is_sink else 0)))
        stored = self.rounded(self.turned(raw, position - came))
        moved = 0 if is_sink else self.evicted - came
        return self.rounded(self.turned(stored, -moved)) if moved else stored

    def attend(self, layer, query, key, value, scaling):
        self.keys.setdefault(layer, []).append(key)
        self.values.setdefault(layer, []).append(self.rounded(value))
        keys = torch.cat([self.key(k, *at) for k, at in zip(self.keys[layer], self.held, strict=True)], dim=2)
        values = torch.cat(self.values[layer], dim=2)
        place = self.held[-1][0] - (0 if self.method == "ring" else self.evicted)
        groups = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        weights = (self.turned(query, place) @ keys.transpose(-1, -2) * scaling).softmax(-1)
        return weights @ values

    def evict(self, drop):
        for rows in (self.held, *self.keys.values(), *self.values.values()):
            del rows[POLICY.n_sink : POLICY.n_sink + drop]
        self.evicted += drop


@torch.inference_mode()
def plain_losses(loaded, method, kept, tokens):
    state, losses = PlainLoop(loaded, method, kept), []
    for t, (token, target) in enumerate(pairwise(tokens)):
        state.held.append((t, state.evicted))
        logits = loaded.forward(torch.tensor([[token]]), torch.tensor([0]), state).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[target].item())
        if (t + 1) % POLICY.compress_every == 0 and len(state.held) > POLICY.kept:
            state.evict(len(state.held) - POLICY.kept)
    return np.array(losses)


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["GPTNeoX", "Llama"])
def test_each_method_rounds_what_it_keeps(family, method, kv_dtype):
    loaded, tokens = tiny_model(family), random_tokens(60)
    what = Configuration(method, replace(POLICY, kv_dtype=kv_dtype))
    expected = plain_losses(loaded, method, FORMATS[kv_dtype], tokens)
    found = block_parallel_losses(loaded, tokens, what.policy, 16, keys=what.keys)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    looped = decode_loop(make_decoder(loaded, what), tokens, loaded.device).losses
    np.testing.assert_allclose(looped, expected, rtol=0, atol=1e-9)
    unrounded = block_parallel_losses(loaded, tokens, POLICY)
    assert np.abs(found - unrounded).max() > {"float16": 1e-5, "bfloat16": 1e-4, "float8_e4m3": 1e-3}[kv_dtype]
    others = [
        block_parallel_losses(loaded, tokens, what.policy, keys=k) for k in {"raw", "stream", "cache"} - {what.keys}
    ]
    assert all(np.abs(found - other).max() > 1e-6 for other in others), "each rounds something else"


def test_without_sinks_positions_decide_what_is_rounded():
    """Though no distance depends on them."""
    kept = EvictionPolicy(n_sink=0, window_size=1, positions="keep", kv_dtype="float16")
    loaded, tokens = tiny_model("GPTNeoX"), random_tokens(60)
    assert kept.canonical == kept and replace(kept, kv_dtype="auto").canonical.positions == "compact"
    what = Configuration("ours", kept)
    losses = block_parallel_losses(loaded, tokens, kept, keys=what.keys)
    looped = decode_loop(make_decoder(loaded, what), tokens, loaded.device).losses
    np.testing.assert_allclose(losses, looped, rtol=0, atol=1e-9)
    compact = block_parallel_losses(loaded, tokens, replace(kept, positions="compact"), keys=what.keys)
    assert np.abs(compact - losses).max() > 1e-6


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_has_the_format(method, kv_dtype):
    loaded = tiny_model("Llama", torch.float32)
    decoder = make_decoder(loaded, Configuration(method, replace(POLICY, kv_dtype=kv_dtype)))
    for token in torch.from_numpy(random_tokens(40)).split(1):
        decoder.feed(token)
    held = [*decoder.cache.keys, *decoder.cache.values, *getattr(decoder.cache, "unmoved", ())]
    assert {tensor.dtype for tensor in held} == {FORMATS[kv_dtype]}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_too_large_for_a_float8_is_its_largest(method):
    loaded = tiny_model("Llama", torch.float32)
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.self_attn.v_proj.weight *= 1000
            layer.self_attn.k_proj.weight *= 1000
    what = Configuration(method, replace(POLICY, kv_dtype="float8_e4m3"))
    losses = block_parallel_losses(loaded, random_tokens(60), what.policy, keys=what.keys)
    assert np.isfinite(losses).all()
    decoder = make_decoder(loaded, what)
    assert np.isfinite(decode_loop(decoder, random_tokens(60), loaded.device).losses).all()
    assert max(keys.float().abs().max() for keys in decoder.cache.keys) == 448


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_a_compiled_ring_rounds_what_an_eager_one_does(kv_dtype):
    """But for what lies between two numbers of the format, where a rounding of what is computed decides."""
    loaded, tokens = tiny_model("Llama", torch.float32), random_tokens(60)
    policy = EvictionPolicy(n_sink=3, window_size=20, kv_dtype=kv_dtype)
    eager, compiled = (
        decode_loop(make_decoder(loaded, Configuration("ring", policy, execution=how)), tokens, loaded.device).losses
        for how in ("eager", "compile")
    )
    differences = np.abs(eager - compiled)
    effect = np.abs(eager - block_parallel_losses(loaded, tokens, replace(policy, kv_dtype="auto")))
    assert np.median(differences) < 0.1 * np.median(effect)


@pytest.mark.parametrize("method", METHODS)
def test_scores_and_texts_are_of_the_rounded_cache(method):
    loaded = tiny_model("Llama")
    what = Configuration(method, replace(POLICY, kv_dtype="float8_e4m3"))
    tokens = random_tokens(60).tolist()
    requests = [Request(tuple(tokens[:50]), tuple(tokens[50:])), Request(tuple(tokens[:50]), tuple(tokens[49:58]))]
    losses = block_parallel_losses(loaded, np.array(tokens), what.policy, keys=what.keys)
    first, _ = scored(loaded, what, requests)
    assert first.log_likelihood == pytest.approx(-losses[49:].sum(), abs=1e-9)
    evaluating, own = EvaluatingDecoder(loaded, what, 60), make_decoder(loaded, what)
    stream = torch.tensor(tokens)
    logits = evaluating.feed(stream, 1)
    for token in stream.split(1):
        expected = own.feed(token)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


def test_names_of_measurements():
    loaded = tiny_model("Llama", torch.float32)
    keys = Keys(Conditions.of(loaded), TokenStream(random_tokens(60), TextSource(), "t"), 32)
    usual = {method: keys.of(Job("quality", Configuration(method, POLICY))) for method in METHODS}
    assert usual["mit"] == usual["ours"] == usual["ring"], "a quality is the policy's"
    assert "kv_dtype" not in usual["mit"] and "keys" not in usual["mit"], "stored ones keep their names"
    rounded = [keys.of(Job("quality", Configuration(m, replace(POLICY, kv_dtype="float16")))) for m in METHODS]
    assert [key["keys"] for key in rounded] == ["raw", "cache", "stream"] and len(set(map(str, rounded))) == 3
    tasks = [task_key(keys.conditions, Configuration(m, replace(POLICY, kv_dtype="float16")), {}) for m in METHODS]
    assert len(set(map(str, tasks))) == 3
    what = Configuration("ring", replace(POLICY, kv_dtype="float8_e4m3"))
    assert keys.identity(what, "fast")["kv_bytes_per_token"] == loaded.kv_bytes / 4
    assert bytes_per_token(loaded, POLICY) - bytes_per_token(loaded, what.policy) == loaded.kv_bytes * 0.75 * 24
    assert knobs_in_short({"n_sink": 4, "kv_dtype": "float16"}) == "S=4 kv_dtype=float16"
    assert words_of({}) == {"positions": "compact", "kv_dtype": "auto", "layer_budgets": "uniform"}


def test_methods_that_keep_nothing_say_so():
    what = Configuration("recompute", replace(POLICY, kv_dtype="float16"))
    with pytest.raises(
        UsageError, match="kv_dtype 'float16': method 'recompute' keeps nothing in another number format"
    ):
        _ = what.effective
    with pytest.raises(UsageError, match="kv_dtype 'int3': must be one of auto, float16, bfloat16, float8_e4m3"):
        EvictionPolicy(kv_dtype="int3")


SPACE = """
cap: 32
parameters:
  method: [ring, ours]
  kv_dtype: [auto, float16]
  n_sink: [0, 4]
known:
  - {method: ring, kv_dtype: float16, n_sink: 4}
"""


def test_a_space_searches_it(tmp_path):
    (tmp_path / "s.yaml").write_text(SPACE)
    space = load_space(str(tmp_path / "s.yaml"))
    assert space.size == 8
    params = space.known[0]
    what = configuration_of(params, space, 32)
    assert what.policy.kv_dtype == "float16"
    row = Row.of({"method": "ring", "backend_requested": "auto", "execution": "eager", **vars_of(what.policy)})
    assert point_of(row, space, 32) == params
    candidates = Candidates(space, 32, 0)
    assert len(candidates.representatives) == 2 + 4, "policies, and of the rounded ones each method's"
    plain = load_space("default")
    assert "kv_dtype" not in plain.parameters


def vars_of(policy):
    return {name: getattr(policy, name) for name in policy.__dataclass_fields__}


def test_a_command_measures_it(tmp_path, capsys):
    for kv_dtype in ("auto", "float16"):
        command = [
            "evaluate",
            "--model",
            "testbed",
            "--max-eval-tokens",
            "400",
            "--window-size",
            "60",
            "--method",
            "ring",
        ]
        command += ["--kv-dtype", kv_dtype, "--store", str(tmp_path / "store"), "--threads", "1"]
        assert main([*command, "--output", str(tmp_path / f"{kv_dtype}.json")]) == 0
    rows = [json.loads((tmp_path / f"{kv_dtype}.json").read_text())["streaming"] for kv_dtype in ("auto", "float16")]
    assert [row["kv_dtype"] for row in rows] == ["auto", "float16"]
    assert rows[1]["peak_kv_mib"] == rows[0]["peak_kv_mib"] / 2
    assert 0 < abs(rows[1]["ppl_vs_strict_percent"] - rows[0]["ppl_vs_strict_percent"]) < 0.1
    assert main([*command[:-6], "--kv-dtype", "float16", "--method", "recompute"]) == 2
    assert "kv_dtype 'float16': method 'recompute'" in capsys.readouterr().err


def test_every_format_is_torchs():
    assert set(FORMATS) | {"auto"} == set(KV_DTYPES)
