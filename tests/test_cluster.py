"""Ray where it is not: what does not answer is named within seconds, and an end of Ray is noticed."""

import os
import socket
import threading
import time
from contextlib import contextmanager
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest

from orchestrator import command_line
from orchestrator.configuration import WorkerSettings
from orchestrator.workers import cluster as cluster_module
from orchestrator.workers.cluster import Cluster, check_answers
from orchestrator.workers.messages import SweepError
from orchestrator.workers.room import Room
from streamllm.errors import UsageError


@contextmanager
def listening():
    """A port where somebody listens and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def serving_pages():
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def deserted():
    with listening() as address:
        pass
    yield address


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster_module, "_CONNECT_SEC", 0.5)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))


@pytest.mark.parametrize("named", ["--address", "RAY_ADDRESS"])
@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (deserted, "nothing listens there"),
        (listening, "nothing answers there within 0.5 s"),
        (serving_pages, "what listens there is not Ray"),
    ],
)
def test_an_address_without_ray(place, problem, named, monkeypatch):
    with place() as address:
        if named == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", address)
        started = time.monotonic()
        with pytest.raises(UsageError) as raised:
            check_answers(address)
    said = str(raised.value)
    assert said.startswith(f"{named}{' ' if named == '--address' else '='}{address}: {problem}"), said
    assert "\n" not in said and time.monotonic() - started < 10


@pytest.mark.parametrize("address", ["here", "host:", ":6379", "host:port", "host:99999"])
def test_what_is_no_address(address):
    with pytest.raises(UsageError, match=r"must be HOST:PORT, ray://HOST:PORT or auto"):
        check_answers(address)


def test_auto_without_ray(monkeypatch):
    def none(address):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", none)
    with pytest.raises(UsageError, match=r"--address auto: no Ray runs on this machine; start one"):
        check_answers("auto")
    with deserted() as address:  # of a cluster that was there last
        monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda _: address)
        with pytest.raises(UsageError, match=rf"--address auto \({address}\): nothing listens there"):
            check_answers("auto")


def test_the_real_one_is_told_from_others(cluster):
    assert cluster_module._problem_of(*cluster_module._host_and_port(cluster.address)) == ""


def test_the_end_of_ray_is_noticed():
    with listening() as address:
        place = cluster_module._host_and_port(address)
        joined = Cluster(False, None, {"head": place})
        joined.check()
    with pytest.raises(SweepError, match=f"Ray's head at {address} is no more"):
        joined.check()


@pytest.mark.parametrize(
    ("nodes", "count", "cpus", "cores", "workers"),
    [
        ([{"CPU": 8}], 0, 0, 1, 8),
        ([{"CPU": 8}], 2, 0, 4, 2),
        ([{"CPU": 8}, {"CPU": 3}], 3, 0, 3, 3),
        ([{"CPU": 8}], 0, 3, 3, 2),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 4, "GPU": 2}], 0, 0, 2, 6),
    ],
)
def test_room(nodes, count, cpus, cores, workers):
    room = Room.of(nodes, WorkerSettings(count=count, cpus=cpus))
    assert room.cores == cores and room.workers(nodes) >= workers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "999"], r"workers 999: there is room for \d+, each with its own core; give --workers \d+"),
        (["--cpus-per-worker", "999"], r"cpus per worker 999: no node has more than \d+; give \d+ or fewer"),
    ],
)
def test_what_there_is_no_room_for_is_found_before_ray_starts(options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        command_line.resolve(command_line.parser().parse_args(options))


@pytest.mark.parametrize("space", ["default", "comprehensive"])
def test_a_cluster_is_probed_once_before_it_is_joined(space, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("words and words " * 100)
    probed, joined = [], []
    monkeypatch.setattr(cluster_module, "check_answers", probed.append)
    monkeypatch.setattr(cluster_module, "_vital", lambda ray: {})
    monkeypatch.setattr("ray.init", lambda **options: joined.append(options["address"]))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.nodes", list)
    arguments = command_line.parser().parse_args(["--address", "a:1", "--space", space, "--text", "t.txt"])
    request = command_line.matrix_request if space == "comprehensive" else command_line.resolve
    assert request(arguments).workers.address == "a:1"
    Cluster.join("a:1")
    assert probed == ["a:1"] and set(joined) == {"a:1"}


@pytest.mark.parametrize("has_token", [True, False])
def test_a_token_is_shown_where_there_is_one(has_token, monkeypatch, tmp_path):
    """A cluster of `ray start` asks for it, and `ray.init` does not show it by itself."""
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    if has_token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("x")
    check_answers("local")
    assert os.environ.get("RAY_AUTH_MODE") == ("token" if has_token else None)


def test_one_that_never_lets_this_process_join(monkeypatch):
    monkeypatch.setattr(cluster_module, "_JOIN_SEC", 0.3)
    monkeypatch.setattr("ray.init", lambda **_: time.sleep(2))
    with pytest.raises(UsageError, match=r"--address a:1 cannot be used: TimeoutError: not ready within 0\.3 s"):
        Cluster.join("a:1")


def test_one_that_cannot_be_started_here_is_nobody_elses_mistake(monkeypatch):
    def fail(**_):
        raise RuntimeError("the raylet died")

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(SweepError, match="Ray cannot be started here: RuntimeError: the raylet died"):
        Cluster.join(None)
