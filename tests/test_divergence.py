"""Divergence from strict StreamingLLM: the numbers against plain torch, their intervals, where distributions are kept,
and who asks for them."""

import json
import math
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from orchestrator.sweep import main
from orchestrator.workers.pool import Finished
from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_logits
from streamllm.measuring import divergence, plans
from streamllm.measuring.bench import Bench
from streamllm.measuring.divergence import Divergences, encoded, fixed_positions
from streamllm.measuring.jobs import Job
from streamllm.measuring.measurements import Measurements
from streamllm.measuring.quality import quantile_at, share_at
from streamllm.measuring.sample import FixedSize, sample_batches
from streamllm.measuring.store import Measurement, MeasurementStore, StoreError, entry_name
from streamllm.measuring.text import TokenStream
from streamllm.policy import EvictionPolicy, strict_policy

from .conftest import GOLDEN
from .local_pool import LocalPool
from .pretended import PretendPool, measured
from .test_driver import drive  # noqa: F401
from .test_matrix import Untracked as OfMatrix
from .tiny_models import tiny_model

TOTAL = 16
LAZY = EvictionPolicy(n_sink=2, window_size=10, compress_every=4)
NAMES = ("kl", "kl_p99", "same_top_percent", "dp_rms_percent")


def text(vocabulary, tokens=160):
    return TokenStream(np.random.default_rng(0).integers(0, vocabulary, tokens), "random", "digest")


def plain(loaded, tokens, policy):
    """Log-probabilities after every token, all at once."""
    return torch.cat([logits for _, logits in block_logits(loaded, tokens, policy)]).double().log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_plain_torch_makes_of_the_same_logits(dtype):
    loaded, stream = tiny_model("Llama", dtype), text(61)
    bench = Bench(loaded, stream, TOTAL)
    kept = bench.measure(Job("quality", plans.strict_configuration(TOTAL), keeps=True))
    found = bench.measure(Job("quality", Configuration("ours", LAZY), against=("x",)), against=[kept.arrays])
    reference, policy = (plain(loaded, stream.tokens, one) for one in (strict_policy(TOTAL), LAZY))
    kl = F.kl_div(policy, reference, log_target=True, reduction="none").sum(-1)
    targets = torch.from_numpy(stream.tokens[1:, None])
    dp = (policy.gather(1, targets).exp() - reference.gather(1, targets).exp())[:, 0]
    assert found.arrays["positions"].tolist() == list(range(159)), "of a short text all"
    np.testing.assert_allclose(found.arrays["kl"], kl, rtol=0.02, atol=2e-6)
    np.testing.assert_allclose(found.arrays["dp"], dp, atol=1e-12)
    assert found.record["kl"] == pytest.approx(float(kl.mean()), rel=1e-3) and kl.mean() > 1e-3
    same = (policy.argmax(-1) == reference.argmax(-1)).double().mean()
    assert found.record["same_top_percent"] == pytest.approx(100 * float(same)) and 0 < same < 1
    assert found.record["dp_rms_percent"] == pytest.approx(100 * float((dp**2).mean().sqrt()))
    assert found.record["kl_p99"] == pytest.approx(float(np.quantile(kl, 0.99)), rel=1e-3)
    for name in ("kl", "same_top_percent", "dp_rms_percent"):
        assert found.record[f"{name}_low"] < found.record[name] < found.record[f"{name}_high"]
    assert found.record["kl_positions"] == 159 and "kl_p99_high" not in found.record, "159 say nothing of one in 100"
    alone = bench.measure(Job("quality", Configuration("ours", LAZY)))
    assert (alone.losses == found.losses).all() and alone.record["perplexity"] == found.record["perplexity"]
    assert not alone.record.keys() & {*NAMES} and alone.arrays is None


