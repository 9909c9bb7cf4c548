"""Positions that are kept: every cache and the evaluator against a plain loop, and what else knows of the knob."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
import yaml

from dashboards.tables.columns import shown_columns
from orchestrator.matrix.plan import Planned, policy_of
from orchestrator.search.points import configuration_of, is_of
from search_spaces import load_space
from search_spaces.matrix_space import load_matrix
from streamllm.__main__ import main
from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.loading import prepare
from streamllm.errors import UsageError
from streamllm.measuring.conditions import Conditions
from streamllm.measuring.evaluation import evaluate_chunked, measure_quality
from streamllm.measuring.jobs import Job
from streamllm.measuring.keys import Keys
from streamllm.measuring.text import TextSource, TokenStream
from streamllm.measuring.timing import Reference
from streamllm.policy import EvictionPolicy, PolicyError
from streamllm.results.schema import Row, knobs_in_short

from .plain import surviving_logits
from .tiny_models import BASE, FAMILIES, tiny_model

IDENTITY = 1e-9
METHODS = ("mit", "ours", "ring")
KEEP = EvictionPolicy(n_sink=3, window_size=20, positions="keep")
POLICIES = {
    "strict": KEEP,
    "one sink": replace(KEEP, n_sink=1),
    "lazy": replace(KEEP, compress_every=8, cache_slack=2),
    "softlite": replace(KEEP, compress_every=4, max_drop=3),
}


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(61, size=count)


class PlainLoop:
    """Attention state of one token at a time, by the definition, on a list of the stream positions that are left: keys
    as they came, each rotated at its own place in the stream for every query."""

    def __init__(self, loaded):
        self.layers, self.held, self.keys, self.values = loaded.layers, [], {}, {}

    def attend(self, layer, query, key, value, scaling):
        for every, new in ((self.keys, key), (self.values, value)):
            every[layer] = torch.cat((every[layer], new), 2) if layer in every else new
        groups = query.shape[1] // key.shape[1]
        rotary = self.layers[layer].rotary
        at = rotary.turn(torch.tensor(self.held))
        keys = rotary.rotate(self.keys[layer][:, :, self.held], at).repeat_interleave(groups, 1)
        values = self.values[layer][:, :, self.held].repeat_interleave(groups, 1)
        here = rotary.turn(torch.tensor(self.held[-1:]))
        weights = (rotary.rotate(query, here) @ keys.transpose(-1, -2) * scaling).softmax(-1)
        return weights @ values


@torch.inference_mode()
def plain_losses(loaded, policy, tokens):
    """Evictions written out anew; no schedule."""
    state, losses, pruning = PlainLoop(loaded), [], False
    for t, (token, target) in enumerate(pairwise(tokens)):
        state.held.append(t)
        logits = loaded.forward(torch.tensor([[token]]), torch.zeros(1, dtype=torch.long), state).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[target].item())
        n, total = len(state.held), policy.n_sink + policy.window_size
        pruning |= (t + 1) % policy.compress_every == 0 and n > total + policy.cache_slack
        if pruning:
            drop = min(n - total, policy.max_drop or n)
            del state.held[policy.n_sink : policy.n_sink + drop]
            pruning = len(state.held) > total
    return np.array(losses)


def loop_losses(method, loaded, policy, tokens):
    return decode_loop(make_decoder(loaded, Configuration(method, policy)), tokens, loaded.device).losses


def assert_same(found, expected, atol=IDENTITY):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cache_and_the_evaluator_are_the_plain_loop(family):
    loaded, tokens = tiny_model(family), random_tokens(90)
    policy = replace(POLICIES["softlite"], cache_slack=2)
    expected = plain_losses(loaded, policy, tokens)
    assert_same(block_parallel_losses(loaded, tokens, policy, block=17), expected)
    for method in METHODS:
        assert_same(loop_losses(method, loaded, policy, tokens), expected)
    compact = block_parallel_losses(loaded, tokens, replace(policy, positions="compact"))
    assert max(abs(compact - expected)) > 0.05, "sinks that are elsewhere look the same to this model"
    assert_same(compact[:25], expected[:25])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["GPTNeoX", "Llama"])
def test_every_policy(family, name):
    loaded, tokens, policy = tiny_model(family), random_tokens(80), POLICIES[name]
    expected = plain_losses(loaded, policy, tokens)
    assert_same(block_parallel_losses(loaded, tokens, policy, block=9), expected)
    for method in METHODS:
        assert_same(loop_losses(method, loaded, policy, tokens), expected)


def test_a_plain_model_at_the_positions_that_survivors_keep():
    """Forward passes of transformers over them; nothing of ours."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    tokens = random_tokens(60)
    stream = torch.from_numpy(tokens)[None]
    logits = surviving_logits(model, stream[:, :-1], 3, 20, keep=True)
    expected = -logits.log_softmax(-1).gather(-1, stream[0, 1:, None])[:, 0].numpy()
    loaded = prepare(model, "plain", "plain")
    assert_same(block_parallel_losses(loaded, tokens, KEEP), expected, 1e-4)
    for method in METHODS:
        assert_same(loop_losses(method, loaded, KEEP, tokens), expected, 1e-4)


