from dashboards.published import main, published_table
from orchestrator.conclusion import write_outputs
from streamllm.results.study import load_study

from .made_studies import SOURCE, row, write_study

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
