"""Matrices: their files, and running one, its worker in this process, on the small models of the original."""

import csv
import json
import re
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from mlflow import MlflowClient

import streamllm.measuring.evaluation
from dashboards import serve
from dashboards.drawing.style import LABELS, style
from dashboards.pareto import main as pareto_main
from dashboards.tables.matrix_tables import FIGURES, _figure, matrix_figures, matrix_rows, matrix_tables
from orchestrator.matrix import run as matrix_run
from orchestrator.matrix.plan import make_plan, policy_of
from orchestrator.sweep import main, matrix_request, parser
from orchestrator.sync import main as sync_main
from orchestrator.tracking.follower import Tracker
from search_spaces import MEASURES, SHIPPED, Cell, SpaceError, is_matrix, load_matrix
from streamllm.errors import UsageError
from streamllm.measuring.quality import NonFiniteLossError
from streamllm.policy import EvictionPolicy

from .conftest import GOLDEN
from .local_pool import LocalPool

MATRICES = [name for name in SHIPPED if is_matrix(name)]
BACKENDS = """
file: "{dataset}_main_backend-{attn_backend}"
matrix:
  attn_backend: [math, flash]
  protocol: decode-loop
  window_size: 60
"""


def matrix_of(folder, text):
    (folder / "mine.yaml").write_text(text)
    return load_matrix(str(folder / "mine.yaml"))


class Untracked:
    address = ""

    def __init__(self, *_):
        pass

    def trial_finished(self, row):
        pass

    def finish(self, *_):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a matrix' text; returns the exit code. `.results()` are its files by name. MLflow is told nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.tracking.follower.Tracker", Untracked)
    monkeypatch.setattr("orchestrator.workers.pool.WorkerPool", LocalPool)
    model = ("--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--dtype", "float32")

    class Run:
        folder = tmp_path / "sweeps" / "s"

        def __call__(self, text, *more, tokens=100):
            matrix_of(tmp_path, text)
            return main([*model, "--space", "mine.yaml", "--study", "s", "--max-eval-tokens", str(tokens), *more])

        def results(self):
            return {path.stem: json.loads(path.read_text()) for path in sorted((self.folder / "results").glob("*"))}

    return Run()


@pytest.fixture
def evaluations(monkeypatch):
    """Every evaluation by decode-loop, and what it is to raise in place of being one. No figures are drawn."""
    monkeypatch.setattr("dashboards.figures.ROW_FIGURES", {})
    monkeypatch.setattr("dashboards.tables.matrix_tables.matrix_figures", lambda *_: [])
    calls, real = [], streamllm.measuring.evaluation.evaluate_decode_loop

    def evaluate(loaded, what, *rest):
        if calls.append((what.method, what.backend)) or len(calls) in evaluate.raises:
            raise evaluate.raises[len(calls)]
        return real(loaded, what, *rest)

    evaluate.calls, evaluate.raises = calls, {}
    monkeypatch.setattr(streamllm.measuring.evaluation, "evaluate_decode_loop", evaluate)
    return evaluate


def test_the_source_documents_files():
    names = [load_matrix("comprehensive").stem(cell) for cell in load_matrix("comprehensive").cells()]
    assert len(set(names)) == 24
    expected = {
        f"{dataset}_{method}_{path}"
        for dataset in ("wikitext", "pg19")
        for method in ("baseline", "ours", "mit", "kvpress")
        for path in ("chunked", "decode_loop", "kvpress_official")
    }
    assert set(names) == expected
    shimmed = load_matrix("comprehensive_shim")
    assert {shimmed.stem(cell) for cell in shimmed.cells()} == expected
    assert [replace(cell, method=cell.method.removesuffix("_shim")) for cell in shimmed.cells()] == load_matrix(
        "comprehensive"
    ).cells()
    backends = load_matrix("backends")
    assert {backends.stem(cell) for cell in backends.cells()} == {
        f"{dataset}_main_backend-{backend}" for dataset in ("wikitext", "pg19") for backend in ("math", "flash")
    }
    report = load_matrix("attention_report")
    assert {(c.method, c.attn_backend, c.n_sink, c.window_size) for c in report.cells()} == {
        (method, backend, 8, 256) for method in ("dense", "ours") for backend in ("eager", "auto")
    }
    assert report.max_eval_tokens[""] - 1 - (8 + 256) == 500


