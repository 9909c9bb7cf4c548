import csv
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from dashboards.pareto import main
from dashboards.recommendation import reproduce_command
from dashboards.tables.columns import BY_KEY, Column, interval_decimals
from dashboards.tables.content import Table
from dashboards.tables.filters import filtered, select
from dashboards.tables.formats import FORMATS
from dashboards.tables.latex import latex
from dashboards.tables.table import pareto_table
from streamllm.commands import evaluate
from streamllm.policy import EvictionPolicy
from streamllm.results.study import load_study
from streamllm.terminal.arguments import given_policy

from .conftest import GOLDEN
from .made_studies import failed, row, write_study

FRONT = [
    row(7, 2.0, 9.0, method="ring", compress_every=64),
    row(3, 3.0, 2.0, n_sink=32),
    row(4, 3.0, 2.0, backend="math", backend_requested="math"),  # a duplicate of 3's values
    row(1, 8.0, -1.0, n_sink=8),
]
REST = [
    row(0, 3.0, 2.5),  # tied with 3 in time
    row(2, 8.5, -1.0, backend="math", backend_requested="flash"),  # tied with 1 in quality
    row(5, 20.0, 30.0, method="mit"),
    row(6, 1.0, -9.0, feasible=False),
    failed(8),
    row(9, 2.5, math.nan),
]
PLACES = {0: ("dominated", 3), 2: ("dominated", 1), 5: ("dominated", 7), 6: ("infeasible", None), 8: ("failed", None)}
PLACES |= {9: ("not finite", None)} | {trial["trial"]: ("front", None) for trial in FRONT}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return load_study(str(write_study(tmp_path, [*REST, *reversed(FRONT)])))


def numbers(table):
    return [row["trial"] for row in table.rows]


def test_the_whole_front_and_with_all_the_rest_with_what_dominates_it(study):
    assert numbers(pareto_table([study])) == [7, 4, 3, 1]  # of equals as they come in the file
    table = pareto_table([study], everything=True)
    assert numbers(table) == [7, 4, 3, 1, 0, 2, 5, 9, 6, 8]
    expected = PLACES | {0: ("dominated", 4)}
    assert {row["trial"]: (row["place"], row.get("dominated_by")) for row in table.rows} == expected
    assert [row["trial"] for row in table.baselines] == ["baseline"]
    assert table.summary == ("m on d, study s: 4 of 10 trials are on the front",)


def test_unconfirmed_values_do_not_beat_confirmed_ones(tmp_path):
    """3 and 1 were confirmed; 7, on the search's front, was not: it is neither on the front nor dominated."""

    def values(trial, tpot):
        times = {"tpot_ms": tpot, "tpot_ms_low": tpot - 0.5, "tpot_ms_high": tpot + 0.5, "speedup": 5.0}
        return {"trial": trial, "rounds": 3, "front_probability": 0.9} | times

    folder = write_study(tmp_path, [*FRONT, row(0, 8.5, 5.0)], confirmed=[values(3, 4.0), values(1, 7.0)])
    table = pareto_table([load_study(str(folder))], everything=True)
    places = {row["trial"]: (row["place"], row.get("dominated_by")) for row in table.rows}
    assert places == {3: ("front", None), 1: ("front", None), 7: ("unconfirmed", None), 4: ("unconfirmed", None)} | {
        0: ("dominated", 3)
    }
    text = FORMATS["md"].write(table)
    assert "4.0 [3.5, 4.5] | 5.0 | 3 | 0.90" in text and "| rounds |" in text and "not measured again" in text
    assert "| rounds |" not in FORMATS["md"].write(pareto_table([load_study(str(folder))])), "all have as many"


def test_the_reference_is_the_unit_of_all_milliseconds(tmp_path):
    strict = row("strict", 1.0, 0.0, time_ratio=1.02, time_ratio_low=0.9, reference_tpot_ms=5.0)
    trial = row(0, 1.0, 1.0, time_ratio=0.5, time_ratio_low=0.4, time_ratio_high=0.6, reference_tpot_ms=9.0)
    baseline = row("baseline", 1.0, 0.0, method="recompute", time_ratio=4.0, reference_tpot_ms=7.0)
    confirmed = [{"trial": "baseline", "time_ratio": 3.0, "rounds": 3, "reference_tpot_ms": 7.0}]
    study = load_study(str(write_study(tmp_path, [strict, trial], baseline=baseline, confirmed=confirmed)))
    assert (study.strict["tpot_ms"], study.baseline["tpot_ms"], study.trials[0]["tpot_ms"]) == (7.0, 21.0, 3.5)
    assert (study.strict["speedup"], study.trials[0]["speedup"]) == (3.0, 6.0), "beside the baseline as confirmed"
    assert [row["tpot_ms"] for row in study.searched] == [28.0, 3.5], "and as searched"
    assert study.references[0].timings == 4 and "7 ms" in pareto_table([study]).notes[1]


