import json

import pandas as pd
import pytest

from dashboards.drawing.ablations import _drawn
from dashboards.summarize import main
from dashboards.tables.evaluations import read_results

from .made_studies import row


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder with each kind of file that there is."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results"

    def write(name, content):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    ours = row("", 5.0, 1.5, dataset="book")
    base = row("", 40.0, 0.0, dataset="book", method="recompute")
    write("ours.json", {"baseline": base, "streaming": ours})
    # the source documents' (§002: `baseline` / `streaming`, `backend` in the result or in the file's name)
    theirs = {"perplexity": 5.42, "runtime_sec": 12.5, "prefill_sec": 0.25}
    write(
        "final/wikitext_main_backend-flash.json",
        {
            "model_name": "EleutherAI/pythia-2.8b", "config": {"n_sink": 4, "window_size": 2044, "compress_every": 32},
            "baseline": theirs, "streaming": theirs | {"perplexity": 5.45, "runtime_sec": 8.25, "new_field": [1]},
            "speedup": 1.52, "streaming_mode": "mit",
        },
    )  # fmt: skip
    write("comprehensive/pg19_kvpress_decode_loop.json", {"method": "kvpress", "ppl": 69.51, "runtime": 12.77})
    write("baselines/pg19_baseline_avg.json", {"perplexity": 57.68, "runtime_sec": 23.79, "tpot_ms": float("nan")})
    write("torn.json", '{"baseline": {"perple')
    write("list.json", [1, 2])
    write("settings.json", {"n_sink": 4})
    write("latin.json", "x")
    (folder / "latin.json").write_bytes(b'{"perplexity": "\xff"}')
    return folder


def test_rows_of_every_kind_of_file(results):
    rows, problems = read_results(results)
    by_file = {}
    for one in rows:
        by_file.setdefault(one["file"], {})[one["role"]] = one
    assert {file: list(found) for file, found in by_file.items()} == {
        "baselines/pg19_baseline_avg.json": ["baseline"],
        "comprehensive/pg19_kvpress_decode_loop.json": [""],
        "final/wikitext_main_backend-flash.json": ["baseline", "streaming"],
        "ours.json": ["baseline", "streaming"],
    }
    theirs = by_file["final/wikitext_main_backend-flash.json"]
    common = {"model": "EleutherAI/pythia-2.8b", "dataset": "wikitext", "backend": "flash", "n_sink": 4}
    assert theirs["streaming"].items() >= (common | {"perplexity": 5.45, "speedup": 1.52, "method": "mit"}).items()
    assert theirs["streaming"]["compress_every"] == 32
    assert theirs["baseline"].items() >= (common | {"perplexity": 5.42, "method": "recompute"}).items()
    assert not {"speedup", "compress_every", "streaming_mode"} & set(theirs["baseline"])
    loop = by_file["comprehensive/pg19_kvpress_decode_loop.json"][""]
    assert loop.items() >= {"protocol": "decode-loop", "perplexity": 69.51, "runtime_sec": 12.77}.items()
    assert by_file["baselines/pg19_baseline_avg.json"]["baseline"]["method"] == "recompute"
    assert by_file["ours.json"]["streaming"]["tpot_ms"] == 5.0
    assert [problem.split(":")[0] for problem in problems] == ["latin.json", "list.json", "settings.json", "torn.json"]


def test_the_table_names_what_it_left_out_and_leaves_unknown_fields_blank(results, capsys):
    assert main(["results"]) == 0
    output = capsys.readouterr()
    lines = [line[2:-2].split(" | ") for line in output.out.splitlines() if line.startswith("| ")]
    titles, *cells = lines
    records = [dict(zip(titles, line, strict=True)) for line in cells]
    assert len(records) == 6
    mit = next(one for one in records if one["method"] == "mit")
    assert (mit["PPL"], mit["speedup (×)"], mit["runtime (s)"], mit["ms/token"]) == ("5.45", "1.52", "8.25", "")
    ours = next(one for one in records if one["method"] == "ours")
    assert (ours["ms/token"], ours["PPL increase %"]) == ("5.0 [4.5, 5.5]", "1.5 [0.5, 2.5]")
    assert [one["method"] for one in records if one["data set"] == "book"] == ["recompute", "ours"]
    assert "Times by different protocols are not comparable." in output.out
    assert output.err.count("warning: left out ") == 4 and "warning: left out torn.json: " in output.err


def test_what_other_commands_write_is_no_row(results, capsys):
    """They have a perplexity or a time as well."""
    measured = {"model": "m", "perplexity": 5.0, "tpot_ms": 2.0}
    keys = {"profile": "parts_ms", "profile --fusion": "fused", "diagnose": "jump_nats", "recall": "policies"}
    for number, key in enumerate(keys.values()):
        (results / f"other{number}.json").write_text(json.dumps(measured | {key: {}}))
    assert main(["results"]) == 0
    told = capsys.readouterr()
    for number, command in enumerate(keys):
        line = f"warning: left out other{number}.json: of another kind, what `streamllm {command}` writes\n"
        assert line in told.err
    assert "other" not in told.out and told.err.count("\n") == 8


def test_the_documents_flags_and_every_format(results, capsys):
    assert main(["--results-dir", "results", "--output-file", "deep/paper_results.md"]) == 0
    assert main(["results", "--output-file", "all.csv"]) == main(["results", "--output-file", "all.tex"]) == 0
    frame = pd.read_csv("all.csv")
    assert sorted(frame["perplexity"]) == sorted([57.68, 69.51, 5.42, 5.45, 15.25, 15.0])
    assert "\\toprule" in (results.parent / "all.tex").read_text()
    assert (results.parent / "deep/paper_results.md").read_text().startswith("# Results in results")