@pytest.mark.parametrize("name", MATRICES)
def test_shipped_matrices_can_be_tried_on_the_embedded_model(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--space", name, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("  open  ") == len(load_matrix(name).cells())
    assert list(tmp_path.iterdir()) == []


def test_cells_are_the_grid_times_the_configurations(tmp_path):
    matrix = matrix_of(
        tmp_path,
        "max_eval_tokens: {pg19: 50}\nmatrix: {dataset: [wikitext, pg19], n_sink: [0, 4]}\n"
        "configurations: [{name: plain}, {name: lazy, compress_every: 32}]\n",
    )
    cells = matrix.cells()
    assert len(cells) == 8 and matrix.varying() == ["dataset", "configuration", "n_sink", "compress_every"]
    assert cells[1] == Cell(dataset="wikitext", configuration="lazy", n_sink=0, compress_every=32)
    assert matrix.stem(cells[-1]) == "lazy_pg19_n_sink-4"
    assert (matrix.tokens_of("pg19"), matrix.tokens_of("wikitext")) == (50, None)
    assert matrix.shown("fast") != matrix.shown("decode-loop") and set(matrix.shown("decode-loop")) < set(MEASURES)


def plan_of(argv):
    return make_plan(matrix_request(parser().parse_args(argv)))


def test_a_cap_names_the_matrix_and_is_every_cells_total(tmp_path):
    plan = plan_of(["--space", "comprehensive", "--cap", "64"])
    assert plan.name == "testbed-comprehensive-64" and plan.cap == 64
    assert {planned.policy.kept for planned in plan.cells if planned.cell.protocol != "chunked"} == {64}
    plan = plan_of(["--space", "comprehensive", "--backends", "math,flash"])
    assert plan.name == "testbed-comprehensive-math-flash" and len(plan.cells) == 2 * 24
    assert len({planned.file for planned in plan.cells}) == 48
    with pytest.raises(UsageError, match="backends 'math,flush': 'flush' must be one of"):
        plan_of(["--space", "comprehensive", "--backends", "math,flush"])
    with pytest.raises(UsageError, match="cap 257: must be from 1 to 256"):
        plan_of(["--space", "comprehensive", "--cap", "257"])
    with pytest.raises(UsageError, match="its own window of 256 tokens, 264 with sinks and slack; leave --cap out"):
        plan_of(["--space", "attention_report", "--cap", "128"])


def test_a_book_names_the_matrix_and_its_cells_and_needs_a_data_set(monkeypatch):
    plan = plan_of(["--space", "backends", "--dataset-name", "pg19", "--book", "Dragon's blood"])
    assert plan.name == "testbed-pg19-dragons-blood-backends"
    assert {cell.source.book for cell in plan.cells} == {"Dragon's blood"}
    assert {cell.source.max_eval_tokens for cell in plan.cells} == {load_matrix("backends").tokens_of("pg19")}
    assert all(cell.file.name.startswith("pg19-dragons-blood") for cell in plan.cells)
    monkeypatch.setenv("STREAMLLM_DATASET", "pg19")
    with pytest.raises(UsageError, match="are for one data set, the matrix has several; give --dataset-name"):
        plan_of(["--space", "backends", "--book", "3"])


def test_windows_are_what_the_total_leaves():
    cell = Cell(n_sink=4, compress_every=2, cache_slack=8)
    assert policy_of(cell, 100) == EvictionPolicy(n_sink=4, window_size=88, compress_every=2, cache_slack=8)
    assert policy_of(replace(cell, total_kv=50), 100).window_size == 38
    assert policy_of(replace(cell, total_kv=500), 100).window_size == 88
    assert policy_of(replace(cell, window_size=300), 100).window_size == 300
    chunk = policy_of(replace(cell, protocol="chunked"), 100)  # a prefill of 100, compressed to half
    assert chunk == EvictionPolicy(n_sink=4, window_size=46, compress_every=100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cap: 5\nmatrix: {}\ncaps: 1\n", "line 3: unknown key 'caps' in the matrix file; allowed: description, cap"),
        ("matrix:\n  methods: mit\n", "line 2: unknown key 'methods' in matrix; allowed: dataset, method"),
        ("matrix:\n  method: [mti]\n", "line 2: method 'mti': must be one of dense, kvpress, kvpress_shim, mit"),
        ("matrix:\n  dtype: [float31]\n", "line 2: dtype 'float31': must be one of auto, float32"),
        ("matrix:\n  window_size: 0\n", "line 2: window_size 0: must be a whole number >= 1"),
        ("matrix:\n  n_sink: [4, 4]\n", "line 2: n_sink: a value is given twice"),
        ("matrix: {window_size: 5, total_kv: 9}\n", "line 1: window_size 5, total_kv 9: give one of them"),
        ("matrix: {n_sink: 4}\nbaseline: mit\n", "line 2: baseline 'mit': must be one of recompute, dense"),
        ("matrix: {}\ncolumns: [perplexty]\n", "line 2: columns 'perplexty': must be one of perplexity, "),
        ("matrix: {n_sink: [0, 4]}\nfile: '{method}'\n", "line 2: file 'ours': 2 cells have it; name all of n_sink"),
        ("matrix: {}\nfile: '{sinks}'\n", "line 2: file '{sinks}': may name {dataset}, {configuration}"),
        ("matrix: {}\nconfigurations:\n  - {n_sink: 4}\n", "line 3: a configuration needs a name"),
        ("matrix: {n_sink: 4}\nconfigurations: [{name: a, n_sink: 4}]\n", "n_sink: is an axis of the matrix"),
        ("matrix: {}\nmax_eval_tokens: {pg19: 1}\n", "line 2: max_eval_tokens of pg19 1: must be a whole number >= 2"),
    ],
)
def test_errors_name_file_line_key_and_what_is_allowed(tmp_path, text, message):
    with pytest.raises(SpaceError, match=re.escape(message)) as caught:
        matrix_of(tmp_path, text)
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_matrix_from_end_to_end(run, capsys):
    assert run(BACKENDS) == 0
    results = run.results()
    assert list(results) == ["tokens_main_backend-flash", "tokens_main_backend-math"]
    golden = json.loads((GOLDEN / "neox-tiny" / "mit_losses.json").read_text())[0]
    assert golden["policy"] == {"n_sink": 4, "window_size": 60, "compress_every": 1, "cache_slack": 0, "max_drop": 0}
    for backend in ("math", "flash"):
        result = results[f"tokens_main_backend-{backend}"]
        streaming, baseline = result["streaming"], result["baseline"]
        assert result["backend"] == streaming["backend"] == baseline["backend"] == backend
        assert streaming["perplexity"] == pytest.approx(np.exp(np.mean(golden["losses"][:99])), rel=1e-4)
        assert baseline["method"] == "recompute" and baseline["window_size"] == 64
        assert (
            result["speedup"] == streaming["speedup"] == pytest.approx(baseline["time_ratio"] / streaming["time_ratio"])
        )
    shown = capsys.readouterr()
    numbers = r"PPL: \d+\.\d\d, Runtime: [\d.]+s"
    for line in (
        r"\[INFO\] \[1/2\] running experiment: tokens \(Backend: math\)",
        rf"\[INFO\]   baseline {numbers}",
        rf"\[INFO\]   StreamingLLM {numbers}",
        r"\[INFO\] ✓ experiment done: tokens \(Backend: math\) \(speedup: \d+\.\d\dx\)",
        r"\[INFO\] left: 1 cell, about [\d.]+ min",
    ):
        assert re.search(line, shown.err), line
    written = {path.name for path in run.folder.iterdir()}
    assert {"mine.md", "mine.tex", "mine.csv", "mine.png"} <= written
    assert {f"{name}.png" for name in FIGURES} <= written, "the source documents' figures, all of them"
    table = list(csv.DictReader((run.folder / "mine.csv").open()))
    assert [(row["method"], row["backend"]) for row in table] == [
        (method, backend) for backend in ("math", "flash") for method in ("recompute", "ours")
    ]
    assert float(table[1]["runtime_change_percent"]) == pytest.approx(
        100 * (float(table[1]["runtime_sec"]) / float(table[0]["runtime_sec"]) - 1)
    )