def test_what_cannot_be_told_from_a_member_is_tied_with_it(tmp_path):
    """3 and 1 are told apart; 4 is the fastest of the confirmed, though not for certain, and better in nothing else."""

    def values(trial, tpot, probability, not_told):
        return {
            "trial": trial,
            "rounds": 3,
            "tpot_ms": tpot,
            "front_probability": probability,
            "not_told_from": not_told,
        }

    slightly_worse = {"ppl_increase_percent": 2.01}
    tied, beaten = values(4, 2.9, 0.6, [3]) | slightly_worse, values(7, 2.9, 0.1, [3]) | {"ppl_increase_percent": 9.0}
    confirmed = [values(3, 3.0, 1.0, [4]), values(1, 6.0, 1.0, []), tied, beaten]
    study = load_study(str(write_study(tmp_path, FRONT, confirmed=confirmed)))
    assert [row["trial"] for row in study.front] == [3, 1]
    table = pareto_table([study], everything=True)
    places = {row["trial"]: (row["place"], row.get("no_better_than")) for row in table.rows}
    assert places == {3: ("front", None), 1: ("front", None), 4: ("tied", "3"), 7: ("no better", "3")}
    assert any("Tied: " in note for note in table.notes)
    assert any(note.startswith("Trial 3 stands for trial 4 too") for note in table.notes)


def test_without_trials_or_without_a_front(tmp_path):
    empty = load_study(str(write_study(tmp_path, [], "empty", baseline=None)))
    lost = load_study(str(write_study(tmp_path, [failed(0), row(1, math.nan, 1.0)], "lost")))
    for form in FORMATS.values():
        for everything in (False, True):
            assert form.write(pareto_table([empty, lost], everything))
    assert numbers(pareto_table([lost], everything=True)) == [1, 0]
    assert "the front is empty" in pareto_table([lost]).notes[-1]


@pytest.mark.parametrize(
    ("low", "high", "decimals"),
    [
        (0.0, 2.0, 1),  # half-width 1.0: two digits
        (0.0, 7.08, 1),  # 3.54
        (0.0, 7.12, 0),  # 3.56: one
        (4.75, 5.62, 1),  # 0.435
        (5.08, 5.56, 2),  # 0.24
        (-0.00012, 0.00012, 5),
        (0.0, 300.0, 0),
        (1.0, 1.0, 7),
        (0.0, math.inf, 7),
        (0.0, math.nan, 7),
    ],
)
def test_digits_end_where_the_interval_begins_to_matter(low, high, decimals):
    assert interval_decimals(low, high, otherwise=7) == decimals


def test_what_a_cell_says():
    time = BY_KEY["tpot_ms"]
    assert time.text({"tpot_ms": 5.1712, "tpot_ms_low": 4.75, "tpot_ms_high": 5.62}) == "5.2 [4.8, 5.6]"
    assert time.text({"tpot_ms": 5.1712}) == "5.17"
    assert BY_KEY["ppl_increase_percent"].text({"ppl_increase_percent": -0.001}) == "0.0"
    assert [time.text({}), time.text({"tpot_ms": math.nan}), BY_KEY["n_sink"].text({"n_sink": 0})] == ["", "", "0"]
    assert BY_KEY["n_sink"].title == "sinks (tokens)"


