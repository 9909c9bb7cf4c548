"""NVIDIA's library as the compressor, by itself and with the source documents' shim. Where it is not installed (it pins
transformers < 5.3), only what does not call it runs."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.methods import exactness, is_evaluated
from streamllm.errors import UnavailableError, UnsupportedModelError, UsageError
from streamllm.evaluating import Measuring, evaluate
from streamllm.measuring import plans
from streamllm.measuring.conditions import Conditions
from streamllm.measuring.evaluation import evaluate_chunked
from streamllm.measuring.jobs import Job
from streamllm.measuring.keys import Keys
from streamllm.measuring.text import TextSource, TokenStream
from streamllm.measuring.timing import Reference
from streamllm.policy import EvictionPolicy, strict_policy

from .conftest import GOLDEN, golden_cases
from .tiny_models import tiny_model

INSTALLED = importlib.util.find_spec("kvpress") is not None
needs_kvpress = pytest.mark.skipif(not INSTALLED, reason="kvpress is not installed")
IDENTITY = 1e-9
HALF = ("float16", "bfloat16")
ANGLES = 2e-5
"""Nats that angles of float32 are worth here at most."""
POLICIES = (
    EvictionPolicy(n_sink=3, window_size=20),
    EvictionPolicy(n_sink=3, window_size=20, compress_every=4, cache_slack=2, max_drop=3),
    EvictionPolicy(n_sink=0, window_size=17, compress_every=5),
    EvictionPolicy(n_sink=3, window_size=24, compress_every=6),  # of 33 keys, int(33 * (1 - 6 / 33)) would be 26
)
MODELS = {
    "kvpress": [("Llama", {}), ("Llama yarn", {}), ("Qwen3", {})],
    "kvpress_shim": [("Llama", {}), ("Phi", {}), ("GPTNeoX", {}), ("GPTNeoX", {"rotary_pct": 1.0})],
}
"""Of each method: whole heads are rotated, a half (Phi), a quarter, all of a GPT-NeoX's."""
RUNS = [(method, *model) for method, models in MODELS.items() for model in models]


def losses_of(method, loaded, policy, tokens):
    return decode_loop(make_decoder(loaded, Configuration(method, policy)), tokens, loaded.device).losses


@needs_kvpress
@pytest.mark.parametrize(("family", "entry"), golden_cases())
def test_called_between_tokens_it_does_what_the_original_does(family, entry, golden_model, golden_tokens):
    loaded, policy = golden_model(family), EvictionPolicy(**entry["policy"])
    method = {"llama-tiny": "kvpress", "neox-tiny": "kvpress_shim"}[family]
    run = decode_loop(make_decoder(loaded, Configuration(method, policy)), golden_tokens, loaded.device)
    np.testing.assert_allclose(run.losses, entry["losses"], rtol=0, atol=1e-3)
    assert run.peak_kv == entry["peak_kv"]


@pytest.fixture
def exact_angles(monkeypatch):
    """The library's angles in float64, which it computes in float32."""
    import kvpress

    def cos_sin(keys, frequencies, positions):
        moved = torch.arange(positions.shape[-1]) - positions
        angles = moved[..., None].double() * frequencies.double()
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)

    monkeypatch.setattr(kvpress.KeyRerotationPress, "_rerotate_cos_sin", staticmethod(cos_sin))


@needs_kvpress
@pytest.mark.parametrize(("method", "family", "changed"), RUNS)
def test_it_is_the_evaluators_function_but_for_the_rounding_of_its_angles(method, family, changed):
    loaded, tokens = tiny_model(family, **changed), np.random.default_rng(0).integers(61, size=150)
    rotary = loaded.layers[0].rotary
    assert (rotary.size < loaded.head_size) == (family in ("Phi", "GPTNeoX") and not changed)
    for policy in POLICIES:
        expected = block_parallel_losses(loaded, tokens, policy)
        assert expected.std() > 0.5, "a model that predicts the same everywhere would agree with anything"
        apart = np.abs(losses_of(method, loaded, policy, tokens) - expected).max()
        assert IDENTITY < apart < ANGLES


