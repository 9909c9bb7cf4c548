"""A copy of a study at a URL is complete, harmless and enough to go on from."""

import json
import os
import shutil
import signal
import threading
from functools import partialmethod
from pathlib import Path

import fsspec
import numpy as np
import pytest

from orchestrator.command_line import parser, resolve
from orchestrator.copies import Copy, _Following, bring_back, kept
from orchestrator.output import Output
from orchestrator.place import Place, without_secrets
from orchestrator.sweep import main
from streamllm.errors import UsageError
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name
from streamllm.results.study_folder import StudyFolder

from . import made_studies
from .conftest import GOLDEN
from .mortal_sweep import run
from .preloaded import context, ended
from .waiting import wait_until

URL = "memory://somewhere/sweeps/s"
DIGEST, OTHER = "d" * 64, "e" * 64
LOSSES = np.column_stack((np.arange(50.0), np.full(50, 1.0)))


@pytest.fixture(autouse=True)
def empty_memory():
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def folder(tmp_path):
    """A study of two trials, each with a measurement, beside a measurement of its model and one of another."""
    store = MeasurementStore(tmp_path / "sweeps/.store")
    keys = [{"trial": 0}, {"trial": 1}, {"model_digest": DIGEST}, {"model_digest": OTHER}]
    for key in keys:
        store.put(key, Measurement({"x": 1}, LOSSES if "trial" in key else None))
    rows = [made_studies.row(n, 5.0 + n, 1.0, quality_entry=entry_name({"trial": n})) for n in range(2)]
    path = made_studies.write_study(tmp_path, rows, study_id="1", model_digest=DIGEST)
    (path / "journal.log").write_text('{"op_code": 0}\n')
    (path / "driver.lock").write_text("mine")
    (path / ".sweep.json.123.new").write_text("a part")
    return StudyFolder(path)


def files(folder, hidden=False):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and (hidden or not path.name.startswith("."))
    }


def there(url=URL):
    place = Place.at(url)
    names = sorted(place.names())
    return place.read(names) if names else {}


def lose(folder):
    shutil.rmtree(folder.path.parent)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_what_is_lost_is_brought_back(folder, tmp_path, scheme, capsys):
    url = URL if scheme == "memory" else f"file://{tmp_path}/elsewhere/s"
    before = files(folder.path.parent)
    Copy(Place.at(url), folder).update()
    lose(folder)
    bring_back(url, folder, "s")
    after = files(folder.path.parent)
    other = entry_name({"model_digest": OTHER})
    assert before.keys() - after.keys() == {"s/driver.lock", f".store/{other[:2]}/{other}.json"}
    assert after.items() <= before.items()
    assert MeasurementStore(folder.store).get({"trial": 1}) is not None
    assert "2 trials, 3 measurements" in capsys.readouterr().err


def test_only_what_is_new_is_sent(folder, monkeypatch):
    copy, sent = Copy(Place.at(URL), folder), []
    copy.update()
    monkeypatch.setattr(Place, "write", lambda self, contents: sent.extend(contents))
    copy.update()
    assert sent == []
    with folder.trials.open("a") as file:
        file.write('{"trial": 2}\n')
    copy.update()
    assert sent == ["trials.jsonl"]
    again = Copy(Place.at(URL), folder)  # of the next process, which does not know what is the same
    sent.clear()
    again.update()
    assert not [name for name in sent if name.startswith(".store")]


def test_a_line_that_is_being_written_waits(folder):
    whole = folder.trials.read_bytes()
    folder.trials.write_bytes(whole + b'{"trial": 2, "sta')
    Copy(Place.at(URL), folder).update()
    assert there()["trials.jsonl"] == whole


def test_how_it_ended_is_forgotten_there_too(folder):
    copy = Copy(Place.at(URL), folder)
    folder.write_outcome("FINISHED")
    copy.update()
    assert "outcome.json" in there()
    folder.outcome.unlink()
    copy.update()
    assert "outcome.json" not in there()


@pytest.mark.parametrize("until", range(1, 7))
def test_a_place_that_fails_at_any_moment_gets_everything_in_the_end(folder, monkeypatch, until):
    calls, write = [], Place.write

    def fail(self, contents):
        if contents:
            calls.append(contents)
        if len(calls) == until:
            raise ConnectionError("away")
        write(self, contents)

    monkeypatch.setattr(Place, "write", fail)
    copy = Copy(Place.at(URL), folder)
    with pytest.raises(ConnectionError):
        copy.update()
    copy.update()
    expected = {name for name in files(folder.path) if not name.endswith(".lock")}
    assert {name for name in there() if not name.startswith(".store")} == expected
    assert sum(name.endswith(".json") for name in there() if name.startswith(".store")) == 3


