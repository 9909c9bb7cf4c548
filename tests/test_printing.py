"""Commands whose output nobody reads to its end: `| head`. They end quietly, their files are written all the same."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator import conclusion
from orchestrator.ending import Ending
from orchestrator.screen.display import Display
from streamllm.__main__ import main as engine
from streamllm.terminal.printing import say

from . import preloaded, quick_sweep
from .conftest import GOLDEN
from .finished_study import write_finished
from .made_studies import row, write_study
from .preloaded import ROOT
from .quick_sweep import shorten
from .test_sweep import arguments, folder, prepared, runs_of  # noqa: F401

TINY = ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--max-eval-tokens", "120"]


def unread(directory, module, *arguments):
    """What the command says on standard error, run with a standard output whose reader has gone before anything is
    written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=directory, stdout=writing, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=240,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def study(tmp_path):
    trials = [row(n, 9.0 - n, n) for n in range(3)]
    return write_study(tmp_path, trials, space={"name": "paper", "cap_accounting": "nominal"})


@pytest.mark.parametrize(
    ("module", "arguments", "written"),
    [
        ("dashboards.pareto", ["--all", "--format", "md,csv"], ["pareto.md", "pareto.csv"]),
        ("dashboards.published", [], ["published.md", "published.tex"]),
        ("dashboards.figures", ["--format", "png"], ["pareto.png"]),
        ("dashboards.report", [], ["report.html"]),
    ],
)
def test_dashboards_end_quietly_and_write_their_files(study, tmp_path, module, arguments, written):
    assert unread(tmp_path, module, "s", *arguments) == ""
    assert all((study / name).is_file() for name in written)


def test_a_head_gets_its_line(study, tmp_path):
    command = f"{sys.executable} -m dashboards.pareto s | head -1"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.stdout, done.stderr) == ("m on d, study s: 3 of 3 trials are on the front\n", "")


def test_a_table_of_results_ends_quietly(tmp_path):
    result = {"streaming": row(0, 9.0, 1.0), "baseline": row("baseline", 40.0, 0.0, method="recompute")}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "one.json").write_text(json.dumps(result))
    assert unread(tmp_path, "dashboards.summarize", "results") == ""
    assert unread(tmp_path, "dashboards.summarize", "results", "--format", "parquet") == ""


def test_reports_of_the_engine_end_quietly(tmp_path):
    assert "BrokenPipe" not in unread(tmp_path, "streamllm", "backends")


def evaluate():
    shorten()
    return engine()


def test_an_evaluation_ends_quietly_and_writes_its_file(tmp_path):
    what = ("--window-size", "40", "--output-file", "r.json", "--threads", "1")
    done = preloaded.run(evaluate, "evaluate", *what, *TINY, cwd=tmp_path, unread=(1,))
    assert done.returncode == 0, done.stderr
    assert "BrokenPipe" not in done.stderr and (tmp_path / "r.json").is_file()


def test_a_sweep_goes_on_to_its_end(prepared, cluster):  # noqa: F811
    what = arguments("--trials", "2", "--workers", "1", "--address", cluster.address)
    done = preloaded.run(quick_sweep.main, *what, cwd=prepared, unread=(1,))
    assert done.returncode == 0, done.stderr
    assert "Broken" not in done.stderr and "warning" not in done.stderr
    output = prepared / "sweeps/s"
    assert json.loads((output / "outcome.json").read_text())["status"] == "FINISHED"
    assert (output / "report.html").is_file() and (output / "pareto.md").is_file()
    runs = runs_of(prepared)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED" and len(runs) == 5


def test_a_matrix_goes_on_to_its_end_though_nobody_reads_its_errors_either(tmp_path):
    (tmp_path / "m.yaml").write_text("cap: 60\nmatrix: {dtype: [float32]}\n")
    what = (*TINY, "--space", "m.yaml", "--study", "s")
    assert preloaded.run(quick_sweep.main, *what, cwd=tmp_path, unread=(1, 2)).returncode == 0
    assert (tmp_path / "sweeps/s/m.md").is_file()


def note():
    display = Display(1, [], ("tpot_ms", "perplexity"), SimpleNamespace(backlog=0, problem=None))
    with display:
        for _ in range(3):
            display.note("a line")
    Path("end").touch()


def note_where_nothing_is_taken():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    note()


def test_a_sweep_goes_on_where_its_log_is_on_a_full_disk(tmp_path):
    assert preloaded.run(note_where_nothing_is_taken, cwd=tmp_path).returncode == 0
    assert (tmp_path / "end").exists()


def test_closed_outputs_go_nowhere_and_lend_no_file_their_numbers(study, tmp_path):
    command = (
        "import sys; from dashboards.pareto import main; code = main(['s']); "
        "sys.exit(code or open('other', 'w').fileno() < 3)"
    )
    done = subprocess.run(
        f'{sys.executable} -c "{command}" >&- 2>&-',
        shell=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and (study / "pareto.md").is_file()


def test_nor_does_a_sweep_end_because_nobody_reads_what_it_notes(tmp_path):
    assert preloaded.run(note, cwd=tmp_path, unread=(1, 2)).returncode == 0
    assert (tmp_path / "end").exists()


def test_what_is_said_is_there_at_once(capfdbinary):
    say("é\nsecond")
    say(b"\xff\x00")
    assert capfdbinary.readouterr().out == "é\nsecond\n".encode() + b"\xff\x00"


def test_a_table_that_nothing_takes_costs_neither_report_nor_mlflow(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conclusion, "print_table", full)
    monkeypatch.setattr(conclusion, "discard", lambda _: None)  # pytest's own stdout stays
    configuration, said, tracked = write_finished(tmp_path), [], []
    tracker = SimpleNamespace(finish=lambda report, _: tracked.append(report), address="")
    conclusion.conclude(configuration, tracker, SimpleNamespace(note=said.append, draining=None), Ending())
    assert len(tracked) == 1 and (configuration.output / "report.html").is_file()
    assert len(said) == 1 and "No space left on device" in said[0]
