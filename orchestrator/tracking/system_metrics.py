"""What the driver's machine does while a sweep runs, by MLflow's own monitor: processor, memory and, where nvidia-ml-py
is there too, power, memory and use of each GPU. MLflow shows it on the tab "System metrics" of the study's run."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY_SEC = 10.0
"""As MLflow has it; $MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL has another."""


@contextmanager
def system_metrics(run: str, uri: str) -> Iterator[None]:
    """Logs them to that run of the store at `uri`, after those that it has; nothing where psutil is not installed, or
    with an MLflow whose monitor knows no other store than the usual one (3.5)."""
    if importlib.util.find_spec("psutil") is None:  # without which the monitor cannot even be imported
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    if "tracking_uri" not in inspect.signature(SystemMetricsMonitor).parameters:
        yield
        return
    monitor = SystemMetricsMonitor(run, _EVERY_SEC, resume_logging=True, tracking_uri=uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