@pytest.mark.parametrize("family", ["GPTNeoX", "Llama", "Llama yarn", "Cohere"])
def test_angles_are_exact_a_million_tokens_away(family):
    """Caches in float32, told that a million tokens came and went behind the sinks, beside one in float64."""
    tokens = random_tokens(70)

    def far(method, dtype):
        loaded, losses = tiny_model(family, dtype), []
        decoder = make_decoder(loaded, Configuration(method, KEEP))
        with torch.inference_mode():
            for i, (token, target) in enumerate(pairwise(tokens)):
                if i == 3:
                    decoder.cache.evict(KEEP.n_sink, 1_000_000)
                losses.append(-decoder.feed(torch.tensor([token]))[0].log_softmax(-1)[target].item())
        return losses

    expected = far("mit", torch.float64)
    assert max(abs(np.array(expected) - loop_losses("mit", tiny_model(family), KEEP, tokens))) > 0.05
    for method in METHODS:
        assert_same(far(method, torch.float32), expected, 3e-4)


def test_the_evaluator_is_exact_far_into_a_stream():
    """In float32, and without a table of angles as long as the stream."""
    tokens = random_tokens(20_000)
    single, double = (tiny_model("Llama", dtype) for dtype in (torch.float32, torch.float64))
    found, expected = (block_parallel_losses(loaded, tokens, KEEP, 512)[-500:] for loaded in (single, double))
    assert_same(found, expected, 1e-4)
    assert len(single.layers[0].rotary.span(0, 1)[0]) == 1 and len(single.layers[0].rotary._cos) < 2000


def test_a_chunk_goes_on_where_its_survivors_are():
    loaded, policy = tiny_model("GPTNeoX", torch.float32), replace(KEEP, compress_every=64)
    stream = TokenStream(random_tokens(97), "random", "")
    expected = block_parallel_losses(loaded, stream.tokens, policy)[64:]
    for method in METHODS:
        found, _ = evaluate_chunked(
            loaded, Configuration(method, policy), stream, Reference.start(loaded, 23, stream.tokens)
        )
        assert_same(found.losses, expected, 1e-4)


def test_where_no_distance_differs_positions_are_compact():
    for method, policy in (
        ("window", KEEP),
        ("dense", KEEP),
        ("recompute", KEEP),
        ("ring", replace(KEEP, n_sink=0)),
        ("ours", replace(KEEP, compress_every=0)),
        ("kvpress", replace(KEEP, compress_every=0)),
    ):
        assert Configuration(method, policy).effective.positions == "compact", (method, policy)
    assert Configuration("mit", KEEP).effective == KEEP
    with pytest.raises(
        UsageError, match="positions 'keep': methods 'kvpress' and 'kvpress_shim' are the press that re-rotates"
    ):
        _ = Configuration("kvpress", KEEP).effective
    with pytest.raises(PolicyError, match="positions 'absolute': must be one of compact, keep"):
        EvictionPolicy(positions="absolute")


def test_a_name_says_it_only_where_positions_are_kept():
    loaded = tiny_model("GPTNeoX", torch.float32)
    keys = Keys(Conditions.of(loaded), TokenStream(random_tokens(60), "random", "digest"), 24)
    for kind, protocol in (("quality", "fast"), ("speed", "fast"), ("whole", "decode-loop")):
        kept, compact, without_sinks = (
            keys.of(Job(kind, Configuration("ring", policy), protocol))
            for policy in (KEEP, replace(KEEP, positions="compact"), replace(KEEP, n_sink=0))
        )
        assert kept == compact | {"positions": "keep"} and "positions" not in compact | without_sinks