def test_every_format_is_read_back_as_the_same_rows(study, capsys):
    assert main(["s", "--all", "--format", "md,csv,latex,json,parquet,html"]) == 0
    table = pareto_table([study], everything=True)
    trials, times = numbers(table), [row.get("tpot_ms") for row in table.rows]
    folder = study.folder
    frames = [pd.read_csv(folder / "pareto.csv"), pd.read_json(folder / "pareto.json", dtype_backend="numpy_nullable")]
    frames.append(pd.read_parquet(folder / "pareto.parquet"))
    for frame in frames:
        assert frame["trial"].tolist() == trials
        assert [None if pd.isna(x) else x for x in frame["tpot_ms"]] == times
        assert [None if pd.isna(x) else x for x in frame["dominated_by"]] == [PLACES_BY_4.get(t) for t in trials]
        assert frame["ppl_increase_percent"].isna().sum() == 2, "NaN and a failed trial"
        assert frame["tpot_ms_high"].dropna().tolist() == pytest.approx([1.1 * t for t in times if t is not None])
        assert frame["recommended"].fillna("").tolist() == ["", "knee"] + [""] * 8
    titles = [column.title for column in table.columns]
    cells = table.cells
    assert cells[0][titles.index("ms/token")] == "2.00 [1.80, 2.20]"
    lines = [line[2:-2].split(" | ") for line in (folder / "pareto.md").read_text().splitlines() if line[:2] == "| "]
    assert lines == [titles, *cells]
    page = Page()
    page.feed((folder / "pareto.html").read_text())
    assert page.lines == [titles, *cells]
    assert not page.addresses, "opens offline"
    source, kept = (folder / "pareto.tex").read_text(), [n for n, t in enumerate(titles) if t not in NO_ROOM]
    starred = [["*" * (line[1] != "") + line[0], *line[1:]] for line in cells]
    assert titles[:2] == ["#", "recommended"] and starred[1][0] == "*4"
    assert latex_cells(source) == [[line[n] for n in kept] for line in starred]
    assert "needs \\begin{sidewaystable}" in source
    assert "% left out for its width: peak KV, PPL; CSV, JSON and Parquet have all" in source
    assert "written:" in capsys.readouterr().out


NO_ROOM = {"recommended", "PPL", "peak KV (tokens)"}
"""What the LaTeX table of all trials does without."""
PLACES_BY_4 = {0: 4, 2: 1, 5: 7}


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.lines, self.addresses, self.inside = [], [], False

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.lines[-1].append("")

    def handle_data(self, data):
        if self.inside:
            self.lines[-1][-1] += data

    def handle_endtag(self, tag):
        self.inside &= tag not in ("td", "th")


def latex_cells(text):
    """The body of a LaTeX table, in plain characters; checks what would keep it from compiling."""
    source = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert not re.search(r"[^\x20-\x7eÀ-ÿ\n]", source)
    assert balanced(source)
    opened = re.findall(r"\\begin\{(\w+)\}", source)
    assert opened == list(reversed(re.findall(r"\\end\{(\w+)\}", source))) and len(opened) == 1
    columns = re.search(r"\\begin\{\w+\}\{@\{\}([lr]+)@\{\}\}", source)[1]
    assert [source.count(rule) for rule in ("\\toprule", "\\bottomrule")] == [1, 1]
    body = source.split("\\midrule", 1)[1].split("\\bottomrule")[0]
    rows = []
    for line in body.splitlines():
        if line and not line.startswith(("\\midrule", "\\endhead", "\\addlinespace")):
            assert line.endswith(" \\\\")
            cells = [plain(cell.strip()) for cell in re.split(r"(?<!\\)&", line[:-3])]
            assert len(cells) == len(columns)
            if cells[0]:
                rows.append(cells)
            else:  # intervals, below their values
                rows[-1] = [f"{above} {below}".strip() for above, below in zip(rows[-1], cells, strict=True)]
    return rows


def balanced(source):
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", source.replace("\\\\", "")):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def plain(cell):
    for written, meant in {"$-$": "-", "{[}": "[", "{]}": "]", "{*}": "*", "$\\times$": "×"}.items():
        cell = cell.replace(written, meant)
    bare = re.sub(r"\\text\w+\{\}|\\[&%$#_{}]", "", cell)
    assert not re.search(r"[&%$#_{}~^\\]", bare), "a character that LaTeX takes for its own"
    cell = re.sub(r"\\([&%$#_{}])", r"\1", cell)
    return re.sub(r"\\text(\w+)\{\}", lambda m: SYMBOLS[m[1]], cell)


SYMBOLS = {"backslash": "\\", "asciitilde": "~", "asciicircum": "^", "less": "<", "greater": ">", "bar": "|"}
NASTY = "[a] 50% & $1 #_{x}~^ \\n <b>|*é"


def nasty_table(count=1):
    columns = (Column("name", "na_me", "%", words=True), Column("x", "x", "", 1, interval=True))
    rows = [{"name": NASTY, "x": -1.0, "x_low": -2.0, "x_high": 0.0}] * count
    return Table("T $%", ("% & \\",), columns, rows, [{"name": "b", "x": -3}], ("line\nbreak",))