@needs_kvpress
@pytest.mark.parametrize(("method", "family", "changed"), RUNS)
def test_with_angles_of_float64_no_difference_is_left(method, family, changed, exact_angles):
    loaded, tokens = tiny_model(family, **changed), np.random.default_rng(0).integers(61, size=150)
    for policy in POLICIES:
        expected = block_parallel_losses(loaded, tokens, policy)
        np.testing.assert_allclose(losses_of(method, loaded, policy, tokens), expected, rtol=0, atol=IDENTITY)


@needs_kvpress
@pytest.mark.parametrize(("family", "changed"), [("GPTNeoX", {}), ("GPTNeoX", {"rotary_pct": 1.0}), ("Phi", {})])
def test_the_sources_attributes_are_enough_where_whole_heads_are_rotated(family, changed):
    """Without the other half of the shim NVIDIA's press fails on a part of a head, loudly."""
    import kvpress

    loaded = tiny_model(family, **changed)
    decoder = make_decoder(loaded, Configuration("kvpress_shim", POLICIES[0]))
    decoder.cache.press = kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(n_sink=3))
    tokens = np.random.default_rng(0).integers(61, size=40)
    if not changed:
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            decode_loop(decoder, tokens, loaded.device)
    else:
        expected = block_parallel_losses(loaded, tokens, POLICIES[0])
        np.testing.assert_allclose(decode_loop(decoder, tokens, loaded.device).losses, expected, rtol=0, atol=ANGLES)


@needs_kvpress
@pytest.mark.parametrize("dtype", HALF)
def test_in_half_precision_it_is_further_off_than_ours(dtype):
    """Both beside the evaluator in that dtype: what they compute is rounded alike, the keys they keep are not."""
    tokens, policy = np.random.default_rng(0).integers(61, size=150), POLICIES[0]
    halved = tiny_model("Llama", getattr(torch, dtype))
    expected = block_parallel_losses(halved, tokens, policy)
    off = {m: np.abs(losses_of(m, halved, policy, tokens) - expected).mean() for m in ("ours", "kvpress")}
    assert off["kvpress"] > 1.5 * off["ours"]


@needs_kvpress
@pytest.mark.parametrize("protocol", ["fast", "decode-loop", "chunked"])
def test_all_ways_measure_a_gpt_neox_and_the_row_says_what_it_is(protocol, tmp_path):
    model, source = str(GOLDEN / "neox-tiny"), TextSource(token_ids=GOLDEN / "tokens.json", max_eval_tokens=260)
    policy = EvictionPolicy(n_sink=4, window_size=60, compress_every=128 if protocol == "chunked" else 1)
    rows, losses = {}, {}
    for method in ("kvpress_shim", "ours"):
        found = evaluate(
            Configuration(method, policy), model, source, dtype="float32", how=Measuring(protocol=protocol),
            threads=1, store=tmp_path,
        )  # fmt: skip
        rows[method], losses[method] = found.row, found.losses
    assert (rows["kvpress_shim"]["exactness"], rows["ours"].exactness) == ("exact", None)
    assert rows["kvpress_shim"]["tpot_ms"] > 0 and len(losses["ours"]) in (32, 259)
    np.testing.assert_allclose(losses["kvpress_shim"], losses["ours"], rtol=0, atol=1e-4)


@needs_kvpress
def test_chunks_are_compressed_to_the_same_losses(golden_model, golden_tokens):
    loaded, stream = golden_model("llama-tiny"), TokenStream(golden_tokens, "golden", "")
    policy = EvictionPolicy(n_sink=4, window_size=60, compress_every=128)
    reference = Reference.start(loaded, 64, golden_tokens)
    losses = [
        evaluate_chunked(loaded, Configuration(method, policy), stream, reference)[0].losses
        for method in ("kvpress", "ours")
    ]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4)


