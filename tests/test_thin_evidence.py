"""What rests on little says so: no interval where nothing is known, and a warning in the row."""

import json
import math

import numpy as np
import pytest

from dashboards.summarize import summary_table
from dashboards.tables.columns import Column, shown_columns
from dashboards.tables.evaluations import read_results
from dashboards.tables.matrix_tables import matrix_rows
from streamllm.__main__ import main
from streamllm.measuring.quality import QualityComparison, median_interval, paired_increase, perplexity
from streamllm.measuring.reference_time import speedup
from streamllm.results.schema import Row

from .conftest import GOLDEN


def table(losses):
    return np.column_stack((np.arange(len(losses)), losses))


def test_chunks_are_the_blocks_of_an_interval():
    """By hand: three chunks whose means are 0, 1 and 2 have a standard error of 1/sqrt(3), and t is 4.303."""
    losses = np.repeat([0.0, 1.0, 2.0], 32)
    found = perplexity(losses, chunk=32)
    half = 4.302652729749464 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((math.e, math.exp(1 - half), math.exp(1 + half)))
    increase = paired_increase(table(losses), table(np.zeros(96)), chunk=32)
    assert increase.high == pytest.approx(100 * math.expm1(1 + half))
    within = perplexity(losses)
    assert within.high - within.low < found.high - found.low, "tokens of a chunk go together"


def test_one_block_has_no_interval():
    noise = np.random.default_rng(0).normal(3, 1, 32)
    assert set(perplexity(noise, chunk=32).flat("perplexity")) == {"perplexity"}
    assert set(paired_increase(table(noise), table(noise + 0.1), chunk=32).flat("x")) == {"x"}
    assert set(perplexity(noise[:1]).flat("perplexity")) == {"perplexity"}
    assert set(QualityComparison(table(noise[:1])).vs_strict(table(noise[:1])).flat("x")) == {"x"}
    assert set(median_interval(np.array([2.0])).flat("x")) == {"x"}
    assert set(perplexity(noise).flat("x")) == {"x", "x_low", "x_high"}


def test_a_quotient_of_two_times_without_intervals_has_none():
    assert speedup({"time_ratio": 2.0}, {"time_ratio": 6.0}) == {"speedup": 3.0}
    row = {"time_ratio": 2.0, "time_ratio_low": 1.9, "time_ratio_high": 2.1}
    assert set(speedup(row, {"time_ratio": 6.0})) == {"speedup", "speedup_low", "speedup_high"}


def evaluated(tmp_path, capsys, monkeypatch, tokens, *more):
    monkeypatch.chdir(tmp_path)
    what = ("--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--threads", "1")
    assert main(["evaluate", *what, "--max-eval-tokens", str(tokens), "--mode", "both", *more]) == 0
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.parametrize(("chunks", "losses"), [(1, "32 losses of 1 chunk:"), (3, "96 losses of 3 chunks:")])
def test_a_text_of_few_chunks(tmp_path, capsys, monkeypatch, chunks, losses):
    how = ("--protocol", "chunked", "--prefill-tokens", "40", "--window-size", "16", "--json")
    shown, said = evaluated(tmp_path, capsys, monkeypatch, 72 * chunks + 1, *how)
    row = Row.from_json(json.loads(shown), "here")
    assert row.chunks == chunks and losses in str(row.warning) and f"warning: {row.warning}" in said
    ends = [name for name in row if name.endswith("_low")]
    named = ("perplexity", "ppl_increase_percent", "time_ratio", "speedup")
    assert bool(ends) is (chunks > 1) and all((f"{name}_low" in row) is (chunks > 1) for name in named)
    assert all(row[name] < row[name.replace("_low", "_high")] for name in ends)
    assert "[" not in Column.of("speedup").text(row) or chunks > 1


def test_a_short_text_and_the_two_kinds_of_seconds(tmp_path, capsys, monkeypatch):
    """Fast says what measuring took, a decode loop what decoding took; the cache's size is told in bytes too."""
    how = ("--window-size", "28", "--json")
    fast = Row.from_json(json.loads(evaluated(tmp_path, capsys, monkeypatch, 100, *how)[0]), "here")
    assert "it rests on 99 losses: too few" in str(fast.warning)
    assert fast.measuring_sec > 0 and fast.runtime_sec is None
    assert fast.peak_kv_mib == fast.peak_kv * fast.kv_bytes_per_token / 2**20 > 0
    loop = Row.from_json(
        json.loads(evaluated(tmp_path, capsys, monkeypatch, 100, *how, "--protocol", "decode-loop")[0]), "here"
    )
    assert loop.runtime_sec > 0 and loop.measuring_sec is None
    half = evaluated(tmp_path, capsys, monkeypatch, 100, *how, "--dtype", "bfloat16")[0]
    assert Row.from_json(json.loads(half), "here").peak_kv_mib == fast.peak_kv_mib / 2
    for row in (fast, loop):
        (_, cell) = matrix_rows([_document(row)])
        assert ("runtime_change_percent" in cell) is ("decode_sec" in cell) is (row is loop)


def _document(row):
    settings = {"configuration": "", "quantization": "none"}
    baseline = (row | {"method": "recompute"}).to_json()
    return {"state": "complete", "settings": settings, "cell": "x", "baseline": baseline, "streaming": row.to_json()}


def test_older_results_are_read_so(tmp_path):
    """As `evaluate --output-file` wrote them; the source documents' own files name no protocol `fast`."""
    ours = {"streaming": {"format": 3, "protocol": "fast", "method": "ours", "perplexity": 5.0, "runtime_sec": 9.0}}
    theirs = {"streaming": {"perplexity": 5.0, "runtime_sec": 9.0}}
    (tmp_path / "a.json").write_text(json.dumps(ours))
    (tmp_path / "b.json").write_text(json.dumps(theirs))
    (own, other), problems = read_results(tmp_path)
    assert not problems and own["measuring_sec"] == other["runtime_sec"] == 9.0
    assert "runtime_sec" not in own and "measuring_sec" not in other
    assert [column.key for column in summary_table([own], tmp_path).columns if column.unit == "s"] == ["measuring_sec"]


def test_bytes_are_shown_where_tokens_do_not_compare():
    def shown(*sizes):
        rows = [{"peak_kv": 256, "peak_kv_mib": size / 4096, "kv_bytes_per_token": size} for size in sizes]
        return {column.key for column in shown_columns(rows)}

    assert "peak_kv_mib" in shown(4096, 8192) and "peak_kv_mib" not in shown(4096, 4096)
    assert "peak_kv_mib" in {column.key for column in shown_columns([], ["peak_kv_mib"])}
