"""Every way of damaging every file of a finished study: the same command goes on and loses nothing, the dashboards show
what can be shown, and nobody sees a traceback."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dashboards import pareto, report, summarize
from dashboards.loading import load, load_all, studies_here
from dashboards.serve import Reports, chosen_studies
from dashboards.tables import frames
from orchestrator import sync
from orchestrator.conclusion import keep_front
from orchestrator.search.confirm import comparable
from orchestrator.search.rounds import read_rounds
from orchestrator.search.rows import increases
from orchestrator.workers.lease import study_lease
from streamllm.errors import UsageError
from streamllm.measuring.quality import QualityComparison
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name
from streamllm.results.damaged import DamagedError
from streamllm.results.schema import FORMAT, Row
from streamllm.results.study import load_study
from streamllm.results.study_folder import StudyFolder, read_rows

from .finished_study import TRIALS, configuration_in, go_on, write_finished

FILES = ("trials.jsonl", "journal.log", "sweep.json", "outcome.json", "confirmed.jsonl", "increases.jsonl",
         "rounds.jsonl", "fronts.jsonl", "driver.lock")  # fmt: skip


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def with_lines(change):
    """What takes the file's lines and returns others."""
    return lambda path: path.write_bytes(b"".join(change(lines_of(path))))


def of_each_object(change):
    """What changes the object in each line, or that of the whole file, where there is one."""

    def damage(path):
        text = path.read_text()
        try:
            whole = [json.loads(text)]
        except ValueError:
            whole = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        path.write_text("".join(json.dumps(change(one)) + "\n" for one in whole) if whole else "7\n")

    return damage


def wrong_types(value):
    if isinstance(value, dict):
        return {key: wrong_types(inner) for key, inner in value.items()}
    return "x" if isinstance(value, int | float) else 7


