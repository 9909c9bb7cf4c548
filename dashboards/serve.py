"""MLflow's UI, optuna-dashboard and the reports, on this machine only, until Ctrl-C: `python -m dashboards.serve`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import IO
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from streamllm.errors import UsageError
from streamllm.results.mlflow_address import (
    USUAL_ADDRESS,
    database_path,
    experiment_id,
    experiment_name,
    is_databricks,
    is_server,
    runs_page,
    store_uri,
    without_password,
)
from streamllm.results.study import VIEW, StudyResults, load_study, view_of
from streamllm.results.study_folder import StudyFolder
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.program import command, program

from . import read_only_journals
from .landing import landing
from .loading import load_all, studies_here

_HOST = "127.0.0.1"
_MLFLOW, _OPTUNA = "MLflow", "optuna-dashboard"
_PORTS = 100
"""Ports tried, from the one that is wanted."""
_START_SEC, _END_SEC = 120.0, 8.0
_LAST_LINES = 8
_ENDS_WITH_US = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Run before a command, so that the kernel ends it where we are killed and cannot."""


@dataclass(frozen=True)
class Child:
    """A server in a process group of its own, so that its workers end with it."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @property
    def address(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def last_lines(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-_LAST_LINES:])

    def answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((_HOST, self.port)) == 0


class Reports(ThreadingHTTPServer):
    """The reports of some studies, a page that leads to them and to what else is served; nothing else that lies on the
    disk."""

    daemon_threads = True

    def __init__(
        self,
        port: int,
        studies: Sequence[StudyResults],
        said: Sequence[str] = (),
        more: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """said: sentences about what is not served; more: gives the folders of studies, of which those that have begun
        since are served too."""
        self.others: dict[str, str] = {}
        """Addresses of other servers, by their names."""
        self._said = said
        self._more = more
        self._journals = [study.name for study in studies if study.files.journal.is_file()]
        """Of the studies that optuna-dashboard has, which learns of no others, in its order."""
        self._known = {study.name: (_newest(study.folder), study) for study in studies}
        self._folders = {study.folder.resolve() for study in studies}
        self._writing = threading.Lock()
        super().__init__((_HOST, port), _Handler)

    def page(self, path: str) -> bytes | None:
        """Anew where its study has gone on since; None if there is no such page."""
        if path == "/":
            with self._writing:
                self._find_more()
                return landing([self._current(name) for name in self._known], self._links, self._said).encode()
        known = self._known.get(path.removeprefix("/").removesuffix(".html")) if path.endswith(".html") else None
        if known is None:
            return None
        with self._writing:
            try:
                return self._linked(up_to_date_report(known[1].folder).read_bytes())
            except UsageError as error:  # damaged since
                return f'<!doctype html><meta charset="utf-8"><title>Damaged</title><p>{escape(str(error))}'.encode()

    def _find_more(self) -> None:
        """The studies that have begun since, first; one that cannot be read yet is looked at again, one with a name
        that another has is not."""
        for folder in self._more():
            if (path := Path(folder).resolve()) in self._folders:
                continue
            with suppress(UsageError, OSError):
                study = load_study(folder)
                self._folders.add(path)
                if study.name not in self._known:
                    self._known = {study.name: (_newest(study.folder), study), **self._known}

    def _linked(self, report: bytes) -> bytes:
        """With links to runs where MLflow is served now, in place of where it usually is."""
        usual, now = (f'"address":"{address}/'.encode() for address in (USUAL_ADDRESS, self.others.get(_MLFLOW, "")))
        return report.replace(usual, now, 1) if _MLFLOW in self.others else report

    def elsewhere(self, path: str) -> str | None:
        """The address that a path `/SERVER/STUDY` leads to; None if there is none."""
        server, _, name = path.removeprefix("/").partition("/")
        address = self.others.get(server)
        if address is None or name not in self._known:
            return None
        if server == _MLFLOW:
            return address + mlflow_view(name, address)
        return f"{address}/dashboard/studies/{self._journals.index(name)}" if name in self._journals else None

    def _current(self, name: str) -> StudyResults:
        """As its files say by now; as they said before, where they are damaged since."""
        newest, study = self._known[name]
        with suppress(UsageError, OSError):
            if (now := _newest(study.folder)) != newest:
                study = load_study(str(study.folder))
                self._known[name] = now, study
        return study

    def _links(self, study: StudyResults) -> dict[str, str]:
        """optuna-dashboard has no matrices, and nothing that has begun since."""
        servers = [name for name in self.others if name == _MLFLOW or study.name in self._journals]
        name = quote(study.name, safe="")
        return {"report": f"/{name}.html"} | {server: f"/{server}/{name}" for server in servers}


class _Handler(BaseHTTPRequestHandler):
    server: Reports

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (_HOST, "localhost"):  # a page elsewhere whose name was made to point here
            self.send_error(403)
            return
        path = unquote(urlsplit(self.path).path)
        if (address := self.server.elsewhere(path)) is not None:
            self.send_response(302)
            self.send_header("Location", address)
            self.end_headers()
            return
        page = self.server.page(path)
        if page is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        pass


def up_to_date_report(folder: Path) -> Path:
    """The study's `report.html`, written if it is older than what it is made of."""
    from .report import write_report

    path = folder / "report.html"
    if path.is_file() and path.stat().st_mtime_ns > _newest(folder):
        return path
    return write_report(load_study(str(folder)), path)


