"""The report: one file that opens offline, says what was found, and shows nothing but text of what it is given."""

import json
import re
from html.parser import HTMLParser

import pytest

from dashboards.drawing.captions import caption
from dashboards.findings import costs_nothing, findings
from dashboards.recommendation import reproduce_command
from dashboards.report import FIGURES, main, report, write_report
from streamllm.results.study import load_study

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&"
CONFIGURATION = {
    "study": "s",
    "study_id": "5711d",
    "commit": "c0ffee",
    "model": "m",
    "quantization": "none",
    "cap": 256,
    "seed": 0,
    "space": {"name": "default", "cap_accounting": "nominal"},
    "summary": "m on t, space default",
    "versions": {"torch": "2.13.0"},
    "objectives": {"tpot_ms": "minimize", "ppl_increase_percent": "minimize"},
}


def row(trial, tpot, increase, **more):
    policy = {"n_sink": 4, "window_size": 252, "compress_every": 1, "cache_slack": 0, "max_drop": 0}
    interval = {"ppl_increase_percent_low": increase - 1.0, "ppl_increase_percent_high": increase + 1.0}
    words = {"method": "ours", "backend": "math", "backend_requested": "flash", "model": "m", "dataset": "t"}
    return {
        "trial": trial, "state": "complete", "feasible": True, **words, **policy, "tpot_ms": tpot, "peak_kv": 257,
        "tpot_ms_low": tpot - 0.1, "tpot_ms_high": tpot + 0.1, "speedup": 40.0 / tpot, "perplexity": 15.0 + increase,
        "ppl_increase_percent": increase, **interval, "protocol": "fast", "segments": 12, "evaluated_tokens": 23012,
        "device": "CPU", "finished_at": 1.7e9, "commit": "c0ffee", **more,
    }  # fmt: skip


def failed(trial, reason):
    return {**row(trial, 1.0, 0.0), "state": "failed", "feasible": False, "reason": reason}


BASELINE = row("baseline", 40.0, 0.0, method="recompute", evaluated_tokens=1024)
ROWS = [BASELINE, row(0, 5.0, 4.2), row(1, 5.5, 1.5), row(2, 8.0, 0.4), row(3, 9.0, 9.0)]


def study(folder, rows=ROWS, added=(), status="FINISHED", **settings):
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(CONFIGURATION | settings))
    for name, content in (("trials", rows), ("confirmed", added)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in content))
    if status:
        (folder / "outcome.json").write_text(json.dumps({"status": status, "ended_at": 1.7e9}))
    return load_study(str(folder))