def test_rows_from_before_are_compact():
    old = {"method": "ours", "backend_requested": "auto", "n_sink": 4, "window_size": 252, "compress_every": 1}
    old |= {"cache_slack": 0, "max_drop": 0}
    row = Row.from_json(old, "here")
    assert Configuration.of_row(row) == Configuration("ours", EvictionPolicy())
    kept = row | {"positions": "keep"}
    assert Configuration.of_row(kept).policy == EvictionPolicy(positions="keep")
    assert knobs_in_short(row) == "S=4 W=252 R=1 slack=0 drop=0" == knobs_in_short(row | {"positions": "compact"})
    assert knobs_in_short(kept) == "S=4 W=252 R=1 slack=0 drop=0 positions=keep"
    assert str(Configuration.of_row(kept)) == f"ours auto {knobs_in_short(kept)}"


def test_a_space_and_a_matrix_have_them(tmp_path):
    assert "positions" not in load_space("default").parameters
    (tmp_path / "space.yaml").write_text("cap: 256\nparameters:\n  method: ring\n  positions: [compact, keep]\n")
    space = load_space(str(tmp_path / "space.yaml"))
    points = list(space.points())
    configurations = [configuration_of(point, space, 256) for point in points]
    assert [what.policy.positions for what in configurations] == ["compact", "keep"]
    row = Row.of({"method": "ring", "backend_requested": "auto", "n_sink": 4, "compress_every": 1, "window_size": 252})
    assert [is_of(row, point, space, 256) for point in points] == [True, False]
    assert [is_of(row | {"positions": "keep"}, point, space, 256) for point in points] == [False, True]

    cells = {"method": ["ring", "ours"], "positions": ["compact", "keep"]}
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump({"matrix": cells}, sort_keys=False))
    matrix = load_matrix(str(tmp_path / "matrix.yaml"))
    assert [matrix.stem(cell) for cell in matrix.cells()] == ["ring_compact", "ring_keep", "ours_compact", "ours_keep"]
    of_a_chunk = replace(matrix.cells()[1], protocol="chunked")
    assert policy_of(matrix.cells()[1], 256).keeps_positions and policy_of(of_a_chunk, 256).keeps_positions
    compact, kept = (
        Planned(cell, "testbed", TextSource(), policy_of(cell, 256), "recompute", tmp_path).settings
        for cell in matrix.cells()[:2]
    )
    assert kept == compact | {"positions": "keep"} and "positions" not in compact, "as a file from before has it"


def test_tables_have_a_column_where_they_are_kept():
    old, kept = {"method": "ring"}, {"method": "ring", "positions": "keep"}
    assert "positions" not in {column.key for column in shown_columns([old, {**old, "positions": "compact"}])}
    assert "positions" in {column.key for column in shown_columns([old, kept])}


def test_far_sinks_are_warned_of_in_words():
    loaded = tiny_model("GPTNeoX", torch.float32, max_position_embeddings=64)

    def warning(policy, count=300):
        stream = TokenStream(random_tokens(count), "random", "")
        return measure_quality(loaded, Configuration("ring", policy), stream).warning

    away = "kept positions put the sinks up to 298 tokens away"
    assert warning(KEEP, 300) == f"{away}, the model was trained on 64: perplexity may suffer"
    assert warning(replace(KEEP, positions="compact"), 300) is None and "positions" not in str(warning(KEEP, 65))
    assert warning(replace(KEEP, n_sink=0), 300) is None, "no sinks, none far away"
    grown = warning(replace(KEEP, compress_every=64))
    assert grown == f"queries attend to up to 87 keys and {away}, the model was trained on 64: perplexity may suffer"


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("GPTNeoX", torch.float32, max_position_embeddings=64).model.save_pretrained("model")
    (tmp_path / "ids.json").write_text(json.dumps(random_tokens(150).tolist()))
    options = ["--model", "model", "--token-ids", "ids.json", "--window-size", "20", "--json"]

    def evaluated(*more):
        monkeypatch.setattr("sys.argv", ["streamllm", "evaluate", *options, *more])
        assert main() == 0
        return json.loads(capsys.readouterr().out)

    compact, kept = evaluated(), evaluated("--positions", "keep")
    assert (compact["positions"], kept["positions"]) == ("compact", "keep")
    assert compact["perplexity"] != kept["perplexity"] and "sinks up to 148 tokens away" in kept["warning"]
    assert evaluated("--positions", "keep", "--method", "window")["positions"] == "compact"