def test_at_the_positions_that_fit_whatever_the_block(monkeypatch):
    loaded, stream = tiny_model("GPTNeoX", torch.float32), text(61, 400)
    monkeypatch.setattr(divergence, "MOST_BYTES", 2 * 61 * 45)
    places = fixed_positions(400, TOTAL, 61)
    assert len(places) == 40, "whole batches of 8"
    assert sorted(places) == sorted(np.concatenate(list(islice(sample_batches(400, TOTAL), 5)))), (
        "re-computation's first"
    )
    found = []
    for block in (256, 7):
        monkeypatch.setattr("streamllm.engine.block_parallel.default_block", lambda _, block=block: block)
        bench = Bench(loaded, stream, TOTAL)
        kept = bench.measure(Job("quality", plans.strict_configuration(TOTAL), keeps=True))
        assert kept.arrays["values"].nbytes <= divergence.MOST_BYTES and kept.arrays["values"].dtype == np.float16
        found.append(
            bench.measure(Job("quality", Configuration("mit", LAZY), against=("x",)), against=[kept.arrays]).arrays
        )
    np.testing.assert_allclose(found[0]["kl"], found[1]["kl"], atol=1e-5)
    reference, policy = (plain(loaded, stream.tokens, one) for one in (strict_policy(TOTAL), LAZY))
    kl = F.kl_div(policy, reference, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found[1]["kl"], kl[places], rtol=0.02, atol=2e-6)


@pytest.mark.parametrize(
    ("n_tokens", "total", "vocabulary", "count"),
    [(20000, 512, 50000, 1024), (20000, 512, 151936, 880), (600, 512, 300, 599), (3000, 4096, 300, 1024)],
)
def test_positions_are_fixed_spread_and_within_the_stated_size(n_tokens, total, vocabulary, count):
    places = fixed_positions(n_tokens, total, vocabulary)
    assert len(places) == count == len(set(places)) and (np.diff(places) > 0).all()
    assert 2 * vocabulary * count <= 256 * 2**20 and places[-1] < n_tokens - 1
    thirds = np.histogram(places, 3, (0, n_tokens - 1))[0]
    assert thirds.min() > 0.3 * count, "all over the text"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [300, 50000])
@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
def test_with_itself_it_is_below_a_millionth(vocabulary, spread, dtype):
    logits = (spread * torch.randn(16, vocabulary, generator=torch.manual_seed(0)) - 7).to(dtype)
    found = divergence.divergence(encoded(logits), logits)
    assert np.abs(found).max() < 1e-6
    assert (divergence.divergence(encoded(logits), logits.roll(1, dims=0)) > 0.1).all()


def test_tokens_that_cannot_come_do_no_harm():
    logits = torch.randn(4, 300)
    logits[:, 7:9] = -torch.inf
    assert np.abs(divergence.divergence(encoded(logits), logits)).max() < 1e-6
    excluding = torch.where(torch.arange(300) == 5, -torch.inf, logits)
    assert np.isinf(divergence.divergence(encoded(logits), excluding)).all(), "the policy excludes what is possible"


def test_the_reference_is_as_far_from_itself_as_it_says(tmp_path):
    loaded, stream = tiny_model("Qwen3", torch.bfloat16), text(61)
    bench, store = Bench(loaded, stream, TOTAL), MeasurementStore(tmp_path)
    measurements = Measurements(store, bench)
    found = measurements.strict(keeps=True)
    assert [found.record[name] for name in NAMES] == [0.0, 0.0, 100.0, 0.0]
    job = Job("quality", Configuration("mit", strict_policy(TOTAL)), against=(found.record["quality_entry"],))
    again = bench.measure(job, against=[store.arrays(found.record["quality_entry"])])
    assert abs(again.record["kl"]) < 1e-6 and again.record["same_top_percent"] == 100.0
    assert again.record["dp_rms_percent"] == 0.0