@pytest.mark.parametrize("count", [1, 80])
def test_nothing_in_a_cell_is_taken_for_markup(count):
    table = nasty_table(count)
    text = latex(table)
    assert latex_cells(text) == [*[[NASTY, "-1.0 [-2.0, 0.0]"]] * count, ["b", "-3.0"]]
    assert ("longtable" in text) == (count > 50)
    assert latex_cells(latex(Table("", (), table.columns[:1], [{"name": "模型 ð"}]))) == [["?? ?"]]
    page = Page()
    page.feed(FORMATS["html"].write(table))
    assert page.lines[1] == [NASTY, "-1.0 [-2.0, 0.0]"]
    line = FORMATS["md"].write(table).splitlines()[6]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3 and "&lt;b&gt;" in line
    assert next(csv.reader(io.StringIO(FORMATS["csv"].write(table).split("\n", 1)[1])))[0] == NASTY


def wide_table(count, dispensable=()):
    """Of so many columns, each 29.5 points wide with its interval beside it and 22.5 below it, and 6 between two."""
    columns = tuple(Column(f"x{n}", "x", "", 0, interval=True) for n in range(count))
    return Table("T", (), columns, [{f"x{n}{end}": 1.0 for n in range(count) for end in ("", "_low")} |
                                    {f"x{n}_high": 30.0 for n in range(count)}], dispensable=dispensable)  # fmt: skip


@pytest.mark.parametrize(
    ("count", "says", "below"),
    [
        (8, "in \\footnotesize: fits the 345 pt of an article's text", False),
        (11, "in \\footnotesize: fits the 345 pt of an article's text", True),
        (13, "in \\footnotesize: needs \\begin{table*}", True),
        (17, "needs \\begin{sidewaystable} (\\usepackage{rotating})", True),
        (30, "and fewer columns, as a page is 550 pt high", True),
    ],
)
def test_a_latex_table_fits_where_it_says(count, says, below):
    source = latex(wide_table(count))
    assert says in source, source.split("\n")[2]
    assert ("\n{[}1, 30{]} &" in source) == below
    assert len(latex_cells(source)[0]) == count, "nothing is left out but what is dispensable"


def test_a_latex_table_leaves_out_what_is_dispensable_before_it_is_turned():
    source = latex(wide_table(17, ("x3", "x4", "x5")))
    assert "needs \\begin{table*}" in source and "left out for its width: x; CSV" in source
    assert len(latex_cells(source)[0]) == 16


def typeset(source, folder):
    (folder / "t.tex").write_text(source)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("count", [1, 80])