def replaced(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def folder_there(path):
    path.mkdir()
    (path / "something").write_text("in it")


WAYS = {
    "empty": lambda path: path.write_bytes(b""),
    "gone": os.unlink,
    "cut in the middle of a line": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "cut after a line": with_lines(lambda lines: lines[: len(lines) * 2 // 3]),
    "first line gone": with_lines(lambda lines: lines[1:]),
    "a line gone in the middle": with_lines(lambda lines: lines[: len(lines) // 2] + lines[len(lines) // 2 + 1 :]),
    "garbage in the middle": with_lines(lambda lines: [*lines[:1], b"what is this\n", *lines[1:]]),
    "garbage in a line": with_lines(lambda lines: [line[: len(line) // 2] + b"\n" for line in lines[:1]] + lines[1:]),
    "garbage alone": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "no UTF-8": with_lines(lambda lines: [*lines[:1], b'{"trial": "\xff\xfe"}\n', *lines[1:]]),
    "halves of characters": with_lines(lambda lines: [*lines[:1], b'{"trial": "\\ud800"}\n', *lines[1:]]),
    "NULs at the end": lambda path: path.write_bytes(path.read_bytes() + bytes(4096)),
    "NULs in the middle": with_lines(
        lambda lines: [*lines[:1], *(bytes(len(line)) + b"\n" for line in lines[1:2]), *lines[2:]]
    ),
    "NULs alone": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a list": with_lines(lambda lines: [*lines[:1], b"[1, 2]\n", *lines[1:]]),
    "a number": with_lines(lambda lines: [b"7\n" for _ in lines]),
    "null": lambda path: path.write_bytes(b"null\n"),
    "nested too deeply": lambda path: path.write_bytes(b"[" * 100_000 + b"\n"),
    "no keys": of_each_object(lambda one: {}),
    "a key less": of_each_object(lambda one: dict(list(one.items())[1:])),
    "wrong types": of_each_object(wrong_types),
    "lines twice": with_lines(lambda lines: [line for line in lines for _ in range(2)]),
    "lines in another order": with_lines(lambda lines: lines[::-1]),
    "a folder": replaced(folder_there),
    "a link to nothing": replaced(lambda path: path.symlink_to("nothing/there")),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return write_finished(folder).output


@pytest.fixture
def there(finished, tmp_path, monkeypatch):
    """The study's folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "sweeps/s")
    return tmp_path / "sweeps/s"


def finished_rows(folder):
    return {row.trial: row for row in read_rows(folder / "trials.jsonl") if isinstance(row.trial, int)}


def bytes_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", FILES)
def test_the_same_command_goes_on_and_loses_nothing(there, file, way, capsys):
    before = finished_rows(there)
    WAYS[way](there / file)
    study, _ = go_on(configuration_in(there.parent.parent))
    said = capsys.readouterr().err.splitlines()
    assert len(said) <= 1 and all(line.startswith("warning: ") and str(there / file) in line for line in said)
    kept = list(there.glob("*.damaged-*"))
    assert all(path.name == f"{file}.damaged-1" and path.name in said[0] for path in kept)
    assert {row.trial: row for row in study.rows} == before and sorted(before) == list(range(TRIALS))
    found = load_study("s")
    assert found.problems == [] and [row.trial for row in found.trials] == list(range(TRIALS))
    asked = study.ask()
    assert asked is not None and asked.number not in before, "what was finished is not asked for again"
    assert file == "rounds.jsonl" or len(read_rounds(StudyFolder(there))) == 2
    keep_front(found)
    again, _ = go_on(configuration_in(there.parent.parent))
    assert capsys.readouterr().err == "" and len(again.rows) == TRIALS, "it is said once"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", FILES)
def test_the_dashboards_show_what_can_be_shown_and_touch_nothing(there, file, way, capsys):
    WAYS[way](there / file)
    before = bytes_in(there)
    codes = [pareto.main(["s", "--output", "tables", "--all"])]
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: " if codes == [0] else "error: ") and file in line for line in said), said
    assert codes == [0] or len(said) == 1
    if codes == [0]:
        assert "<title>s" in report.report(load("s"), figures=[]) and pareto.main(["s", "--trace", "0"]) in (0, 2)
    assert bytes_in(there) == before, "no file of a study is written or moved by who only reads"


def damaged(path, number, line):
    """Another line in the place of that one, counted from 1."""
    lines = lines_of(path)
    lines[number - 1] = line if isinstance(line, bytes) else f"{json.dumps(line)}\n".encode()
    path.write_bytes(b"".join(lines))


def test_what_is_said_names_file_line_and_the_fix(there, capsys):
    damaged(there / "trials.jsonl", 4, b"{\n")
    damaged(there / "confirmed.jsonl", 2, b"\xff\n")
    assert pareto.main(["s", "--output", "tables"]) == 0
    again = "left out, the sweep's command, given again, makes it anew"
    assert capsys.readouterr().err.splitlines() == [
        "warning: sweeps/s/trials.jsonl, line 4: no JSON (Expecting property name enclosed in double quotes); " + again,
        "warning: sweeps/s/confirmed.jsonl, line 2: no UTF-8; " + again,
    ]
    go_on(configuration_in(there.parent.parent.relative_to(Path.cwd())))
    assert capsys.readouterr().err.splitlines() == [
        "warning: sweeps/s/trials.jsonl, line 4: no JSON (Expecting property name enclosed in double quotes); "
        "it is made anew from the journal; the damaged one is kept as trials.jsonl.damaged-1"
    ]
    assert (there / "trials.jsonl.damaged-1").read_bytes().splitlines()[3] == b"{"
    (there / "sweep.json").write_text('{"study": "s",\n "cap": }')
    (there / "journal.log").unlink()
    assert pareto.main(["s", "--output", "tables"]) == 2
    error = "error: sweeps/s/sweep.json, line 2: no JSON (Expecting value); the sweep's command, given again, makes it"
    assert capsys.readouterr().err == f"{error} anew\n"


def test_trials_that_either_the_journal_or_the_table_still_has_keep_their_numbers(there, capsys):
    """Of what both lost nothing is made up: its configuration is asked for again, under a new number."""
    before = finished_rows(there)
    for name, lost in (("journal.log", (1, 3, 4)), ("trials.jsonl", (0, 3, 5))):
        lines = [line for line in lines_of(there / name) if not any(b'"trial":%d,' % trial in line.replace(b" ", b"")
                                                                    for trial in lost)]  # fmt: skip
        (there / name).write_bytes(b"".join(lines))
    damaged(there / "journal.log", 4, b"x\n")
    study, _ = go_on(configuration_in(there.parent.parent))
    assert {row.trial: row for row in study.rows} == {trial: row for trial, row in before.items() if trial != 3}
    assert "made anew with the 6 finished trials whose rows can be read" in capsys.readouterr().err
    asked = []
    while (trial := study.ask()) is not None:
        asked.append((trial.number, trial.configuration.effective.n_sink, trial.configuration.backend))
    assert asked[0][0] == TRIALS and (before[3].n_sink, before[3].backend_requested) in [one[1:] for one in asked]


def test_lines_of_another_study_are_none_of_this_one(there, capsys):
    before = finished_rows(there)
    for number, change in ((20, {"text_digest": "0"}), (21, {"n_sink": 9, "method": "ours"})):
        lines = lines_of(there / "trials.jsonl")
        row = json.loads(lines[-2]) | {"trial": number} | change
        (there / "trials.jsonl").write_bytes(b"".join(lines) + f"{json.dumps(row)}\n".encode())
    (there / "journal.log").unlink()
    study, _ = go_on(configuration_in(there.parent.parent))
    assert {row.trial: row for row in study.rows} == before
    shutil.copyfile(write_finished(there.parent.parent, "other").journal, there / "journal.log")
    study, _ = go_on(configuration_in(there.parent.parent))
    assert {row.trial: row for row in study.rows}.keys() == before.keys()


def test_a_row_under_another_number_is_no_trial_more(there, capsys):
    row = json.loads(lines_of(there / "trials.jsonl")[5])
    damaged(there / "trials.jsonl", 6, row | {"trial": 6000})
    study, _ = go_on(configuration_in(there.parent.parent))
    assert sorted(row.trial for row in study.rows) == list(range(TRIALS)) and capsys.readouterr().err == ""


def test_files_of_a_later_version_are_left_alone(there, capsys):
    lines = [json.loads(line) for line in lines_of(there / "journal.log")]
    for line in lines:
        if "row" in line.get("user_attr", {}):
            line["user_attr"]["row"]["format"] = FORMAT + 1
    (there / "journal.log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = bytes_in(there)
    with pytest.raises(UsageError, match=rf"journal.log, line \d+: has rows of format {FORMAT + 1}, this version"):
        go_on(configuration_in(there.parent.parent))
    after = bytes_in(there)
    assert [
        path for path in before if before[path] != after[path] and path.name not in ("driver.lock", "sweep.json")
    ] == []


def test_the_settings_are_known_from_the_journal_too(there, capsys):
    study_id = json.loads((there / "sweep.json").read_text())["study_id"]
    (there / "sweep.json").write_text("")
    asked = configuration_in(there.parent.parent)
    assert asked.goes_on()
    with pytest.raises(UsageError, match="exists with other settings"):
        replace(asked, identity=replace(asked.identity, seed=2)).claim()
    assert pareto.main(["s", "--output", "tables"]) == 0
    assert "sweep.json, line 1: no JSON (Expecting value); the journal's copy is read" in capsys.readouterr().err
    go_on(configuration_in(there.parent.parent))
    assert json.loads((there / "sweep.json").read_text())["study_id"] == study_id
    assert "which the journal's copy agrees with; the damaged one is kept as" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("file", FILES)
def test_files_that_must_not_be_read(there, file, capsys):
    (there / file).chmod(0)
    assert pareto.main(["s", "--output", "tables"]) in (0, 2)
    try:
        study, _ = go_on(configuration_in(there.parent.parent))
        assert len(study.rows) == TRIALS
    except UsageError as error:
        assert file in ("journal.log", "driver.lock") and "\n" not in str(error) and file in str(error)


def test_one_damaged_study_keeps_no_other_from_being_shown(there, capsys):
    write_finished(there.parent.parent, "good")
    shutil.rmtree(there.parent / ".store", ignore_errors=True)
    (there / "sweep.json").unlink()
    (there / "journal.log").unlink()
    assert [study.name for study in chosen_studies([])] == ["good"]
    assert pareto.main(["s", "good", "--output", "tables"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("sweeps/s/sweep.json: no such file" in line for line in said)
    assert said[0].startswith("warning: ") and said[0].endswith("; left out")
    with pytest.raises(DamagedError):
        load_all(["s"])
    with pytest.raises(UsageError, match="neither a folder with results"):
        load_all(["good", "nowhere"])
    (there / "trials.jsonl").unlink()
    (there / "trials.jsonl").symlink_to("nothing")
    assert studies_here() == ["sweeps/good"]
    with pytest.warns(UserWarning, match=r"increases.jsonl, line 1: not a row; left out"):
        (there.parent / "good/increases.jsonl").write_text("1\n")
        assert len(frames.load_study("good").trials) == TRIALS


def test_a_study_that_is_damaged_while_it_is_served_is_a_page_that_says_so(there):
    with Reports(0, [load_study("s")]) as reports:
        for name in ("sweep.json", "journal.log"):
            (there / name).write_text("{")
        page = reports.page("/s.html")
    assert page is not None and b"sweep.json, line 1: no JSON" in page and b"given again, makes it anew" in page


def test_a_summary_of_the_folder_of_studies_leaves_studies_and_their_store_alone(there, capsys):
    (there.parent / ".store/ab").mkdir(parents=True)
    (there.parent / ".store/ab/abcd.json").write_text(json.dumps({"record": {"perplexity": 3.0}}))
    assert summarize.main(["sweeps"]) == 2
    assert capsys.readouterr().err.endswith("writes; python -m dashboards.pareto shows studies\n")
    (there.parent / "one.json").write_text(json.dumps({"streaming": {"perplexity": 4.0}}))
    assert summarize.main(["sweeps"]) == 0
    output = capsys.readouterr()
    assert output.err == "" and "4.0" in output.out and "3.0" not in output.out


def test_who_runs_a_study_is_told_whatever_was_in_its_lock(there):
    (there / "driver.lock").write_bytes(bytes(range(256)) * 1000)
    with study_lease(StudyFolder(there)):
        with (there / "driver.lock").open("ab") as file:
            file.write(b"\xff\x00" * 1000)
        with (
            pytest.raises(UsageError, match=r"is being run by process \d+ on .*; wait"),
            study_lease(StudyFolder(there)),
        ):
            pass


def test_losses_that_the_store_has_no_more_are_missed_by_nothing_else(tmp_path):
    store, losses = MeasurementStore(tmp_path), np.column_stack((np.arange(50.0), np.full(50, 1.0)))
    rows, said = [], []
    for trial, content in enumerate((None, b"", b"\x93NUMPY garbage", losses)):
        key: dict[str, object] = {"trial": trial}
        rows.append(Row(trial=trial, state="complete", quality_entry=entry_name(key)))
        if content is not None:
            store.put(key, Measurement({}, losses))
        if isinstance(content, bytes):
            store.losses_file(entry_name(key)).write_bytes(content)
    assert [row.trial for row in increases(rows, QualityComparison(losses, losses), store.losses)] == [3]
    assert comparable(rows, lambda row: store.losses(row["quality_entry"]), said.append) == rows[3:]
    assert len(said) == 3 and "warning: trial 1 cannot be confirmed: its losses cannot be read (" in said[1]


def test_store_entries_that_are_no_files_are_measured_again(tmp_path):
    store = MeasurementStore(tmp_path)
    for suffix in (".json", ".npy"):
        store.put({"a": 1}, Measurement({}, np.zeros((2, 2))))
        path = store.losses_file(entry_name({"a": 1})).with_suffix(suffix)
        path.unlink()
        path.mkdir()
        assert store.get({"a": 1}) is None
        if suffix == ".npy":
            path.rmdir()
    store.put({"a": 1}, Measurement({"b": 2}))
    assert store.get({"a": 1}) == Measurement({"b": 2})


def test_mlflow_is_brought_up_to_date_where_the_settings_are_lost(tmp_path, empty_mlflow, monkeypatch, capsys):
    output = write_finished(tmp_path).output
    (output / "sweep.json").unlink()
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(empty_mlflow, "mlflow.db")
    assert sync.main(["s", "--tracking-uri", "sqlite:///mlflow.db"]) == 0
    assert "the journal's copy is read" in capsys.readouterr().err