def test_a_measurement_is_there_before_what_names_it(folder, monkeypatch):
    order, write = [], Place.write
    monkeypatch.setattr(Place, "write", lambda self, contents: (order.extend(contents), write(self, contents)))
    Copy(Place.at(URL), folder).update()
    name = entry_name({"trial": 0})
    array, entry = (order.index(f".store/{name[:2]}/{name}{suffix}") for suffix in (".npy", ".json"))
    assert array < entry < order.index("sweep.json") < order.index("journal.log") < order.index("trials.jsonl")


def test_it_follows_and_is_complete_in_the_end(folder):
    notes = []
    with kept(URL, folder, notes.append):
        wait_until(lambda: "journal.log" in there(), 30)
        (folder.path / "report.html").write_text("the end")
    assert there()["report.html"] == b"the end"
    assert notes == ["the copy at memory://somewhere/sweeps/s is complete"]


def test_what_goes_wrong_is_said_and_hurts_nobody(folder, monkeypatch):
    notes, failed = [], threading.Event()

    def fail(self, contents):
        failed.set()
        raise PermissionError("no, s3cret may not")

    monkeypatch.setattr(Place, "write", fail)
    monkeypatch.setattr(_Following, "finish", partialmethod(_Following.finish, patience_sec=0.0))
    with kept("memory://me:s3cret@somewhere/s", folder, notes.append):
        assert failed.wait(30)
    assert [note.partition(" (")[0] for note in notes] == [
        "warning: the copy at memory://somewhere/s is behind",
        "warning: the copy at memory://somewhere/s is not complete",
    ]
    assert "s3cret" not in str(notes) and "no, *** may not" in notes[0]


def test_it_is_tried_again_and_that_is_said(folder, monkeypatch):
    notes, write, failures = [], Place.write, iter([True])

    def fail_once(self, contents):
        if next(failures, False):
            raise TimeoutError("slow")
        write(self, contents)

    monkeypatch.setattr(Place, "write", fail_once)
    monkeypatch.setattr("orchestrator.copies._PAUSE_SEC", 0.01)
    with kept(URL, folder, notes.append):
        wait_until(lambda: len(notes) > 1, 30)
    name = "memory://somewhere/sweeps/s"
    assert notes == [
        f"warning: the copy at {name} is behind (TimeoutError: slow); it is tried again",
        f"the copy at {name} is up to date again",
        f"the copy at {name} is complete",
    ]


def test_another_study_is_left_alone(folder):
    Copy(Place.at(URL), folder).update()
    settings = folder.read_configuration()
    folder.write_configuration(settings | {"study_id": "2"})
    with pytest.raises(UsageError, match=r"has another study, not the one in .*/s; give another URL"):
        bring_back(URL, folder, "s")
    lose(folder)
    with pytest.raises(UsageError, match="has the study 's'; give another URL"):
        bring_back(URL, folder, "t")
    assert not folder.path.exists()


def test_a_copy_that_is_ahead_is_not_written_over(folder):
    behind = folder.trials.read_text()
    with folder.trials.open("a") as file:
        file.write(json.dumps(made_studies.row(2, 5.0, 1.0)) + "\n")
    Copy(Place.at(URL), folder).update()
    folder.trials.write_text(behind)
    with pytest.raises(UsageError, match=r"the copy has 1 more finished trials than .*/s; move that folder away"):
        bring_back(URL, folder, "s")


def test_a_study_that_is_here_is_left_as_it_is(folder):
    Copy(Place.at(URL), folder).update()
    before = files(folder.path, hidden=True)
    bring_back(URL, folder, "s")
    assert files(folder.path, hidden=True) == before


@pytest.mark.parametrize("last", ["journal.log", "sweep.json"])
def test_a_kill_while_it_is_brought_back_leaves_no_half_study(folder, monkeypatch, last):
    Copy(Place.at(URL), folder).update()
    lose(folder)
    whole = there()
    write = "orchestrator.copies.write_atomically"

    def die(path, content):
        if path.name == last:
            raise KeyboardInterrupt
        path.write_bytes(content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(write, die)
        bring_back(URL, folder, "s")
    if last == "journal.log":
        assert folder.known_configuration()[0] is None
    bring_back(URL, folder, "s")
    assert set(files(folder.path)) == {name for name in whole if not name.startswith(".store")}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("abfs://container/s", "needs adlfs; pip install adlfs"),
        ("nosuch://x/s", "Protocol not known: nosuch"),
        ("https://host/s", "cannot be written to"),
        ("simplecache::memory://x/s", "cannot be written to"),
        ("memory://", "names no folder"),
        ("https://me:s3cret@host/s?sig=s3cret#s3cret", "'https://host/s'"),
    ],
)
def test_urls_that_cannot_be_used(url, words):
    with pytest.raises(UsageError) as raised:
        Place.at(url)
    assert words in str(raised.value) and "s3cret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_place_that_is_not_to_be_written_to_is_refused_before_anything_starts(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output 'file://.*/file/s': cannot be used \(.*\); the credentials"):
        bring_back(f"file://{tmp_path}/file/s", folder, "s")