def test_what_the_library_cannot_do_is_refused_and_the_shim_named(golden_model):
    def decoder(loaded, method="kvpress"):
        return make_decoder(loaded, Configuration(method, EvictionPolicy()))

    with pytest.raises(
        UnsupportedModelError, match=r"not know the layers of GPTNeoXForCausalLM; .* --method kvpress_s"
    ):
        decoder(golden_model("neox-tiny"))
    with pytest.raises(UnsupportedModelError, match=r"PhiForCausalLM rotates 4 of their 8 dim.* --method kvpress_shim"):
        decoder(tiny_model("Phi"))
    for method in ("kvpress", "kvpress_shim"):
        with pytest.raises(UnsupportedModelError, match=f"'{method}': .* half a head apart, CohereForCausalLM rotates"):
            decoder(tiny_model("Cohere"), method)


@pytest.mark.skipif(INSTALLED, reason="kvpress is installed")
@pytest.mark.parametrize(("method", "family"), [("kvpress", "llama-tiny"), ("kvpress_shim", "neox-tiny")])
def test_without_the_library_the_message_says_how_to_get_it(method, family, golden_model):
    with pytest.raises(
        UsageError, match=rf"'{method}': .*pip install -e '\.\[kvpress\]'` in an environment of its own"
    ):
        make_decoder(golden_model(family), Configuration(method, EvictionPolicy()))


@pytest.mark.parametrize("method", MODELS)
def test_the_evaluator_speaks_for_it_where_it_is_the_same_function_only(method, golden_tokens, tmp_path):
    text, policy = TokenStream(golden_tokens, "golden", "digest"), EvictionPolicy(n_sink=4, window_size=20)

    def quality(method, loaded, policy=policy):
        return Keys(Conditions.of(loaded), text, 64).of(Job("quality", Configuration(method, policy)))

    for dtype in (torch.float64, torch.float32):
        loaded = tiny_model("Llama", dtype)
        assert quality(method, loaded) == quality("ring", loaded), "the policy's, known once"
        assert exactness(method, loaded.dtype_name) == "exact" and is_evaluated(method, loaded.dtype_name)
    for name in HALF:
        loaded = tiny_model("Llama", getattr(torch, name))
        assert exactness(method, name).startswith("approximate: each prune rounds keys and sines to " + name)
        assert not is_evaluated(method, name) and is_evaluated("ours", name)
        with pytest.raises(UnavailableError, match=f"'{method}' in {name} is only nearly .*; use --protocol decode-"):
            quality(method, loaded)
        with pytest.raises(UnavailableError, match="only nearly"):
            evaluate(Configuration(method, policy), str(GOLDEN / "neox-tiny"), dtype=name, store=tmp_path)
    assert exactness("ours", "bfloat16") is None


def test_strict_streamingllm_by_another_library_is_asked_for_by_its_own_name():
    """The reference's own quality would be found whatever the dtype is."""
    plan = plans.compared(Configuration("kvpress", strict_policy(64)), 64)
    assert [job.what.method for job in next(plan)] == ["ring"]
    (job,) = plan.send([SimpleNamespace(entry="the reference's")])
    assert (job.what.method, job.against) == ("kvpress", ("the reference's",))


def test_chunked_losses_are_those_of_the_dense_prefill_and_the_compressed_cache(golden_model, golden_tokens):
    """Token by token with the schedule of the same policy."""
    loaded = golden_model("neox-tiny")
    policy = EvictionPolicy(n_sink=4, window_size=60, compress_every=128)
    stream = TokenStream(golden_tokens[: 2 * 160 + 1], "golden", "")
    reference = Reference.start(loaded, 64, golden_tokens)
    quality, record = evaluate_chunked(loaded, Configuration("ring", policy), stream, reference)
    assert record["chunks"] == record["pairs"] == 2 and record["peak_kv"] == 128
    assert quality.positions.tolist() == [*range(128, 160), *range(288, 320)]
    for chunk in range(2):
        piece = golden_tokens[160 * chunk :][:161]
        expected = block_parallel_losses(loaded, piece, policy)[128:]
        np.testing.assert_allclose(quality.losses[32 * chunk :][:32], expected, rtol=0, atol=1e-4)