@pytest.mark.parametrize("tokens", [100, 12])
def test_from_recomputation_at_the_positions_it_has(tokens, tmp_path):
    """Of a text that one window holds too."""
    loaded, stream = tiny_model("Llama", torch.float32), text(61, tokens)
    measurements = Measurements.of(MeasurementStore(tmp_path), loaded, stream, TOTAL)
    baseline = Configuration("recompute", EvictionPolicy(n_sink=0, window_size=TOTAL))
    sample = measurements.quality(baseline, size=FixedSize(24)).losses
    count = plans.comparable_batches(len(sample), TOTAL, stream)
    assert count == (3 if tokens == 100 else 1)
    found = measurements.run(plans.fast(Configuration("ours", LAZY), stream, total=TOTAL, recomputed=count)).record
    places = sample[:, 0].astype(int)
    policy = plain(loaded, stream.tokens, LAZY)[places]
    dense = EvictionPolicy(n_sink=0, window_size=1, compress_every=0)
    windows = [stream.tokens[max(place + 1 - TOTAL, 0) : place + 2] for place in places]
    reference = torch.stack([plain(loaded, window, dense)[-1] for window in windows])
    kl = F.kl_div(policy, reference, log_target=True, reduction="none").sum(-1)
    assert found["kl_vs_recompute_positions"] == len(places)
    assert found["kl_vs_recompute"] == pytest.approx(float(kl.mean()), rel=2e-3, abs=1e-6)
    same = 100 * float((policy.argmax(-1) == reference.argmax(-1)).double().mean())
    assert found["same_top_vs_recompute_percent"] == pytest.approx(same)
    strict = measurements.run(
        plans.fast(Configuration("ring", strict_policy(TOTAL)), stream, total=TOTAL, recomputed=1)
    )
    assert abs(strict.record["kl"]) < 1e-6 and strict.record["kl_vs_recompute"] > (0 if tokens == 100 else -1e-6)


# How sure it is.


def test_a_share_of_few_is_not_sure():
    of_64 = share_at(np.ones(64, bool), np.arange(64), 64)
    assert (of_64.value, of_64.high) == (1.0, 1.0) and of_64.low == pytest.approx(64 / (64 + 1.96**2), abs=1e-4)
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        share = share_at(random.random(200) < 0.9, np.arange(200) * 5, 1000)
        covered += share.low <= 0.9 <= share.high
    assert covered >= 0.94 * 400


