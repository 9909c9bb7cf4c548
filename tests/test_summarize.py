import json

import pandas as pd
import pytest

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


def test_the_documents_flags_and_every_format(results, capsys):
    assert main(["--results-dir", "results", "--output-file", "deep/paper_results.md"]) == 0
    assert main(["results", "--output-file", "all.csv"]) == main(["results", "--output-file", "all.tex"]) == 0
    frame = pd.read_csv("all.csv")
    assert sorted(frame["perplexity"]) == sorted([57.68, 69.51, 5.42, 5.45, 15.25, 15.0])
    assert "\\toprule" in (results.parent / "all.tex").read_text()
    assert (results.parent / "deep/paper_results.md").read_text().startswith("# Results in results")


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
