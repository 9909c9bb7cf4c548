"""The table on terminals of any width, in a real one and as lines."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from dashboards.pareto import rich_table
from dashboards.tables.table import pareto_table
from dashboards.tables.terminal import lines, wrapped
from streamllm.results.study import load_study

from .made_studies import BASELINE, OBJECTIVES, failed, row, write_study

TWO = {"tpot_ms": "minimize", "ppl_vs_strict_percent": "minimize"}
THREE = TWO | {"peak_memory_mb": "minimize"}
STRICT = row("strict", 6.875, 0.0, method="mit", backend="math")


def measured(trial, tpot_ms, increase, **more):
    times = {"speedup_low": 32 / tpot_ms, "speedup_high": 48 / tpot_ms, "peak_memory_mb": 350.0 + trial}
    return row(trial, tpot_ms, increase) | times | {"rounds": 3, "front_probability": 0.9} | more


def varied(objectives=TWO):
    """Trials of which no two columns are alike, each knob with a value that is nowhere else."""
    knobs = {"n_sink": 61, "window_size": 1171, "compress_every": 117, "cache_slack": 53, "max_drop": 47}
    front = [
        measured(10, 5.25, 4.0, method="ring", peak_memory_mb=777.0, peak_kv=1391, **knobs),
        measured(11, 6.5, 0.5, method="ours", backend="math"),
        measured(12, 7.25, -1.5, n_sink=16),
    ]
    rest = [measured(13, 30.0, 30.0, peak_memory_mb=999.0), failed(8, reason="RuntimeError: " + "no room " * 40)]
    return [*front, *rest, measured(14, 1.0, -9.0, feasible=False, violated="speedup <= 3")]


def table_of(folder, *names, everything=False):
    return pareto_table([load_study(str(folder / "sweeps" / name)) for name in names], everything)


@pytest.fixture
def studies(tmp_path):
    write_study(tmp_path, varied(), "s", TWO)
    write_study(tmp_path, varied(), "three", THREE)
    write_study(tmp_path, varied(), "pythia-2.8b-pg19-lazy_prune", THREE)
    return tmp_path


def text_of(table, width=None, **more):
    return "\n".join(line.text for line in lines(table, width, **more))


def in_a_terminal(folder, columns, *arguments):
    """What the command prints on one of that width."""
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "dashboards.pareto", *arguments]
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(command, cwd=folder, stdout=its, stderr=its, env=environment | {"PYTHONPATH": root})
    os.close(its)
    said, last_word = b"", threading.Timer(240, process.kill)
    last_word.start()
    with os.fdopen(mine, "rb", buffering=0) as terminal, suppress(OSError):  # by which Linux says that it was closed
        while piece := terminal.read(65536):
            said += piece
    last_word.cancel()
    assert process.wait(60) == 0, said
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).replace("\r\n", "\n")


KNOBS = ("61", "1171", "117", "53", "47", "ring", "flash")
TIMES, QUALITY = ("5.2", "[4.7, 5.8]"), ("4.00", "[3.90, 4.10]")


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_all_knobs_and_objectives_in_a_real_terminal(studies, columns):
    for arguments, measures in (
        (["s"], ()),
        (["s", "--all"], ()),
        (["three"], ("777",)),
        (["three", "--all"], ("777",)),
    ):
        text = in_a_terminal(studies, columns, *arguments)
        shown, _, notes = text.partition("\n\nIntervals")
        assert all(len(line) <= columns for line in shown.splitlines()), shown
        assert all(len(line) <= columns or line.startswith("Measured again by: ") for line in notes.splitlines())
        for value in (*KNOBS, *TIMES, *QUALITY, *measures):
            assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", shown), (value, shown)
        assert "…" not in text and text.split().count("room") == (40 if "--all" in arguments else 0)


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_several_studies_at_once(studies, columns):
    names = ("s", "three", "pythia-2.8b-pg19-lazy_prune")
    text = text_of(table_of(studies, *names, everything=True), columns)
    assert all(len(line) <= columns for line in text.splitlines()), text
    headings = [line for line in text.splitlines() if re.fullmatch(r"\S+: \w+", line)]
    assert headings == [
        f"{name}: {place}" for name in names for place in ("front", "dominated", "infeasible", "failed")
    ]
    for value in (*KNOBS, *TIMES, *QUALITY, "777", "[4.7, 5.8]"):
        assert len(re.findall(rf"(?<![\w.]){re.escape(value)}(?![\w.])", text)) >= 3, value
    assert [f"baseline of {name}:" in text for name in names] == [True] * 3


def test_elsewhere_nothing_is_left_out_or_below(studies):
    table = table_of(studies, "three", everything=True)
    text = text_of(table)
    (line,) = (line for line in text.splitlines() if re.match(r"\s*\*?10 ", line))
    for part in (
        *KNOBS,
        "1391",
        "777",
        "5.2 [4.7, 5.8]",
        "7.6",
        "0.90",
        "15.67",
        "4.00 [3.90, 4.10]",
        "4.0 [3.0, 5.0]",
    ):
        assert part in line
    assert "A wider terminal" not in text


def test_what_a_narrow_terminal_leaves_out_is_dispensable_and_said(studies):
    whole, narrow = (text_of(table_of(studies, "s"), width) for width in (200, 80))
    assert "A wider terminal" not in whole and "PPL increase" in whole.split("─")[0]
    assert "S sinks, W window, R prune every, drop max drop, P P(front)." in narrow
    assert "A wider terminal, and the files, also have: PPL, peak KV, PPL increase %." in narrow
    kv = text_of(pareto_table([load_study(str(studies / "sweeps" / "s"))]), 80)
    assert "1391" not in kv
    write_study(studies, varied(), "kv", TWO | {"peak_kv": "minimize"})
    assert "1391" in text_of(table_of(studies, "kv"), 80), "an objective"


@pytest.mark.parametrize("columns", [24, 40, 60])
def test_where_no_table_fits_each_row_is_a_paragraph(studies, columns):
    text = text_of(table_of(studies, "three", everything=True), columns)
    assert all(len(line) <= columns for line in text.splitlines())
    words = " ".join(text.split())
    assert "prune every 117, slack 53, max drop 47, peak KV 1391" in words
    assert "ms/token 5.2 [4.7, 5.8]" in words and "PPL vs strict % 4.00 [3.90, 4.10]" in words


def test_what_all_rows_share_is_a_sentence(tmp_path):
    trials = [measured(n, 9.0 - n, float(n), compress_every=2**n) for n in range(3)]
    write_study(tmp_path, trials, "s", TWO)
    text = text_of(table_of(tmp_path, "s"))
    assert text.startswith(
        "In every row: method ours, backend flash, sinks 4, window 252, slack 0, max drop 0, peak KV 257.\n\n"
    )
    head = text.split("─")[0].split("\n\n")[1]
    assert " ".join(head.split()) == "prune # every ms/token speedup (×) P(front) PPL PPL vs strict % PPL increase %"
    write_study(tmp_path, trials[:1], "one", TWO)
    assert "In every row" not in text_of(table_of(tmp_path, "one"))
    write_study(tmp_path, [*trials, failed(7)], "other", TWO)
    text = text_of(table_of(tmp_path, "other", everything=True))
    assert "In every row: method ours, sinks 4" in text and "math" in text, "the backend a failed one asked for"
    assert "peak KV 257." in text, "what failed has none"


def test_baselines_are_last_and_told_in_words(studies):
    study = load_study(str(studies / "sweeps" / "s"))
    table = pareto_table([study])
    both = text_of(type(table)(**{**vars(table), "baselines": [STRICT, BASELINE]}), 110).splitlines()
    rules = [number for number, line in enumerate(both) if line.startswith("─")]
    after = "\n".join(both[rules[1] + 1 :])
    assert len(rules) == 2 and after.index("strict: mit math S=4 W=252 R=1") < after.index(
        "baseline: recompute, the last 256"
    )
    assert "6.9" in after and "40" in after and "[36, 44]" in after


def test_a_live_view_has_a_line_per_row(studies):
    from rich.console import Console

    front = load_study(str(studies / "sweeps" / "s")).front
    for columns in (80, 120, 200):
        console = Console(width=columns, file=io.StringIO(), color_system=None)
        with console.capture() as captured:
            console.print(rich_table(front, "front so far", THREE))
        text = captured.get()
        rows = [line for line in text.splitlines() if re.match(r"\s*1[012] ", line)]
        assert len(rows) == 3 and all(value in rows[0] for value in ("ring", *KNOBS[:5], "5.2", "4.00", "777")), text
        assert text.startswith("front so far\n") and ("[4.7, 5.8]" in text) == (columns == 200)


def test_a_terminal_gets_sixty_rows_a_file_all(tmp_path):
    trials = [measured(n, 100.0 - n, float(n), compress_every=1 + n) for n in range(70)]
    write_study(tmp_path, trials, "s", TWO)
    text = in_a_terminal(tmp_path, 100, "s")
    assert "the first 60 of 70 rows, all are in the files" in text.replace("\n", " ")
    assert len(re.findall(r"^ ?\*?\d+  ", text, re.M)) == 60 and "baseline: recompute" in text
    command = [sys.executable, "-m", "dashboards.pareto", "s"]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    assert len(re.findall(r"^ ?\*?\d+  ", done.stdout, re.M)) == 70 and "the first" not in done.stdout


def test_commands_are_never_broken():
    command = "Measured again by: python -m streamllm " + "--flag value " * 20
    assert wrapped(command, 40) == [command]
    assert wrapped("some words - and more", 10) == ["some words", "- and more"]
    assert wrapped("", 10) == [""]


def test_todays_objectives(tmp_path):
    write_study(tmp_path, varied(), "s", OBJECTIVES)
    assert "4.0 [3.0, 5.0]" in text_of(table_of(tmp_path, "s"))