def _newest(folder: Path) -> int:
    """When one of the files that a report is made of was last written, in nanoseconds since 1970."""
    files = StudyFolder(folder)
    inputs = [files.trials, files.increases, files.confirmed, files.outcome, files.configuration]
    return max(file.stat().st_mtime_ns for file in inputs if file.is_file())


def free_port(wanted: int) -> int:
    """The first free one from `wanted` on. Raises UsageError if there is none."""
    for port in range(wanted, min(wanted + _PORTS, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just let go is free
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return port
    raise UsageError(f"port {wanted}: it and the next {_PORTS} are in use; choose another --port")


def chosen_studies(names: Sequence[str]) -> list[StudyResults]:
    """Those named, or all under `sweeps/`, the one that went on last first. Raises UsageError."""
    if not names:
        names = studies_here()
    studies = load_all(names)
    if not studies:
        raise UsageError("no study under sweeps/: name one, or run python -m orchestrator.sweep first")
    taken = [study.name for study in studies]
    if twice := {name for name in taken if taken.count(name) > 1}:
        raise UsageError(f"two studies are called {min(twice)!r}: serve one of them at a time")
    return studies


def commands(studies: Sequence[StudyResults], uri: str) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """The servers to start, as name and command without its port, and a sentence for each that is not started.

    uri: of MLflow's store."""
    start, said = [], []
    database = database_path(uri)
    if is_server(uri):
        said.append(f"MLflow            {without_password(uri)}{mlflow_view(studies[0].name, uri)} (not started here)")
    elif is_databricks(uri):
        said.append(f"MLflow            experiment {experiment_name()!r} of {uri} (not started here)")
    elif database is not None and not database.is_file():
        said.append(
            f"MLflow            not started: no {_shown(database)}; python -m orchestrator.sync STUDY makes one"
        )
    else:
        command = [sys.executable, "-P", "-m", "mlflow", "ui", "--workers", "1", "--host", _HOST]
        command += ["--uvicorn-opts", f"--app-dir {tempfile.gettempdir()}"]  # else modules are looked for here too
        start.append((_MLFLOW, [*command, "--backend-store-uri", uri]))
    journals = [str(study.files.journal) for study in studies if study.files.journal.is_file()]
    if importlib.util.find_spec("optuna_dashboard") is None:
        said.append("optuna-dashboard  not started: not installed; pip install 'streamllm-sweep[dashboard]' brings it")
    elif not journals:
        said.append("optuna-dashboard  not started: no study has a journal")
    else:
        reader = f"from {read_only_journals.__name__} import main; main(sys.argv[1:])"
        program = f"import sys; sys.path[:] = {sys.path!r}; {reader}"
        start.append((_OPTUNA, [sys.executable, "-P", "-c", program, _HOST, *journals]))
    return start, said


def launch(name: str, command: Sequence[str], port: int, logs: Path) -> Child:
    log = (logs / f"{name}.log").open("w+b")
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    before = [sys.executable, "-c", _ENDS_WITH_US] if sys.platform == "linux" else []
    process = subprocess.Popen(
        [*before, *command, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    return Child(name, port, process, log)


def end(children: Sequence[Child]) -> None:
    """All of them and their workers: asked first, killed after some seconds."""
    for child in children:
        _signal(child, signal.SIGTERM)
    deadline = time.monotonic() + _END_SEC
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(max(deadline - time.monotonic(), 0.1))
        _signal(child, signal.SIGKILL)  # a worker may outlive the process that started it
        child.process.wait()
        child.log.close()


def _signal(child: Child, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)


@contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """Set by Ctrl-C, SIGTERM and the terminal's end: nothing is interrupted between starting a child and knowing it."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mlflow_view(study: str, address: str) -> str:
    """Where MLflow shows the study: the view that the sweep keeps there. Empty if it has none."""
    view = view_of(study)
    try:
        with urlopen(_asking_for_experiment(address), timeout=10.0) as answer:
            experiment = json.load(answer)["experiment"]
            known = any(tag["key"] == f"{VIEW}{view}" for tag in experiment.get("tags", ()))
            return runs_page(experiment["experiment_id"], study) if known else ""
    except (OSError, ValueError, KeyError):
        return ""


def _asking_for_experiment(address: str) -> Request:
    """As the user that MLflow's own clients are."""
    parts = urlsplit(address)
    wanted = experiment_id()
    by = (
        f"get-by-name?experiment_name={quote(experiment_name(), safe='')}"
        if wanted is None
        else f"get?experiment_id={quote(wanted)}"
    )
    request = Request(f"{without_password(address).rstrip('/')}/api/2.0/mlflow/experiments/{by}")
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or unquote(parts.username or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or unquote(parts.password or "")
    if user:
        request.add_header("Authorization", f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    return request


def _shown(path: Path) -> str:
    return f"{path.name} here" if path.parent in (Path(), Path.cwd()) else str(path)


def watch(
    children: Sequence[Child], stop: threading.Event, views: Mapping[str, Callable[[str], str]] = MappingProxyType({})
) -> None:
    """Says when a child answers for the first time, and when one dies, until `stop`.

    views: by name of a child, what comes behind its address."""
    starting, alive = list(children), list(children)
    deadline = time.monotonic() + _START_SEC
    while not stop.wait(0.3):
        for child in list(alive):
            if child.process.poll() is not None:
                alive.remove(child)
                say(f"{child.name} ended with exit code {child.process.returncode}; its last lines:")
                say(child.last_lines())
        for child in [child for child in starting if child not in alive or child.answers()]:
            starting.remove(child)
            if child in alive:
                say(f"{child.name:17} {child.address}{views.get(child.name, lambda _: '')(child.address)}")
        if starting and time.monotonic() > deadline:
            for child in starting:
                say(f"{child.name} does not answer yet; its last lines:\n{child.last_lines()}")
            starting.clear()


def serve(
    studies: Sequence[StudyResults],
    first_port: int,
    tracking_uri: str | None = None,
    more: Callable[[], Sequence[str]] = tuple,
) -> None:
    """more: as of `Reports`."""
    start, said = commands(studies, store_uri(tracking_uri))
    children: list[Child] = []
    with tempfile.TemporaryDirectory() as logs, asked_to_end() as stop:
        port = _next_port("reports", first_port)
        reports = Reports(port, studies, said, more)
        threading.Thread(target=reports.serve_forever, name="reports", daemon=True).start()
        try:
            say(f"reports           http://{_HOST}:{port}/")
            for sentence in said:
                say(sentence)
            for name, command in start:
                port = _next_port(name, port + 1)
                children.append(launch(name, command, port, Path(logs)))
                reports.others[name] = children[-1].address
            say("Ctrl-C ends all of them")
            watch(children, stop, {_MLFLOW: partial(mlflow_view, studies[0].name)})
        finally:
            end(children)
            reports.server_close()


def _next_port(name: str, wanted: int) -> int:
    port = free_port(wanted)
    if port != wanted:
        say(f"port {wanted} is in use: {name} gets {port}")
    return port


def say(text: str) -> None:
    print(text, flush=True)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog=program("dashboards.serve"),
        description="Serve a page that leads to reports, MLflow and (read-only) optuna-dashboard, here only.",
    )
    parser.add_argument(
        "studies", metavar="STUDY", nargs="*", help="names or folders (all under sweeps/, newest first)"
    )
    parser.add_argument("--port", type=int, default=5000, metavar="N", help="the first one; others are the next (5000)")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="address of MLflow ($MLFLOW_TRACKING_URI, or its own default store)"
    )
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.port <= 65535:
        raise UsageError(f"port {arguments.port}: must be from 1 to 65535")
    more = tuple if arguments.studies else studies_here
    serve(chosen_studies(arguments.studies), arguments.port, arguments.tracking_uri, more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
