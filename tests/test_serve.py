"""One command for all UIs: real processes, real ports."""

import html
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dashboards import serve
from dashboards.landing import landing
from dashboards.read_only_journals import ReadOnlyJournals
from dashboards.study_state import state
from orchestrator.workers.lease import study_lease
from streamllm.results.mlflow_address import store_uri
from streamllm.results.study import load_study
from tests.browser import browser, needs_browser
from tests.test_report import BASELINE, EVIL, ROWS, Page, failed, row, study
from tests.waiting import wait_until

CHILD = """
import http.server, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("worker", worker.pid, flush=True)
http.server.test(HandlerClass=http.server.SimpleHTTPRequestHandler, port=int(sys.argv[2]), bind="127.0.0.1")
"""


def get(address, host=None):
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def status(address, host=None):
    try:
        get(address, host)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


@contextmanager
def occupied():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture
def reports(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    server = serve.Reports(0, [study(tmp_path / "s")])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "s"
    server.shutdown()
    server.server_close()


def test_reports_and_nothing_else_are_served(reports):
    address, folder = reports
    assert '<a href="/s.html">report</a>' in get(f"{address}/")
    assert "<title>s</title>" in get(f"{address}/s.html")
    for path in ("/secret.txt", "/s/trials.jsonl", "/../secret.txt", "/%2e%2e/secret.txt", "/s/", "/t.html"):
        assert status(f"{address}{path}") == 404
    assert status(f"{address}/", host="evil.example:5000") == 403
    assert status(f"{address}/", host="localhost:5000") == 200
    assert socket.gethostbyname("localhost") and not (folder.parent / "s.html").exists()


def test_a_study_that_begins_later_is_served_too(tmp_path):
    """First, with its report; not where its name is taken; optuna-dashboard does not know it."""
    folders = [study(tmp_path / "s", study="s").folder]
    server = serve.Reports(0, [load_study(str(folders[0]))], more=lambda: [str(folder) for folder in folders])
    server.others = {"MLflow": "http://m", "optuna-dashboard": "http://o"}
    server._journals = ["s"]
    try:
        assert server.page("/t.html") is None and "1 study" in server.page("/").decode()
        torn = tmp_path / "t"
        torn.mkdir()
        (torn / "trials.jsonl").write_text("{")
        folders += [torn, study(tmp_path / "u", study="s").folder]
        assert "1 study" in server.page("/").decode(), "one cannot be read yet, one has a name that is taken"
        study(torn, study="t")
        page = server.page("/").decode()
        assert "2 studies" in page and page.index("/t.html") < page.index("/s.html")
        assert "<title>t</title>" in server.page("/t.html").decode()
        assert "/optuna-dashboard/s" in page and "/optuna-dashboard/t" not in page and "/MLflow/t" in page
        assert server.elsewhere("/optuna-dashboard/t") is None
        assert server.elsewhere("/optuna-dashboard/s") == "http://o/dashboard/studies/0"
    finally:
        server.server_close()


def test_a_report_follows_its_study(reports):
    address, folder = reports
    assert "trial 7" not in get(f"{address}/s.html")
    before = (folder / "report.html").stat().st_mtime_ns
    get(f"{address}/s.html")
    assert (folder / "report.html").stat().st_mtime_ns == before, "written once as long as nothing changes"
    study(folder, [*ROWS, row(7, 1.0, -2.0)])
    assert "trial 7" in get(f"{address}/s.html")


def test_the_first_page_says_of_each_study_what_it_has_come_to_and_where_to_look(tmp_path):
    studies = [
        study(tmp_path / "a", study="a"),
        study(tmp_path / "b", [*ROWS, row(7, 4.0, -2.0)], study="b", status="KILLED"),
        study(tmp_path / "c", [BASELINE, failed(0, "no")], study="c", status="FAILED"),
        study(tmp_path / "m", study="m", space={"name": "x", "columns": {"fast": ["tpot_ms"]}, "description": EVIL}),
    ]
    text = landing(studies, lambda one: {"report": f"/{one.name}.html"}, ["MLflow is not here"])
    page = Page(text)
    words = " ".join(re.sub("<[^>]+>", " ", text.partition("<main>")[2]).split())
    assert re.findall(r"(finished|interrupted|failed) *</span>", text) == [
        "finished",
        "interrupted",
        "failed",
        "finished",
    ]
    assert "10.0× as fast as re-computing with 2.0% less perplexity" in words
    assert "Recommended: trial 7: ours, math attention" in words and "nothing is recommended yet" in words
    assert "4 of 4 cells measured. </script>" in html.unescape(words) and "<script" not in text
    assert text.count('class="thumb"') == 3 and "no front yet" in text and "MLflow is not here" in words
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["/a.html", "/b.html", "/c.html", "/m.html"]
    together = text.partition('id="together"')[2]
    assert together.count("<title>") == len(studies[0].front) + len(studies[1].front) == 4
    assert "b, trial 7: ms/token 4.00 [3.90, 4.10], PPL increase % -2.0 [-3.0, -1.0]" in together
    assert "pareto a b --joint" in together
    assert "together" not in landing(studies[:1], lambda _: {})


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_first_page_fits_any_width(tmp_path, theme):
    studies = [study(tmp_path / name, study=name + "_long" * 12) for name in "abc"]
    (tmp_path / "page.html").write_text(landing(studies, lambda one: {"report": f"/{one.name}.html"}))
    with browser() as chromium:
        chromium.theme(theme)
        chromium.open((tmp_path / "page.html").as_uri())
        chromium.until("document.querySelectorAll('article').length == 3")
        for width in (400, 800, 1280):
            chromium.width(width)
            assert chromium.run("return document.documentElement.scrollWidth") <= width
            smallest = chromium.run(_SMALLEST_TEXT)
            assert smallest >= 10, f"pixels of the chart's letters at a width of {width}"
        assert chromium.messages() == []


_SMALLEST_TEXT = """
return Math.min(...[...document.querySelectorAll('.overlay text')].map(text => {
  const svg = text.ownerSVGElement;
  return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
}))
"""


def test_a_study_runs_while_its_sweep_has_it_locked(tmp_path, monkeypatch):
    files = study(tmp_path / "s", status=None).files
    assert state(files) == "interrupted", "no sweep has begun it here"
    with study_lease(files):
        assert state(files) == "running"
    assert state(files) == "interrupted"
    files.lock.write_text("process 7 on another-machine")
    assert state(files) == "running", "there, as far as anybody knows: it has just gone on"
    trials = files.trials.read_bytes()
    files.trials.unlink()
    assert state(files) == "running", "it has just begun"
    files.trials.write_bytes(trials)
    for file in (files.trials, files.configuration):
        os.utime(file, (1, 1))
    assert state(files) == "interrupted"
    for status, expected in (("FINISHED", "finished"), ("FAILED", "failed"), ("KILLED", "interrupted")):
        files.write_outcome(status)
        assert state(files) == expected
    files.outcome.write_text("{")
    assert state(files) == "end unknown"


def test_other_servers_pages_of_a_study_are_led_to(tmp_path):
    studies = [study(tmp_path / name, study=name) for name in ("a b", "c")]
    studies[1].files.journal.touch()
    server = serve.Reports(0, studies)
    with server:
        assert server.elsewhere("/MLflow/c") is None, "it is not served"
        server.others |= {"MLflow": "http://127.0.0.1:9", "optuna-dashboard": "http://127.0.0.1:8"}
        assert server.elsewhere("/MLflow/c") == "http://127.0.0.1:9", "which does not answer yet"
        assert server.elsewhere("/optuna-dashboard/c") == "http://127.0.0.1:8/dashboard/studies/0"
        assert server.elsewhere("/optuna-dashboard/a b") is None, "without a journal"
        assert server.elsewhere("/MLflow/d") is server.elsewhere("/x/c") is None
        page = server.page("/").decode()
        assert [*re.findall('href="(/[^"]+)"', page)] == [
            "/a%20b.html", "/MLflow/a%20b", "/c.html", "/MLflow/c", "/optuna-dashboard/c"
        ]  # fmt: skip


def test_a_reports_links_to_runs_lead_to_the_mlflow_that_is_served(tmp_path):
    one = study(tmp_path / "c", study="c")
    one.files.write_configuration(one.files.read_configuration() | {"study_id": "7"})
    one.files.write_tracking("sqlite:///runs.db", "1")
    with serve.Reports(0, [one]) as server:
        assert b'"address":"http://127.0.0.1:5000/#/experiments/1/runs?' in server.page("/c.html")
        server.others["MLflow"] = "http://127.0.0.1:5001"
        page = server.page("/c.html")
        assert b'"address":"http://127.0.0.1:5001/#/experiments/1/runs?' in page and b":5000" not in page


def test_journals_are_read_as_they_grow_and_nobody_can_write_to_them(tmp_path):
    paths = [tmp_path / "one.log", tmp_path / "other.log"]
    written = [optuna.create_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(p)))) for p in paths]
    for one, values in zip(written, ([1.0, 2.0], [3.0]), strict=True):
        for value in values:
            one.tell(one.ask(), value)
    storage = JournalStorage(ReadOnlyJournals(paths))

    def known():
        return {
            one.study_name: [trial.value for trial in storage.get_all_trials(one._study_id)]
            for one in storage.get_all_studies()
        }

    assert known() == {"s": [1.0, 2.0], "s (2)": [3.0]}
    trial = written[0].ask()
    with paths[1].open("a") as file:
        file.write('{"op_code":')  # being written
    written[0].tell(trial, 4.0)
    assert known() == {"s": [1.0, 2.0, 4.0], "s (2)": [3.0]}
    before = [path.read_bytes() for path in paths]
    for write in (
        lambda: storage.delete_study(0),
        lambda: storage.set_study_user_attr(0, "note", "x"),
        lambda: storage.create_new_trial(0),
        lambda: optuna.create_study(storage=storage),
    ):
        with pytest.raises(PermissionError, match="read-only"):
            write()
    assert [path.read_bytes() for path in paths] == before and list(known()) == ["s", "s (2)"]