class Page(HTMLParser):
    """Tags with their attributes, the text of each element by id, and whether they are closed in order."""

    VOID = frozenset({"meta", "link", "input", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], {}, []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self._open:
            if name:
                self.text[name] = self.text.get(name, "") + data

    @property
    def data(self):
        return json.loads(self.text["data"], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def trials(self):
        """As the script has them."""
        data = self.data
        return [data["shared"] | dict(zip(data["keys"], values, strict=True)) for values in data["rows"]]

    def command(self, place):
        return " ".join(self.data["commands"]["words"][word] for word in self.data["commands"]["of"][place])


def test_the_page_is_whole_and_asks_nobody_for_anything(tmp_path):
    text = report(study(tmp_path))
    page = Page(text)
    sections = {"summary", "front", "trials", "figures", "measured", "failed", "environment"}
    assert sections <= {attributes.get("id") for _, attributes in page.tags}
    sources = [a[name] for _, a in page.tags for name in ("src", "href", "action", "data") if name in a]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text and "script-src 'sha256-" in text
    assert "prefers-color-scheme: dark" in text


def test_data_is_that_of_the_study(tmp_path):
    page = Page(report(study(tmp_path, [*ROWS, row(4, float("nan"), 1.0), failed(5, "RuntimeError: nope")])))
    data = page.data
    trials = page.trials
    assert [one["trial"] for one in trials] == [0, 1, 2, 3, 4, 5]
    assert [trials[place]["trial"] for place in data["front"]] == [0, 1, 2]
    assert trials[1]["tpot_ms"] == 5.5 and trials[1]["tpot_ms_high"] == 5.6
    assert trials[4]["tpot_ms"] is None, "NaN is no JSON"
    assert trials[5]["reason"] == "RuntimeError: nope"
    assert [(row["trial"], row["tpot_ms"]) for row in data["fixed"]] == [("baseline", 40.0)]
    assert data["axes"][:2] == ["tpot_ms", "ppl_increase_percent"]
    assert "tpot_ms" in data["table"] and data["inCommon"][:2] == ["method", "backend"]
    assert {trials[0][name] for name in ("method", "device", "evaluated_tokens")} == {"ours", "CPU", 23012}


def test_each_row_has_its_command_its_run_and_its_files(tmp_path):
    """The commands are those of `reproduce_command`; of runs nothing is said where nobody noted where they are."""
    folder = tmp_path / "the study"
    entry = "ab" * 32
    rows = [BASELINE, row(0, 5.0, 4.2, speed_entry=entry), row(1, 5.5, 1.5, n_sink=8)]
    results = study(folder, rows)
    page = Page(report(results, at=tmp_path))
    told = [*results.trials, *results.fixed]
    assert [page.command(place) for place in range(3)] == [reproduce_command(results, one) for one in told]
    assert "--n-sink 8" in page.command(1) and "--n-sink 8" not in page.command(0)
    assert (page.data["folder"], page.data["mlflow"]) == ("the study", None)
    assert page.trials[0]["speed_entry"] == entry
    assert page.data["trace"] == f"python -m dashboards.pareto '{folder}' --trace"
    results.files.write_tracking("sqlite:////somewhere/mlflow.db", "7")
    told = Page(report(results)).data["mlflow"]
    assert told["command"] == "mlflow ui --backend-store-uri sqlite:////somewhere/mlflow.db"
    filter = "tags.study_id%20%3D%20%275711d%27%20and%20tags.trial%20%3D%20"
    shown = "http://127.0.0.1:5000/#/experiments/7/runs?workflowType=machine_learning"
    assert told["address"] == f"{shown}&searchFilter={filter}"
    results.files.write_tracking("https://mlflow.example/", "7")
    told = Page(report(results)).data["mlflow"]
    assert told["command"] == "" and told["address"].startswith("https://mlflow.example/#/experiments/7/")
    results.files.write_tracking("databricks", "7")
    assert Page(report(results)).data["mlflow"] is None
    results.files.tracking.write_text("[]")
    assert Page(report(results)).data["mlflow"] is None


def test_the_python_call_gives_the_fronts_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    study(tmp_path / "sweeps/s")
    call = Page(report(load_study("s"))).text["front-call"]
    assert "load_study('s')" in call
    *before, last = call.splitlines()
    names = {}
    exec("\n".join(before), names)
    found = eval(last, names)
    assert list(found["trial"]) == [0, 1, 2] and list(found["tpot_ms_high"]) == [5.1, 5.6, 8.1]
    assert list(found.columns)[:3] == ["trial", "method", "backend"]


def test_every_figure_has_a_caption():
    assert {name: caption(name) for name in FIGURES if len(caption(name)) < 60} == {}
    assert caption("ablation_n_sink").startswith("Time, left, and quality, right, over sinks S, tokens;")
    assert caption("of_someone_else") == "of someone else"


def test_whatever_is_in_a_study_stays_text(tmp_path):
    rows = [*ROWS, row(4, 4.0, 0.1, model=EVIL, method=EVIL, dataset=EVIL, warning=EVIL), failed(5, EVIL)]
    settings = {"study": EVIL, "model": EVIL, "summary": EVIL, "commit": EVIL, "versions": {"torch": EVIL}}
    results = study(tmp_path, rows, **settings)
    page = Page(report(results))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert {attributes["src"][:5] for tag, attributes in page.tags if tag == "img"} == {"data:"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert EVIL in page.text["front"] and EVIL in page.text["failed"] and EVIL in page.text["environment"]
    assert EVIL in page.text["summary"]
    assert EVIL in page.trials[-2].values()


def test_the_summary_says_what_was_found(tmp_path):
    found = findings(results := study(tmp_path), results.front)
    assert found.found == (
        "8.0 times as fast as re-computing for 4.2% more perplexity [+3.2, +5.2] (trial 0): the fastest.",
        "5.0 times as fast as re-computing at no measurable cost in quality: +0.4% perplexity [-0.6, +1.4] (trial 2).",
    )
    assert "4 configurations" in found.asked and "last 256 tokens" in found.asked
    assert found.recommended["trial"] == 1
    assert "trial 1: ours, math attention, 4 sinks, window 252" in found.why
    assert "not confirmed" in " ".join(found.certainty)


@pytest.mark.parametrize(
    ("chance", "timed", "said"),
    [
        (0.02, 4, "The front is complete to 1%, after 4 of 4,032 configurations: .* with a probability of 2%"),
        (0.6, 4, "may not be complete, .* add 1% or more .* probability of 60%.* with --until 0.01, goes on"),
        (0.0, 4032, "All 4032 configurations of the space were tried"),
    ],
)
def test_how_complete_the_front_is_is_said(tmp_path, chance, timed, said):
    left = {"share": 0.01, "chance": chance, "timed": timed, "points": 4032}
    results = study(tmp_path, completeness=left)
    assert re.search(said, findings(results, results.front).found[-1])


def test_a_free_fastest_is_said_once_and_less_perplexity_is_called_so(tmp_path):
    found = findings(results := study(tmp_path, [BASELINE, row(0, 4.0, -2.0)]), results.front)
    assert found.found == (
        "10.0 times as fast as re-computing with 2.0% less perplexity [-3.0, -1.0] (trial 0): the fastest.",
    )
    assert found.recommended["trial"] == 0 and "alone is on the front" in found.why
    assert costs_nothing(row(0, 1.0, 1.0)) and not costs_nothing(row(0, 1.0, 1.01))


def test_confirmed_values_count_and_are_said(tmp_path):
    confirmed = {
        "trial": 1, "rounds": 3, "tpot_ms": 6.0, "tpot_ms_low": 5.8, "tpot_ms_high": 6.3, "speedup": 6.6,
        "speedup_low": 6.1, "speedup_high": 7.0, "front_probability": 0.92,
    }  # fmt: skip
    results = study(tmp_path, added=[confirmed])
    found = findings(results, results.front)
    assert "measured again, 3 times" in found.certainty[0] and "between 6.1 and 7.0" in found.certainty[0]
    assert "92%" in found.certainty[0]
    page = Page(report(results))
    trials = page.trials
    assert (trials[1]["tpot_ms"], trials[1]["tpot_ms_low"], trials[0]["tpot_ms"]) == (6.0, 5.8, 5.0)
    assert "6.00 [5.80, 6.30]" in page.text["front-table"]
    assert "3 rounds" in page.text["measured"]


def test_what_is_unfinished_or_failed_is_said(tmp_path):
    reasons = ["MemoryError: tried 128 MiB", "MemoryError: tried 64.5 MiB", "RuntimeError: nope"]
    rows = [*ROWS, *(failed(10 + n, reason) for n, reason in enumerate(reasons)), row(20, 4.0, 50.0, feasible=False)]
    rows[-1]["violated"] = "ppl_increase_percent <= 3"
    results = study(tmp_path, rows, status="KILLED")
    said = " ".join(findings(results, results.front).certainty)
    assert "3 of 8 configurations failed" in said and "was interrupted" in said
    text = Page(report(results)).text["failed"]
    assert "Failed: 3 of 8" in text and "breaking a constraint: 1 of 8" in text
    assert "2MemoryError: tried 128 MiB10, 11" in text and "64.5" not in text
    assert "1RuntimeError: nope12" in text
    running = study(tmp_path / "running", status=None)
    assert "has not finished" in " ".join(findings(running, running.front).certainty)


@pytest.mark.parametrize(
    "rows", [[], [BASELINE], [failed(0, "no")], [row(0, 4.0, 1.0)], [BASELINE, row(0, 4.0, 1.0), row(1, 4.0, 1.0)]]
)
def test_studies_with_little_in_them(tmp_path, rows):
    page = Page(report(study(tmp_path, rows)))
    assert len(page.data["rows"]) == sum(one["trial"] != "baseline" for one in rows)
    assert page.text["summary"].strip()


def test_other_objectives(tmp_path):
    objectives = {"speedup": "maximize", "perplexity": "minimize", "peak_kv": "minimize"}
    results = study(tmp_path, objectives=objectives)
    page = Page(report(results))
    assert page.data["axes"][:3] == list(objectives)
    assert "knee" in page.text["summary"].lower()


def test_an_output_that_is_a_folder_is_refused_by_its_name(tmp_path, capsys):
    study(tmp_path / "s")
    assert main([str(tmp_path / "s"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: output '{tmp_path}': a folder; give the name of a file\n"


def test_command(tmp_path, capsys):
    study(tmp_path / "s")
    assert main([str(tmp_path / "s")]) == 0
    assert (tmp_path / "s/report.html").is_file()
    assert main([str(tmp_path / "s"), "--output", str(tmp_path / "out.html")]) == 0
    assert str(tmp_path / "out.html") in capsys.readouterr().out
    assert main([str(tmp_path / "s"), "--output", str(tmp_path / "no/out.html")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    assert main(["nowhere"]) == 2


def test_ten_thousand_trials_fit(tmp_path):
    rows = [row(n, 5.0 + n % 97 / 10, (n * 7919 % 1000) / 20 + 1.0 / (1 + n % 97)) for n in range(10_000)]
    path = write_report(study(tmp_path, [BASELINE, *rows]))
    assert path.stat().st_size < 10e6
    assert len(Page(path.read_text()).data["rows"]) == 10_000