def test_mlflow_the_report_and_the_tables_have_a_matrix_too(run, monkeypatch, empty_mlflow, tmp_path, capsys):
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("orchestrator.tracking.follower.Tracker", Tracker)
    text = BACKENDS + "  method: [ours, kvpress]\n"
    assert run(text.replace("{attn_backend}", "{attn_backend}_{method}")) == 0
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("streamllm-sweep").experiment_id
    runs = {run.data.tags.get("cell", ""): run for run in client.search_runs([experiment])}
    assert runs.keys() == {"", *run.results()}
    parent, cell = runs.pop(""), runs["tokens_main_backend-flash_ours"]
    assert parent.info.status == "FINISHED" and cell.info.status == "FINISHED"
    assert {one.info.status for name, one in runs.items() if "kvpress" in name} == {"FAILED"}
    assert all(one.data.tags["mlflow.parentRunId"] == parent.info.run_id for one in runs.values())
    assert (cell.data.tags["backend.used"], cell.data.tags["protocol"]) == ("flash", "decode-loop")
    assert cell.data.metrics["speedup"] == run.results()["tokens_main_backend-flash_ours"]["speedup"]
    page = (run.folder / "report.html").read_text()
    assert "<script" not in page and page.count("<img") == len(list(run.folder.glob("*.png"))) > 0
    for row in csv.DictReader((run.folder / "mine.csv").open()):
        assert f">{row['method']}<" in page
    assert "not to be had: method &#x27;kvpress&#x27;" in page or "not to be had: kvpress" in page, "and why"
    capsys.readouterr()
    assert pareto_main(["s", "--format", "csv", "--output", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there/mine.csv").read_text() == (run.folder / "mine.csv").read_text()
    assert serve.up_to_date_report(run.folder).read_text() == page
    assert sync_main(["s"]) == 0
    assert "s: 4 runs in MLflow, 0 of them logged or completed just now" in capsys.readouterr().out


def test_rounds_take_the_times_of_all_cells_again_in_turn(run, evaluations, capsys):
    assert run(BACKENDS) == 0
    once = run.results()
    assert run(BACKENDS, "--confirm", "2") == 0
    expected = [(method, backend) for backend in ("math", "flash") for method in ("recompute", "ours")]
    assert evaluations.calls == expected * 3, "nothing of before is repeated, and no cell is taken twice in a row"
    twice = run.results()
    for name, result in twice.items():
        assert result["streaming"]["runs"] == 3 and "runs" not in once[name]["streaming"]
        assert result["streaming"]["perplexity"] == once[name]["streaming"]["perplexity"]
    assert run(BACKENDS, "--confirm", "2") == 0 and len(evaluations.calls) == 12


def test_a_cell_that_cannot_be_confirmed_stays_as_it_was(run, evaluations, capsys):
    assert run(BACKENDS) == 0
    before = run.results()
    evaluations.raises = {5: RuntimeError("out of luck")}
    assert run(BACKENDS, "--confirm", "1") == 0
    assert "(Backend: math) cannot be confirmed: RuntimeError: out of luck" in capsys.readouterr().err
    after = run.results()
    math, flash = (f"tokens_main_backend-{name}" for name in ("math", "flash"))
    assert after[math] == before[math] and after[flash]["rounds"] == 1


def test_a_folder_of_another_study_is_left_alone(run, capsys):
    assert run(BACKENDS) == 0
    rows = (run.folder / "trials.jsonl").read_text()
    settings = json.loads((run.folder / "sweep.json").read_text())
    for other in (settings | {"model": "another"}, settings | {"space": {"name": "default"}}):
        (run.folder / "sweep.json").write_text(json.dumps(other))
        assert run(BACKENDS) == 2
        assert "study 's' exists, with " in capsys.readouterr().err
        assert (run.folder / "trials.jsonl").read_text() == rows


def test_nothing_finished_is_measured_again(run, evaluations, capsys):
    """Killed in its third evaluation, it goes on with that one."""
    evaluations.raises = {3: KeyboardInterrupt()}
    assert run(BACKENDS) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert list(run.results()) == ["tokens_main_backend-math"]
    assert run(BACKENDS) == 0
    expected = [(method, backend) for backend in ("math", "flash") for method in ("recompute", "ours")]
    assert evaluations.calls == [*expected[:2], expected[2], *expected[2:]]
    before = run.results()
    assert run(BACKENDS) == 0 and len(evaluations.calls) == 5 and run.results() == before
    (run.folder / "results" / "tokens_main_backend-math.json").unlink()
    assert run(BACKENDS) == 0 and len(evaluations.calls) == 5  # the store has it
    assert run.results()["tokens_main_backend-math"]["streaming"]["reused"]


class Terminated(list):
    def __getitem__(self, number):
        signal.raise_signal(signal.SIGTERM)


def test_a_scheduler_asks_it_to_end(run, evaluations, capsys, monkeypatch):
    """Its tables take longer than it is waited before the signal would be sent again."""
    evaluations.raises = Terminated([3])
    conclude = matrix_run._conclude
    monkeypatch.setattr(matrix_run, "_conclude", lambda *given: (time.sleep(2.5), conclude(*given)))
    assert run(BACKENDS) == 143
    assert capsys.readouterr().err.count("the same command goes on from here") == 1
    assert (run.folder / "mine.md").is_file()


def test_a_failing_cell_is_recorded_and_the_others_go_on(run, evaluations):
    evaluations.raises = {2: NonFiniteLossError("loss of token 7 is inf"), 4: RuntimeError("out of\nluck")}
    text = BACKENDS.replace("{attn_backend}", "{attn_backend}_{method}") + "  method: [ours, window]\n"
    assert run(text) == 1
    states = {name: result["state"] for name, result in run.results().items()}
    assert list(states.values()).count("complete") == 2
    reasons = [result["reason"] for result in run.results().values() if result["state"] == "failed"]
    assert reasons == ["RuntimeError: out of luck", "NonFiniteLossError: loss of token 7 is inf"]
    table = (run.folder / "mine.md").read_text()
    assert "failed (1)" in table and "(2) RuntimeError: out of luck" in table
    evaluations.raises = {}
    assert run(text) == 0
    assert {result["state"] for result in run.results().values()} == {"complete"}


def test_what_cannot_be_measured_here_is_said_and_no_failure(run, capsys):
    """kvpress does not know GPT-NeoX, installed or not."""
    text = "matrix: {method: [ours, kvpress], protocol: [decode-loop, fast], window_size: 60}\n"
    assert run(text.replace(", fast", "")) == 0
    states = {name: result["state"] for name, result in run.results().items()}
    assert states == {"kvpress": "unavailable", "ours": "complete"}
    assert "not measured: 1 unavailable, of 2 cells" in capsys.readouterr().out
    assert main(["--space", "mine.yaml", "--trials", "5"]) == 2
    assert "--trials: for searches only" in capsys.readouterr().err


def test_other_settings_or_another_machine_are_refused(run, capsys):
    assert run(BACKENDS, tokens=80) == 0
    assert run(BACKENDS, tokens=90) == 2
    assert "was measured under other settings (max_eval_tokens: 80 then, 90 now)" in capsys.readouterr().err
    assert run(BACKENDS.replace("60", "61"), tokens=80) == 2
    assert "window_size: 60 then, 61 now" in capsys.readouterr().err
    kept, gone = sorted((run.folder / "results").glob("*.json"))
    gone.unlink()
    document = json.loads(kept.read_text())
    for name in ("book", "join"):  # as files were before there were such options: the same settings
        del document["settings"]["source"][name]
    document["baseline"]["device"] = "abacus"
    kept.write_text(json.dumps(document))
    assert run(BACKENDS, tokens=80) == 2
    assert "has device 'abacus', now it is" in capsys.readouterr().err


def record(method, protocol, tpot, **more):
    values = {"model": "m", "model_digest": "d", "text_digest": "t", "dataset": "book", "n_tokens": 99, "device": "cpu"}
    values |= {"method": method, "protocol": protocol, "dtype": "float32", "execution": "eager", "n_sink": 4}
    values |= {"window_size": 60, "compress_every": 1, "cache_slack": 0, "max_drop": 0, "backend": "flash"}
    values |= {"backend_requested": "auto", "tpot_ms": tpot, "runtime_sec": tpot / 10, "prefill_sec": 0.1}
    return values | {"perplexity": 9.0, "speedup": 40 / tpot, "ppl_increase_percent": 1.0} | more


def document(method, protocol, tpot=10.0, **more):
    settings = {"configuration": "", "dtype": "auto", "quantization": "none", "dataset": "book", "method": method}
    settings |= {"protocol": protocol, "attn_backend": "auto"}
    own = {} if method == "recompute" else {"streaming": record(method, protocol, tpot, **more)}
    return {"state": "complete", "settings": settings, "baseline": record("recompute", protocol, 40.0), **own}


def test_protocols_are_never_in_one_table_and_baselines_are_shown_once():
    documents = [
        document(method, protocol) for protocol in ("fast", "chunked") for method in ("recompute", "ours", "mit")
    ]
    assert [row["method"] for row in matrix_rows(documents)] == ["recompute", "ours", "mit"] * 2
    tables = matrix_tables("m", "", documents, dict.fromkeys(("fast", "chunked"), MEASURES))
    assert list(tables) == ["-fast", "-chunked"]
    for suffix, table in tables.items():
        assert {f"-{row['protocol']}" for row in table.rows} == {suffix} and len(table.rows) == 3
    assert list(matrix_tables("m", "", documents[:3], {"fast": MEASURES})) == [""]
    row = tables["-chunked"].rows[1]
    assert (row["runtime_change_percent"], row["decode_sec"]) == (pytest.approx(-75), pytest.approx(0.9))


def test_figures_name_what_differs(tmp_path):
    documents = [document("ours", "fast", tpot, n_sink=n_sink) for tpot, n_sink in ((10.0, 4), (12.0, 32))]
    for name, found in zip(("standard", "best"), documents, strict=True):
        found["settings"]["configuration"] = name
    paths = matrix_figures("m", documents, {"fast": ("tpot_ms", "speedup")}, tmp_path)
    assert [path.name for path in paths] == ["m.png"]
    with style():
        figure = _figure(matrix_rows(documents), ("tpot_ms", "perplexity"))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [LABELS["tpot_ms"], LABELS["perplexity"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["recompute", "ours, standard", "ours, best"]
    for found in documents:
        found["settings"]["configuration"] = ""
    figure = _figure(matrix_rows(documents), ("tpot_ms",))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["recompute", "ours, S=4", "ours, S=32"]


def test_an_interval_without_width_is_none(tmp_path):
    """Of one block of tokens there is no spread to tell."""
    found = document("ours", "chunked", ppl_increase_percent_low=1.0, ppl_increase_percent_high=1.0)
    (table,) = matrix_tables("m", "", [found], {"chunked": ("ppl_increase_percent",)}).values()
    assert table.cells[1][-1] == "1.0"