def test_a_port_in_use_is_passed_over():
    """The command says so: see what one command serves, below."""
    with occupied() as port:
        assert serve.free_port(port) > port


def test_a_child_ends_with_its_workers(tmp_path):
    port = serve.free_port(20000)
    child = serve.launch("child", [sys.executable, "-c", CHILD], port, tmp_path)
    wait_until(child.answers)
    worker = int((tmp_path / "child.log").read_text().split()[1])
    assert not gone(child.process.pid) and not gone(worker)
    serve.end([child])
    wait_until(lambda: gone(worker))
    assert child.process.returncode is not None


def test_a_child_that_dies_is_reported_with_its_last_lines(tmp_path, capsys):
    program = "import sys; print('\\n'.join(f'line {n}' for n in range(30))); sys.exit('no such store')"
    child = serve.launch("MLflow", [sys.executable, "-c", program], 20001, tmp_path)
    child.process.wait(60)
    stop = threading.Event()
    threading.Timer(0.8, stop.set).start()
    serve.watch([child], stop)
    said = capsys.readouterr().out
    assert "MLflow ended with exit code 1" in said and "no such store" in said
    assert "line 29" in said and "line 3\n" not in said and said.count("ended") == 1
    serve.end([child])


def test_which_studies_and_stores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert serve.main([]) == 2
    assert "no study under sweeps/" in capsys.readouterr().err
    Path("sweeps").mkdir()
    for name in ("a", "b"):
        study(Path("sweeps") / name, study=name)
    os.utime("sweeps/a/trials.jsonl", (1, 1))
    assert [one.name for one in serve.chosen_studies([])] == ["b", "a"]
    assert [one.name for one in serve.chosen_studies(["a"])] == ["a"]
    study(Path("sweeps/c"), study="a")
    with pytest.raises(serve.UsageError, match="two studies are called 'a'"):
        serve.chosen_studies(["a", "sweeps/c"])
    assert serve.main(["--port", "0", "a"]) == 2

    studies = serve.chosen_studies(["a"])
    start, said = serve.commands(studies, store_uri())
    assert start == [] and "no mlflow.db here" in said[0] and "optuna-dashboard" in said[1]
    Path("mlflow.db").touch()
    Path("sweeps/a/journal.log").touch()
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: object())
    start, said = serve.commands(studies, store_uri())
    assert [name for name, _ in start] == ["MLflow", "optuna-dashboard"] and said == []
    assert start[0][1][-2:] == ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert start[1][1][-1] == "sweeps/a/journal.log"
    assert all("127.0.0.1" in command for _, command in start)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    start, said = serve.commands(studies, store_uri())
    assert start == [] and "http://127.0.0.1:9 (not started here)" in said[0] and "not installed" in said[1]
    start, said = serve.commands(studies, store_uri("databricks"))
    assert start == [] and "experiment 'streamllm-sweep' of databricks" in said[0]
    Path("mlruns/0").mkdir(parents=True)
    Path("mlruns/0/meta.yaml").touch()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    start, said = serve.commands(studies, store_uri())
    assert start[0][1][-1] == f"file://{tmp_path}/mlruns", "the store that a sweep would take"


