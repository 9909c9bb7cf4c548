"""One command for all UIs: real processes, real ports."""

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

import pytest

from dashboards import serve
from streamllm.results.mlflow_address import store_uri
from tests.test_report import ROWS, row, study
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
    assert '<a href="/s.html">s</a>' in get(f"{address}/")
    assert "<title>s</title>" in get(f"{address}/s.html")
    for path in ("/secret.txt", "/s/trials.jsonl", "/../secret.txt", "/%2e%2e/secret.txt", "/s/", "/t.html"):
        assert status(f"{address}{path}") == 404
    assert status(f"{address}/", host="evil.example:5000") == 403
    assert status(f"{address}/", host="localhost:5000") == 200
    assert socket.gethostbyname("localhost") and not (folder.parent / "s.html").exists()


def test_a_report_follows_its_study(reports):
    address, folder = reports
    assert "trial 7" not in get(f"{address}/s.html")
    before = (folder / "report.html").stat().st_mtime_ns
    get(f"{address}/s.html")
    assert (folder / "report.html").stat().st_mtime_ns == before, "written once as long as nothing changes"
    study(folder, [*ROWS, row(7, 1.0, -2.0)])
    assert "trial 7" in get(f"{address}/s.html")


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