def rows_of(folder, name, document):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document))
    return {row["role"]: row for row in read_results(folder)[0] if row["file"] == name}


ABOUT = {
    "model": "EleutherAI/pythia-2.8b", "dataset": "wikitext:wikitext-103-v1", "max_eval_tokens": 4096,
    "total_tokens": 3407, "dtype": "torch.float16", "env": {"torch": "2.9.1"},
}  # fmt: skip


def test_metrics_are_those_of_the_other_result_and_none_of_their_own(results):
    settings = {"n_sink": 32, "window_size": 2016, "compress_every": 64, "implementation": "mit"}
    theirs = {"perplexity": 9.5, "runtime_sec": 164.8, "tpot_ms": 97.9}
    metrics = {"speedup": 6.81, "ppl_increase_percent": 2.82, "tpot_ms": 14.4, "peak_memory_mb": 6941.4}
    found = rows_of(
        results,
        "comprehensive/wikitext_mit_chunked.json",
        ABOUT | {"streaming_llm": settings, "baseline": theirs, "metrics": metrics,
                 "streaming": {"perplexity": 9.8, "runtime_sec": 52.5}},
    )  # fmt: skip
    assert list(found) == ["baseline", "streaming"]
    about = {"dataset": "wikitext", "dtype": "float16", "n_tokens": 3407, "protocol": "chunked"}
    assert found["streaming"].items() >= (about | metrics | settings | {"method": "mit", "perplexity": 9.8}).items() - {
        ("implementation", "mit")
    }
    assert found["baseline"].items() >= (about | theirs | {"method": "recompute", "n_sink": 32}).items()
    assert not {"speedup", "ppl_increase_percent", "peak_memory_mb", "compress_every"} & set(found["baseline"])
    alone = rows_of(results, "pg19_mit_reference.json", {"method": "mit", "start_size": 32, "metrics": metrics})[""]
    assert alone.items() >= {"method": "mit", "n_sink": 32, "tpot_ms": 14.4, "dataset": "pg19"}.items()


def test_times_of_a_decode_loop_and_their_word_for_the_baseline(results):
    document = {"dataset": "pg19:", "perplexity": 57.68, "total_time": 23.79, "prefill_time": 0.3, "mode": "ours"}
    found = rows_of(results, "comprehensive/pg19_ours_decode_loop.json", document | {"method": "ours"})[""]
    assert found.items() >= {"runtime_sec": 23.79, "prefill_sec": 0.3, "dataset": "pg19", "method": "ours"}.items()
    found = rows_of(results, "comprehensive/pg19_decode_loop.json", document | {"method": "baseline"})
    assert found["baseline"]["method"] == "recompute"


def test_every_result_of_an_ablation(results):
    values = [{"n_sink": n, "window_size": 1024, "perplexity": 9.0 + n, "runtime_sec": 50.0} for n in (0, 4)]
    (results / "ablation_n_sink.json").write_text(
        json.dumps(ABOUT | {"ablation_type": "n_sink", "results": [*values, "x", None]})
    )
    found = [row for row in read_results(results)[0] if row["file"] == "ablation_n_sink.json"]
    assert [(row["n_sink"], row["perplexity"], row["method"]) for row in found] == [(0, 9.0, "ours"), (4, 13.0, "ours")]
    assert {(row["model"], row["dataset"], row["n_tokens"]) for row in found} == {(ABOUT["model"], "wikitext", 3407)}
    assert [line[0] for line in drawn(found, "n_sink")] == ["ours W=1024"]


def drawn(rows, knob):
    time, lines = _drawn(rows, knob)
    assert time == "runtime_sec"
    return lines


def test_of_their_latencies_the_baseline_is_the_whole_cache(results):
    document = {
        "model": "EleutherAI/pythia-70m", "config": {"cache_size": 1024, "n_sink": 4, "num_tokens": 2000},
        "baseline": {"mean_latency_ms": 3.2, "mean_memory_mb": 201.7, "all_latencies_ms": [3.0, 3.4]},
        "streaming": {"mean_latency_ms": 4.2},
    }  # fmt: skip
    found = rows_of(results, "decoding/decoding_latency_1024.json", document)
    assert found["baseline"].items() >= {"method": "dense", "tpot_ms": 3.2, "peak_memory_mb": 201.7}.items()
    assert "window_size" not in found["baseline"] and found["streaming"]["window_size"] == 1024


def test_values_that_a_column_cannot_show_are_left_out(results):
    odd = {"perplexity": 4.5, "tpot_ms": "fast", "tpot_ms_low": [], "n_sink": True, "method": "ours"}
    (results / "odd.json").write_text(json.dumps({"streaming": odd}))
    (found,) = [one for one in read_results(results)[0] if one["file"] == "odd.json"]
    assert found.keys() >= {"perplexity", "method"} and not found.keys() & odd.keys() - {"perplexity", "method"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "results 'nowhere': no such folder"),
        ([], "give the folder"),
        (["empty"], "no JSON file in it has results"),
        (
            ["results", "--output-file", "x.docx"],
            "output 'x.docx': must end in .md, .csv, .tex, .json, .parquet, .html",
        ),
        (["results", "--output-file", "/dev/null/x.md"], "cannot be written"),
    ],
)
def test_bad_input(results, arguments, message, capsys):
    (results.parent / "empty").mkdir()
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