def test_the_studys_view_on_a_server_that_runs_already(tmp_path, monkeypatch):
    """Which wants to know who asks."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            tags = [{"key": "mlflow.sharedViewState.s", "value": "{}"}]
            self.send_response(200 if asked[-1][1] else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"experiment": {"experiment_id": "7", "tags": tags}}).encode())

        def log_message(self, *_):
            pass

    studies = [study(tmp_path / "s")]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert serve.commands(studies, address)[1][0] == f"MLflow            {address} (not started here)"
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
        page = "/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=s"
        assert f" {address}{page} (not" in serve.commands(studies, address)[1][0]
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "/Users/me/x")
        assert page in serve.commands(studies, address)[1][0]
        monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
        assert serve.mlflow_view("other", address) == "", "of a study that it does not have"
        server.shutdown()
    by_name = "/api/2.0/mlflow/experiments/get-by-name?experiment_name="
    assert asked == [
        (f"{by_name}streamllm-sweep", None),
        (f"{by_name}streamllm-sweep", "Bearer t0ken"),
        (f"{by_name}%2FUsers%2Fme%2Fx", "Basic bWU6c2VjcmV0"),
        ("/api/2.0/mlflow/experiments/get?experiment_id=7", "Basic bWU6c2VjcmV0"),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_one_command_serves_and_whatever_ends_it_ends_all(tmp_path, number):
    (tmp_path / "sweeps").mkdir()
    study(tmp_path / "sweeps/s")
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    (tmp_path / "mlflow.db").touch()
    with occupied() as wanted, (tmp_path / "out").open("w+") as out:
        command = [sys.executable, "-m", "dashboards.serve", "--port", str(wanted)]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            wait_until(lambda: "Ctrl-C ends" in Path(out.name).read_text())
            said = Path(out.name).read_text()
            instead = re.search(rf"port {wanted} is in use: reports gets (\d+)\n", said)
            assert instead is not None, said  # others on this machine may have taken the next one
            assert "<title>s</title>" in get(f"http://127.0.0.1:{instead[1]}/s.html")
            children = [
                int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ]
            assert len(children) >= 1, "MLflow's"
            process.send_signal(number)
            assert process.wait(30) == (-number if number == signal.SIGKILL else 0)
            wait_until(lambda: not groups(children))
        finally:
            process.kill()
            process.wait(30)


def groups(leaders):
    """Processes whose group is one of these."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) in leaders and state != "Z":
            found.append(path.parent.name)
    return found