@pytest.mark.parametrize("run", [1, 4])
def test_the_99th_percentile_lies_in_its_interval_as_often_as_is_said(run):
    """run: neighbours that are alike."""
    random, inside, truth = np.random.default_rng(1), 0, -math.log(0.01)
    for _ in range(300):
        values = np.repeat(random.exponential(size=8192 // run), run)
        found = quantile_at(0.99, values, np.arange(8192) * 2, 16384, "p")
        assert found["p_low"] <= found["p"] <= found["p_high"]
        inside += found["p_low"] <= truth <= found["p_high"]
    assert inside >= 0.93 * 300
    assert quantile_at(0.99, values[:300], np.arange(300), 300, "p").keys() == {"p"}


def test_a_perfect_copy_has_no_spread_and_no_negative_ends():
    n = 1024
    nothing = Divergences(np.arange(n), np.full(n, -1e-9), np.ones(n, bool), np.zeros(n)).summary(n)
    assert nothing["kl_low"] == 0.0 and nothing["dp_rms_percent_high"] == 0.0
    few = Divergences(np.arange(n), np.r_[np.zeros(n - 1), 5.0], np.ones(n, bool), np.r_[np.zeros(n - 1), 0.5])
    found = few.summary(n)
    assert found["kl_low"] == 0.0 and found["kl_high"] > found["kl"] > 0
    assert found["dp_rms_percent"] == pytest.approx(50 / math.sqrt(n)) and found["dp_rms_percent_low"] == 0.0


# Where distributions are kept.

KEY = {"a": 1}
KEPT = {"values": np.ones((3, 5), np.float16), "first": np.arange(3)}


def test_arrays_are_read_only_when_they_are_wanted(tmp_path):
    store = MeasurementStore(tmp_path)
    store.put(KEY, Measurement({"kl": 0.0}, np.zeros((2, 2)), KEPT))
    (file,) = tmp_path.rglob("*.npz")
    found = store.arrays(entry_name(KEY))
    assert found.keys() == KEPT.keys() and all((found[name] == KEPT[name]).all() for name in KEPT)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert store.get(KEY).record == {"kl": 0.0} and store.get(KEY).arrays is None, "that they are there is enough"
    with pytest.raises(StoreError, match=r"damaged, or removed .* give the same command again"):
        store.arrays(entry_name(KEY))
    assert store.get(KEY).record == {"kl": 0.0} and not store.get(KEY).has_arrays
    assert store.get(KEY, with_arrays=True) is None, "and is measured anew"
    store.put(KEY, Measurement({"kl": 0.0}, np.zeros((2, 2)), KEPT))
    assert store.arrays(entry_name(KEY)).keys() == KEPT.keys()


def test_whoever_makes_room_has_them_measured_anew(tmp_path):
    store = MeasurementStore(tmp_path)
    store.put(KEY, Measurement({"kl": 0.0}, None, KEPT))
    next(tmp_path.rglob("*.npz")).unlink()
    assert store.get(KEY, with_arrays=True) is None and not list(tmp_path.rglob("*.damaged"))


@pytest.mark.parametrize("written", [1, 2])
def test_a_kill_between_the_arrays_leaves_nothing_half(written, tmp_path, monkeypatch):
    from streamllm.measuring import store as module

    class Killed(BaseException):
        pass

    files, write = [], module.write_atomically

    def dying(path, content):
        if len(files) == written:
            raise Killed
        files.append(path.suffix)
        write(path, content)

    monkeypatch.setattr(module, "write_atomically", dying)
    with pytest.raises(Killed):
        MeasurementStore(tmp_path).put(KEY, Measurement({"kl": 0.0}, np.zeros((2, 2)), KEPT))
    assert files == [".npz", ".npy"][:written], "the record last"
    monkeypatch.undo()
    store = MeasurementStore(tmp_path)
    assert store.get(KEY) is None
    store.put(KEY, Measurement({"kl": 1.0}, np.zeros((2, 2)), KEPT))
    assert store.get(KEY).record == {"kl": 1.0} and store.arrays(entry_name(KEY)).keys() == KEPT.keys()


# Who asks for them.


def test_a_policy_is_compared_in_the_pass_of_its_losses_and_named_by_what_it_is_compared_with(tmp_path):
    loaded, stream = tiny_model("Llama", torch.float32), text(61)
    measurements = Measurements.of(MeasurementStore(tmp_path), loaded, stream, TOTAL)
    asked = []
    measure = Bench.measure

    def noted(bench, job, *rest):
        asked.append(job)
        return measure(bench, job, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "measure", noted)
        for method in ("ours", "mit", "ring"):
            found = measurements.run(plans.fast(Configuration(method, LAZY), stream, total=TOTAL))
            assert found.record["kl"] > 0 and found.record["quality_sec"] > 0
        measurements.run(plans.fast(Configuration("mit", strict_policy(TOTAL)), stream, total=TOTAL))
    of_quality = [job for job in asked if job.kind == "quality"]
    assert [(job.what.policy, job.keeps) for job in of_quality] == [(strict_policy(TOTAL), True), (LAZY, False)]
    reference = entry_name(measurements.keys.of(of_quality[0]))
    assert of_quality[1].against == (reference,)
    key = measurements.keys.of(of_quality[1])
    assert key["against"] == reference
    plainly = measurements.keys.of(Job("quality", Configuration("ours", LAZY)))
    assert key == plainly | {"against": reference}, "what is measured without it keeps its name"
    assert not any("against" in name or "distributions" in name for name in plainly)
    assert measurements.find("fast", Configuration("ours", LAZY)) is None


class Untracked(OfMatrix):
    backlog, problem = 0, None


SWEEP = """
description: d
cap: 32
objectives: [tpot_ms, kl]
constraints: [kl <= 0.02]
parameters:
  method: ours
  n_sink: [0, 1, 2, 4, 8]
  compress_every: 4
"""


def test_a_search_and_its_limits_go_by_it(drive):  # noqa: F811
    pool = PretendPool(2)
    study, log = drive(pool, 5, "objectives: [tpot_ms, kl]\nconstraints: [kl <= 0.025]\n")
    assert {row["n_sink"]: row["feasible"] for row in study.rows}
    for row in study.rows:
        assert row["kl"] == pytest.approx(0.01 * abs(row["n_sink"] - 4))
        assert row["feasible"] == (row["kl"] <= 0.025) and row.get("violated") in (None, "kl <= 0.025")
    strict = next(row for row in log.rows if row["trial"] == "strict")
    assert strict["kl"] == 0 and not any("kl" in row for row in log.rows if row["trial"] == "baseline")
    jobs = [job for job in pool.submitted if job.kind == "quality" and job.batch is None]
    assert [job.keeps for job in jobs] == [True] + [False] * (len(jobs) - 1)
    assert len({job.against for job in jobs[1:]}) == 1


def test_a_search_by_the_divergence_from_recomputation_waits_for_its_sample(drive):  # noqa: F811
    pool = PretendPool(2)
    study, log = drive(pool, 4, "objectives: [tpot_ms, kl_vs_recompute]\n", baseline_tokens=16)
    for row in study.rows:
        assert row["kl_vs_recompute"] == pytest.approx(0.04 + row["kl"]) and row["kl_vs_recompute_positions"] == 16
    assert next(row for row in log.rows if row["trial"] == "strict")["kl_vs_recompute"] == pytest.approx(0.04)
    assert all(len(job.against) == 3 for job in pool.submitted if job.against), "strict StreamingLLM's, two batches'"


def test_a_worker_that_ends_on_the_reference_is_no_trials_fault(drive):  # noqa: F811
    deaths = []

    def answer(worker, job):
        if job.keeps and not deaths:
            deaths.append(job)
            return Finished(worker, error="the worker died", died=True)
        return measured(job)

    class Late(PretendPool):
        """By the time that the reference is there, trials wait for it."""

        def submit(self, worker, assignment):
            super().submit(worker, assignment)
            if assignment.job.is_of_use_with_arrays_only:
                self.ready.insert(0, self.ready.pop())

    study, _ = drive(Late(3, answer), 3)
    assert deaths and {row["state"] for row in study.rows} == {"complete"}
    assert not any("deaths" in trial.user_attrs for trial in study._study.trials)


def test_a_sweep_by_it_end_to_end(tmp_path, monkeypatch, capsys):
    """With a real worker in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.tracking.follower.Tracker", Untracked)
    monkeypatch.setattr("orchestrator.workers.pool.WorkerPool", LocalPool)
    monkeypatch.setattr("orchestrator.conclusion.write_outputs", lambda _: [])
    (tmp_path / "by_kl.yaml").write_text(SWEEP)
    command = ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--dtype", "float32"]
    command += ["--space", "by_kl.yaml", "--study", "s", "--confirm", "1", "--trials", "3"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "KL" in said
    rows = [json.loads(line) for line in (tmp_path / "sweeps/s/trials.jsonl").read_text().splitlines()]
    trials = [row for row in rows if isinstance(row["trial"], int)]
    assert len(trials) == 3 and all(0 < row["kl"] < 5 and row["kl_positions"] > 90 for row in trials)
    assert all(row["feasible"] == (row["kl"] <= 0.02) for row in trials)
    strict = next(row for row in rows if row["trial"] == "strict")
    assert strict["kl"] == 0
    kept = MeasurementStore(tmp_path / "sweeps/.store").losses_file(strict["quality_entry"]).with_suffix(".npz")
    kept.unlink()
    assert main([*command[:-1], "4"]) == 0 and kept.exists(), "measured anew where somebody made room"


def test_confirming_tells_policies_apart_by_differences_at_the_same_positions():
    """What neighbouring text does to all of them alike cancels."""
    from streamllm.measuring.draws import objective_draws

    random, n = np.random.default_rng(0), 4000
    places = np.arange(0, n, 4)
    shared = np.repeat(random.exponential(0.05, 100), 10)
    kl = {0: 0.0 * shared, 1: shared, 2: 1.02 * shared + 1e-4}
    rows = [{"trial": trial, "n_tokens": n + 1, "kl": float(values.mean())} for trial, values in kl.items()]
    kept = {0: {"positions": places, "values": places}, **{t: {"positions": places, "kl": kl[t]} for t in (1, 2)}}
    times, gone = np.zeros((500, 3)), {1: {}}
    drawn = objective_draws("kl", "minimize", rows, times, None, None, lambda row: kept[row["trial"]])
    assert (drawn[:, 0] == 0).all() and drawn[:, 1].std() > 0.002
    assert (drawn[:, 2] > drawn[:, 1]).all() and drawn[:, 1].mean() == pytest.approx(rows[1]["kl"], rel=0.02)
    constant = objective_draws("kl", "minimize", rows, times, None, None, lambda row: (kept | gone)[row["trial"]])
    assert (constant == [[row["kl"] for row in rows]] * 500).all()
