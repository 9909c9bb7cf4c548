"""The Ray cluster of a sweep, which is joined or started here: what it has, and whether it still lives."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import chdir, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from streamllm.errors import UsageError, one_line

from .messages import SweepError

_CONNECT_SEC = 4.0
_JOIN_SEC = 90.0
"""Starting Ray took 4 to 8 on two cores, at loads up to 8."""
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a client of gRPC begins with, and a frame of settings (RFC 9113, section 3.4); a server answers with its own."""
_SETTINGS = 4
"""The type of that frame, its fourth byte."""


@dataclass(frozen=True)
class Cluster:
    """Whoever joined or started it leaves it in the end."""

    was_there: bool
    """This process had joined it before: it stays."""
    _ray: Any
    _vital: Mapping[str, tuple[str, int]]
    """What this process cannot do without -> where that listens."""

    @classmethod
    def join(cls, address: str | None) -> Self:
        """Joins the cluster at that address, or at Ray's own variable for it, which `check_answers` has found to
        answer, or starts one here. Raises UsageError where it cannot be joined, SweepError where it cannot be
        started."""
        import ray

        was_there = ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS")
        if not was_there:
            _init(ray, address)
        return cls(was_there, ray, _vital(ray))

    def leave(self) -> None:
        """Ends Ray, if it was started here; otherwise this process only lets go of it."""
        if not self.was_there:
            self._ray.shutdown()

    def check(self) -> None:
        """Raises SweepError where Ray cannot go on. Ray itself, asked anything, would wait for a minute and then abort
        this process."""
        for what, (host, port) in self._vital.items():
            if _refuses(host, port):
                raise SweepError(f"Ray's {what} at {host}:{port} is no more: the same command goes on from here")

    def nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def total(self, resource: str) -> int:
        return int(sum(node.get(resource, 0) for node in self.nodes()))

    def free(self, resource: str) -> float:
        return float(self._ray.available_resources().get(resource, 0))


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Ray prints paragraphs about its workers' ends there, whatever it is told of logs. Nothing of ours goes there
    while it runs."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def resources_here(address: str | None) -> dict[str, float] | None:
    """What the one node of a cluster that is started here will have; None where one is joined: it alone knows."""
    if address or os.environ.get("RAY_ADDRESS") or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
        return None
    from torch import accelerator

    return {"CPU": usable_cores(), "GPU": accelerator.device_count()}


def usable_cores() -> int:
    """Of this process, which may be allowed fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _init(ray: Any, address: str | None) -> None:
    import torch

    from streamllm.engine.device import default_device

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # idle processes, which none of ours can be
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: beside a busy process they get a thirtieth
    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        options["num_cpus"] = usable_cores()
        if default_device().type not in ("cpu", "cuda"):  # which Ray counts only with dpctl (Intel's), or of late
            options["num_gpus"] = torch.accelerator.device_count()
    before = _handlers()
    try:
        # workers look for modules where the driver is then: not in the working directory, among other people's files
        with chdir(Path(__file__).resolve().parents[2]):
            # without an address Ray would join whatever cluster this machine has been part of last
            _in_a_thread_that_stays(lambda: ray.init(address=address or "local", **options), _JOIN_SEC)
    except Exception as error:  # Ray raises a plain one where a node does not start
        if address is None:
            raise SweepError(f"Ray cannot be started here: {one_line(error)}") from error
        asks = "RAY_AUTH_MODE" not in os.environ  # as one of `ray start` does, `ray.init` by default not
        hint = "; RAY_AUTH_MODE=token before the command, if that cluster asks for a token" if asks else ""
        raise UsageError(f"Ray: {_named(address)} cannot be used: {one_line(error)}{hint}") from error
    for number, handler in before.items():  # Ray's own for SIGTERM prints stacks
        signal.signal(number, handler)


def _handlers() -> dict[int, Any]:
    """Those of Python, which the main thread alone may set."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}


def _in_a_thread_that_stays(start: Callable[[], object], seconds: float) -> None:
    """So that this one hears signals meanwhile, and Ray does not take them; with the thread that started Ray's
    processes the kernel would end them. Raises TimeoutError after so many seconds."""
    started: Future[None] = Future()
    deadline = time.monotonic() + seconds

    def run() -> None:
        try:
            start()
            started.set_result(None)
        except BaseException as error:
            started.set_exception(error)
        threading.Event().wait()

    threading.Thread(target=run, name="ray", daemon=True).start()
    while not started.done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready within {seconds:g} s")
        time.sleep(0.05)
    started.result()


def _vital(ray: Any) -> dict[str, tuple[str, int]]:
    """The cluster's head, and this node's own raylet."""
    context = ray.get_runtime_context()
    head = _host_and_port(context.gcs_address)
    if head is None:  # through Ray's client, which has neither
        return {}
    own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return {"head": head, "raylet": (own["NodeManagerAddress"], int(own["NodeManagerPort"]))}


def check_answers(address: str) -> None:
    """Raises UsageError, within seconds, if no Ray answers there: `ray.init` would not for minutes, and take no signal
    meanwhile."""
    is_given = "RAY_AUTH_MODE" in os.environ
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or (Path.home() / ".ray/auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as of `ray start`; Ray reads this when it is imported
    if address == "local" or address.startswith("ray://"):
        return
    found = address
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address  # where Ray itself looks

        try:
            found = canonicalize_bootstrap_address(address) or ""
        except ConnectionError:
            raise UsageError(
                f"{_named(address)}: no Ray runs on this machine; start one with `ray start --head`, or leave it out: "
                f"a sweep starts its own"
            ) from None
    where = _host_and_port(found)
    if where is None:
        raise UsageError(f"{_named(address)}: must be HOST:PORT, ray://HOST:PORT or auto")
    problem = _problem_of(*where)
    if problem:
        found = f" ({found})" * (found != address)
        raise UsageError(
            f"{_named(address)}{found}: {problem}; `ray status --address HOST:PORT` tries it; leave it out to start "
            f"Ray here"
        )
    if not is_given and os.environ.get("RAY_AUTH_MODE") == "token" and _asks_for_no_token(found):
        _forget_the_token()


_ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).check_alive([], timeout=5)"


def _asks_for_no_token(address: str) -> bool:
    """Whether that head was started where there was no token yet: its calls carry none, and a driver that asks for one
    refuses them, so that its workers die at once. In a process of its own, as Ray knows one way only."""
    without = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", _ASK, address]
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, env=without, capture_output=True, timeout=_JOIN_SEC).returncode == 0
    return False


def _forget_the_token() -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    if (ray := sys.modules.get("ray._raylet")) is not None:
        ray.Config.initialize("")  # reads it again


def _problem_of(host: str, port: int) -> str:
    """Why there is no Ray; empty if there may be one."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SEC) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":
                return ""
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(9)
    except TimeoutError:
        return f"nothing answers there within {_CONNECT_SEC:g} s"
    except OSError as error:
        return f"nothing listens there ({error.strerror or error})"
    return "" if answer[3:4] == bytes([_SETTINGS]) else "what listens there is not Ray"


def _refuses(host: str, port: int) -> bool:
    """Whether nobody listens there any more; one that is slow, or cut off for a while, is not refusing."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SEC):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _host_and_port(address: str | None) -> tuple[str, int] | None:
    host, _, port = (address or "").rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() and int(port) < 65536 else None


def _named(address: str) -> str:
    """The address, and where it was given."""
    return f"RAY_ADDRESS={address}" if os.environ.get("RAY_ADDRESS") == address else f"--address {address}"
