import json

import pytest

from dashboards.published import main, published_table
from dashboards.published_cells import TABLES, published_cells
from orchestrator.conclusion import write_outputs
from search_spaces import load_matrix
from streamllm.results.study import load_study

from .made_studies import SOURCE, row, write_study
from .test_matrix import document

BEST = {"n_sink": 32, "window_size": 208, "compress_every": 64, "cache_slack": 16, "max_drop": 32}
TRIALS = [
    row(0, 9.0, 1.0, method="mit", backend="math", backend_requested="math"),
    row(1, 8.0, 1.0, method="mit"),
    row(2, 4.0, 2.0, **BEST),
    row(3, 3.0, 2.0, **BEST | {"max_drop": 0}),
]


def rows_of(study):
    return {row["label"]: row for row in published_table(study).rows}


def test_their_rows_as_measured_beside_their_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    confirmed = [{"trial": 2, "rounds": 3, "tpot_ms": 5.0}]
    write_study(tmp_path, TRIALS, space={"name": "paper"}, confirmed=confirmed)
    study = load_study("s")
    rows = rows_of(study)
    assert len(rows) == 6
    assert rows["Baseline"]["tpot_ms"] == 40.0
    assert rows["MIT StreamingLLM"]["tpot_ms"] == 8.0  # with flash attention
    assert rows["Ours (Best)"]["tpot_ms"] == 5.0, "confirmed"
    assert (rows["Ours (Best)"]["published_speedup"], rows["Ours (Best)"]["published_increase"]) == (
        "7.03 to 7.11",
        "2.19 to 2.55",
    )
    assert "tpot_ms" not in rows["Ours (Lazy Prune)"]
    written = {path.name: path.read_text() for path in write_outputs(study) if path.name.startswith("published")}
    assert list(written) == ["published.md", "published.tex"]
    for text in written.values():
        assert "A800" in text and "not measured here" in text and "7.03 to 7.11" in text
        assert "Not among this study's trials: Ours (Standard), Ours (Lazy Prune), Ours (Quality first)" in text
    assert main(["s", "--format", "csv", "--output", "there"]) == 0
    assert (tmp_path / "there" / "published.csv").is_file()


def test_figures_are_those_of_the_studys_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path, TRIALS, space={"name": "default"}, source=SOURCE | {"dataset_name": "wikitext"})
    study = load_study("s")
    assert rows_of(study)["MIT StreamingLLM"]["published_speedup"] == "3 to 5"
    assert rows_of(study)["Ours (Best)"]["published_speedup"] == ""
    assert not [path for path in write_outputs(study) if path.name.startswith("published")]


def cell(dataset, method, protocol, **more):
    found = document(method, protocol, **more)
    for name in ("baseline", "streaming"):
        if name in found:
            found[name] |= {"dataset": dataset, "text_digest": dataset}
    return found | {"cell": f"{dataset}_{method}_{protocol}"}


def test_cells_stand_beside_their_figures():
    documents = [
        cell(dataset, method, protocol)
        for protocol in ("decode-loop", "fast")
        for dataset in ("wikitext", "pg19-dragons-blood", "book")
        for method in ("recompute", "ours")
    ]
    tables = published_cells("comprehensive", documents)
    assert list(tables) == ["-decode-loop", "-fast"], "of the third way none is measured"
    loop = {(row["dataset"], row["method"]): row for row in tables["-decode-loop"].rows}
    assert len(loop) == 8
    ours = loop["pg19", "ours"]
    assert (ours["perplexity"], ours["runtime_sec"], ours["runtime_change_percent"]) == (9.0, 1.0, pytest.approx(-75))
    assert [ours[f"published_{n}"] for n in range(4)] == ["57.99", "0.54", "13.75", "-42.2"]
    assert "perplexity" not in loop["wikitext", "mit"] and loop["wikitext", "mit"]["published_2"] == "12.10"
    assert "Not measured by this study: wikitext mit, wikitext kvpress, pg19 mit" in tables["-decode-loop"].notes[-1]
    assert published_cells("comprehensive", documents[4:6]) == published_cells("dtype", documents) == {}


def test_their_shim_stands_beside_what_they_call_kvpress():
    documents = [cell("wikitext", "kvpress_shim", "decode-loop"), cell("pg19", "ours", "decode-loop")]
    (table,) = published_cells("comprehensive_shim", documents).values()
    kvpress = {(row["dataset"], row["method"]): row for row in table.rows}["wikitext", "kvpress"]
    assert kvpress["perplexity"] == 9.0 and kvpress["published_0"] == "39.14"


def test_attention_is_told_apart():
    documents = [
        cell("wikitext", "ours", "decode-loop", tpot=tpot, backend_requested=attention)
        for attention, tpot in (("eager", 10.0), ("auto", 20.0))
    ]
    (table,) = published_cells("attention_report", documents).values()
    rows = {(row["method"], row["backend_requested"]): row for row in table.rows}
    assert [rows["ours", name]["decode_sec"] for name in ("eager", "auto")] == [pytest.approx(0.9), pytest.approx(1.9)]
    assert rows["ours", "auto"]["published_1"] == "30.77" and rows["dense", "auto"]["published_0"] == "7.03"


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_theirs_is_a_cell_of_the_matrix(name):
    """But kvpress in the table of `eval_streaming_llm.py`, where its official figure stands in."""
    cells = {(one.dataset, one.method, one.protocol, one.attn_backend) for one in load_matrix(name).cells()}
    for table in TABLES[name]:
        for names in table.theirs:
            attention = names[2] if len(names) == 3 else "auto"
            assert (*names[:2], table.protocol, attention) in cells
            assert len(table.theirs[names]) == len(table.figures)


def test_the_command_of_a_matrix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = {"name": "comprehensive", "description": "", "columns": {"decode-loop": ["perplexity"]}}
    folder = write_study(tmp_path, [row(0, 1.0, 1.0, cell="a")], space=space, baseline=None)
    (folder / "results").mkdir()
    (folder / "results" / "a.json").write_text(json.dumps(cell("wikitext", "ours", "decode-loop")))
    assert main(["s"]) == 0
    assert (folder / "published-decode-loop.md").is_file() and "36.79" in capsys.readouterr().out
    (folder / "results" / "a.json").write_text(json.dumps(cell("book", "ours", "decode-loop")))
    assert main(["s"]) == 2
    assert "study 's': none of its cells is in a table of the source documents" in capsys.readouterr().err