def test_latex_compiles(count, tmp_path):
    head = "\\documentclass{article}\\usepackage{booktabs,longtable}\\begin{document}\n"
    typeset(head + latex(nasty_table(count)) + "\\end{document}\n", tmp_path)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_a_latex_table_is_as_wide_as_it_says(study, tmp_path):
    for table in (pareto_table([study]), pareto_table([study], everything=True), wide_table(8), wide_table(12)):
        source = latex(table)
        head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\newsavebox\\here\\savebox\\here{%\n"
        said = typeset(head + source.strip() + "}\\typeout{WIDTH \\the\\wd\\here}\\end{document}\n", tmp_path)
        width = float(re.search(r"about (\d+) pt wide", source)[1])
        assert float(re.search(r"WIDTH ([\d.]+)pt", said)[1]) == pytest.approx(width, rel=0.01)


@pytest.mark.parametrize(
    ("where", "trials"),
    [
        ("backend='math'", [2, 4]),
        ("backend.used = 'math'", [2, 4]),
        ("tags.`backend.used` = 'math' and metrics.tpot_ms < 8", [4]),
        ('backend = "math" and backend.requested = "flash"', [2]),
        ("ppl_increase_percent < 3 and method in ('ours', 'ring') and n_sink >= 8", [3, 1]),
        ("ppl_increase_percent is null", [8, 9]),
        ("not feasible", [6, 8]),
        ("reason like '%no room'", [8]),
        ("method = 'backend.used'", []),
        ("STATE = 'failed' or trial=5 -- a comment", [5, 8]),
    ],
)
def test_filters(study, where, trials):
    assert sorted(row["trial"] for row in select(study.trials, where)) == sorted(trials)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("backnd = 'math'", "no column 'backnd'; there are backend, backend_requested, cache_slack"),
        ("metrics.tpot = 1", "no column 'tpot'; there are"),
        ("`tpot ms` < 3", "no column 'tpot ms'; there are"),
        ("backend ==", "expected a column or a value, found the end; write for example"),
        ("1) union select 1 --", "where '1) union select 1 --':"),
        ("1; drop table trials", "where '1; drop table trials':"),
        ("__import__('os').system('true')", "where"),
        ("tpot_ms < 0", "none of the 10 trials meets it"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_one_line_with_exit_code_2(study, where, message, capsys):
    assert main(["s", "--where", where]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: where") and message in error and error.count("\n") == 1


def test_the_front_can_be_asked_for(study):
    on_front = {row["trial"] for row in study.front}
    assert {row["trial"] for row in filtered(study, "front").trials} == on_front
    assert {row["trial"] for row in filtered(study, "not front").trials} == {*range(10)} - on_front


def test_the_front_of_a_filter_is_that_of_what_it_leaves(study):
    table = pareto_table([study], where="n_sink < 8 and feasible")
    assert numbers(table) == [7, 4, 2]
    assert table.summary[0].endswith(
        "3 of 6 trials are on the front; of its 10 trials only the 6 where n_sink < 8 and feasible"
    )


def test_several_studies_side_by_side(study, tmp_path, capsys):
    other = write_study(tmp_path, [row(0, 1.0, 1.0), row(1, 2.0, 2.0)], "other")
    assert main(["s", str(other), "--format", "csv"]) == 0
    frame = pd.read_csv("pareto.csv")
    assert list(zip(frame["study"], frame["trial"], strict=True)) == [
        ("s", 7),
        ("s", 4),
        ("s", 3),
        ("s", 1),
        ("other", 0),
    ]
    assert main(["s", str(other), "--format", "csv", "--output", "deep/er"]) == 0
    assert Path("deep/er/pareto.csv").read_text() == Path("pareto.csv").read_text()
    notes = pareto_table([study, load_study("other")]).notes
    assert [note.split(" is")[0] for note in notes if "recommended" in note] == ["s: Trial 4", "other: Trial 0"]
    assert sum(note.startswith("Measured again by: python -m streamllm evaluate") for note in notes) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s", "--format", "xls"], "format 'xls': must be one of md, csv, latex, json, parquet, html"),
        (["none"], "study 'none': neither a folder with results nor one of sweeps/ (s)"),
        (["s", "--output", "/dev/null/x"], "cannot be written"),
        (
            ["s", "--max-ppl-increase", "3%"],
            "max-ppl-increase '3%': must be a number of percent above -100, for example 3",
        ),
        (["s", "--max-ppl-increase", "nan"], "max-ppl-increase 'nan': must be"),
        (["s", "--max-ppl-increase", "-100"], "max-ppl-increase '-100': must be"),
        (["s", "--max-ppl-increase", "inf"], "max-ppl-increase 'inf': must be"),
    ],
)
def test_bad_input(study, arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_is_recommended_is_always_marked_said_and_can_be_limited(study, capsys):
    for arguments in (["s"], ["s", "--knee"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "\n*4  ours" in out and out.count("*") == 1
        assert "Trial 4 is recommended, the front's knee" in out
        assert "\nMeasured again by: python -m streamllm evaluate --mode both --model testbed" in out
        marked = pd.read_csv("sweeps/s/pareto.csv").set_index("trial")["recommended"].dropna()
        assert marked.to_dict() == {4: "knee"}
    assert main(["s", "--max-ppl-increase", "-0.5"]) == 0
    out = capsys.readouterr().out
    assert "\n*1  ours" in out and "perplexity is at most -0.5% above re-computation's" in out
    assert "--n-sink 8" in out


def test_why_trials_failed_is_said_once_for_each_reason(tmp_path):
    trials = [row(0, 1.0, 1.0), failed(1, reason="A  long\nreason"), failed(2, reason="A  long\nreason"), failed(3)]
    trials += [row(4, 0.5, 0.5, feasible=False, violated="speedup >= 99")]
    study = load_study(str(write_study(tmp_path, trials)))
    notes = pareto_table([study], everything=True).notes
    assert "Failed: A long reason (trials 1, 2)" in notes and "Failed: MemoryError: no room (trial 3)" in notes
    assert "Infeasible: speedup >= 99 (trial 4)" in notes
    assert not any("reason" in note for note in pareto_table([study]).notes)
    many = load_study(str(write_study(tmp_path, [failed(n, reason=f"no {n}") for n in range(30)], "many")))
    notes = pareto_table([many], everything=True).notes
    assert sum(note.startswith("Failed") for note in notes) == 8 and "22 other reasons" in notes
    alike = load_study(str(write_study(tmp_path, [failed(n) for n in range(30)], "alike")))
    assert "(trials 0, 1, 2, 3, 4, 5, 6, 7 and 22 more)" in "\n".join(pareto_table([alike], everything=True).notes)


def parsed(command):
    python, dash_m, module, name, *flags = shlex.split(command)
    assert [python, dash_m, module, name] == ["python", "-m", "streamllm", "evaluate"]
    parser = ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(flags)


def test_the_command_names_all_that_decides_the_trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = {"text": "my book.txt", "token_ids": None, "dataset_name": None, "dataset_config": None, "offset": 7}
    trial = row(3, 3.0, 2.0, method="ring", n_sink=32, window_size=200, compress_every=16, cache_slack=24, max_drop=8)
    trial |= {"backend_requested": "math", "execution": "compile", "threads": 2, "dtype": "bfloat16"}
    write_study(
        tmp_path,
        [trial],
        source=source | {"max_eval_tokens": 500},
        model="-odd/my model",
        quantization="int8_weight_only",
    )
    arguments = parsed(reproduce_command(load_study("s"), trial))
    assert given_policy(arguments) == EvictionPolicy(
        n_sink=32, window_size=200, compress_every=16, cache_slack=24, max_drop=8
    )
    assert {name: getattr(arguments, name) for name in ("method", "attn_backend", "execution", "threads", "dtype")} == {
        "method": "ring", "attn_backend": "math", "execution": "compile", "threads": 2, "dtype": "bfloat16",
    }  # fmt: skip
    assert (arguments.model, arguments.quantization) == ("-odd/my model", "int8_weight_only")
    assert (arguments.text, arguments.offset, arguments.max_eval_tokens) == (Path("my book.txt"), 7, 500)
    assert arguments.store == Path("sweeps/.store") and arguments.mode == "both"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    elsewhere = reproduce_command(load_study(str(tmp_path / "sweeps" / "s")), trial)
    assert parsed(elsewhere).store == tmp_path / "sweeps" / ".store"
    data = {"text": None, "token_ids": None, "dataset_name": "pg19", "dataset_config": "c", "offset": 0}
    data |= {"max_eval_tokens": None, "split": "train", "book": "Dragon's blood", "join": "lines"}
    other = load_study(str(write_study(tmp_path, [trial], "o", source=data)))
    arguments = parsed(reproduce_command(other, trial))
    assert (arguments.dataset_name, arguments.split, arguments.book) == ("pg19", "train", "Dragon's blood")
    assert (arguments.join, other.name) == ("lines", "o")


def test_the_command_measures_the_same_again(tmp_path, monkeypatch, capsys):
    """A trial's row is that of an evaluation; its command prints the same perplexity and policy."""
    from streamllm.__main__ import main as streamllm

    def run_streamllm(arguments):
        monkeypatch.setattr(sys, "argv", ["streamllm", *arguments, "--json"])
        assert streamllm() == 0
        return json.loads(capsys.readouterr().out)

    monkeypatch.chdir(tmp_path)
    source = {"text": None, "token_ids": str(GOLDEN / "tokens.json"), "dataset_name": None, "dataset_config": None}
    what = ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", source["token_ids"], "--max-eval-tokens", "160"]
    how = "--mode both --method ring --n-sink 3 --window-size 20 --compress-every 4 --cache-slack 5 --max-drop 2"
    first = run_streamllm(["evaluate", *what, *how.split(), "--threads", "1"])
    trial = {"trial": 0, "feasible": True, "state": "complete", **first}
    source |= {"offset": 0, "max_eval_tokens": 160}
    write_study(tmp_path, [trial], source=source, model=str(GOLDEN / "neox-tiny"))
    command = shlex.split(reproduce_command(load_study("s"), trial))
    again = run_streamllm(command[3:])
    same = set(first) - {
        name
        for name in first
        if re.search("tpot|sec|ms|speedup|bandwidth|memory|warmup|segment|ratio|pairs|timed_at|load", name)
    }
    assert {name: again[name] for name in same} == {name: first[name] for name in same} and "perplexity" in same