def test_secrets_are_not_shown():
    assert without_secrets("sftp://me:pass@host:22/a/b?key=1#x") == "sftp://host:22/a/b"
    assert without_secrets("s3://KEY:SECRET@bucket/a@b") == "s3://bucket/a@b"
    assert without_secrets("s3://bucket/a") == "s3://bucket/a"


@pytest.fixture
def job_folder(tmp_path, monkeypatch):
    """As Ray 2.60 unpacks `ray job submit --working-dir`, where the job is run."""
    folder = tmp_path / "session_2026-11-27_07-47-39_868584_5035/runtime_resources/working_dir_files/_ray_pkg_1e67aab2"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("space", ["default", "comprehensive"])
@pytest.mark.parametrize("output", [[], ["--output", "mine"], ["--output", "{here}/mine"]])
def test_a_job_whose_results_would_be_discarded_is_refused(job_folder, capsys, space, output):
    given = [word.format(here=job_folder) for word in output]
    assert main(["--space", space, *given]) == 2
    said = capsys.readouterr().err
    assert "lies in the working directory of a Ray job, which Ray discards; give an absolute --output" in said
    assert said.count("\n") == 1 and list(job_folder.iterdir()) == []


@pytest.mark.parametrize("output", ["{tmp}/kept", "memory://somewhere/s"])
def test_a_job_whose_results_are_kept_is_not(job_folder, tmp_path, output):
    given = output.format(tmp=tmp_path)
    found = resolve(parser().parse_args(["--output", given, "--study", "s", "--workers", "1"]))
    assert found.output == (tmp_path / "kept" if "tmp" in output else Path("sweeps/s"))


def test_a_dry_run_leaves_the_place_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolve(parser().parse_args(["--output", URL, "--study", "s", "--dry-run"]))
    assert there() == {}


def test_a_folder_is_no_url():
    assert Output.of("a/b") == Output(Path("a/b")) and Output.of(None) == Output(None)
    assert Output.of("s3://a/b") == Output(None, "s3://a/b")


SPACE = "cap: 48\nparameters: {method: [ours, mit], n_sink: [0, 2, 4, 8], compress_every: [1, 2, 4, 8, 16]}\n"
TRIALS = 30


def test_a_driver_whose_machine_is_lost_loses_nothing(tmp_path, cluster, empty_mlflow):
    """Killed outright, and its disk gone with it: the same command elsewhere goes on from the copy."""
    here, elsewhere, url = tmp_path / "here", tmp_path / "elsewhere", f"file://{tmp_path}/copies/s"
    command = ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), "--confirm", "0"]
    command += ["--space", "space.yaml", "--study", "s", "--trials", str(TRIALS), "--workers", "2"]
    command += ["--address", cluster.address, "--output", url]

    def start(folder):
        folder.mkdir()
        (folder / "space.yaml").write_text(SPACE)
        shutil.copyfile(empty_mlflow, folder / "mlflow.db")
        process = context().Process(target=run, args=("never", folder, command))
        process.start()
        return process

    def rows(folder):
        path = folder / "trials.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return {row["trial"]: row for row in found if row["trial"] not in ("strict", "baseline")}

    process, copied = start(here), tmp_path / "copies/s"
    wait_until(lambda: len(rows(copied)) >= 2 or not process.is_alive(), 120)
    os.killpg(process.pid, signal.SIGKILL)
    ended(process)
    shutil.rmtree(here)
    before, entries = rows(copied), files(copied / ".store")
    assert 2 <= len(before) < TRIALS

    process = start(elsewhere)
    ended(process)
    said = (elsewhere / "stderr").read_text()
    assert process.exitcode == 0, said
    assert f"brought back from {url}: {len(before)} trials" in said and f"the copy at {url} is complete" in said
    after = rows(elsewhere / "sweeps/s")
    assert sorted(after) == list(range(TRIALS))
    assert {trial: after[trial]["finished_at"] for trial in before} == {
        trial: row["finished_at"] for trial, row in before.items()
    }
    assert entries.items() <= files(elsewhere / "sweeps/.store").items()
    assert {name for name in files(elsewhere / "sweeps/s") if not name.endswith(".lock")} == {
        name for name in files(copied) if not name.startswith(".store")
    }
