"""MLflow's client as we use it: where our runs are, and what it means when it raises."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING

from streamllm.results.mlflow_address import experiment_id, experiment_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment


def find_experiment(client: MlflowClient) -> Experiment:
    """The one of all our runs, which may be a deleted one; created if there is none."""
    from mlflow.exceptions import MlflowException

    name = experiment_name()
    if (wanted := experiment_id()) is not None:
        return client.get_experiment(wanted)
    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            experiment = client.get_experiment(client.create_experiment(name))
        except MlflowException:  # another process may have been faster
            if (experiment := client.get_experiment_by_name(name)) is None:
                raise
    return experiment


class WriterError(Exception):
    """What another process that writes to MLflow could not do; the message is a line for the user."""

    def __init__(self, message: str, is_refusal: bool) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


def mlflow_client(tracking_uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the result's
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # asking again is ours: only then is nothing repeated
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri)


def is_refusal(error: Exception) -> bool:
    """An answer that will be the same next time: not of a server that is away, or where runs or all of the experiment
    were deleted."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, WriterError):
        return error.is_refusal
    if not isinstance(error, MlflowException) or error.get_http_status_code() != 400:
        return False
    return "must be in the 'active' state" not in str(error)


def told(error: Exception) -> str:
    """What went wrong with MLflow and, where that is known, what to do about it."""
    if isinstance(error, WriterError):
        return str(error)
    text = " ".join(str(error).split())
    what, failed, _ = text.partition(" failed with exception ")  # what comes after it are the layers of the HTTP client
    remedies = getattr(error, "__notes__", [])
    if remedies:  # in place of MLflow's own, and of the query
        what = re.split(r"\. | \[SQL: |\(Background", what)[0]
    return "; ".join([f"{type(error).__name__}: {what[:200]}{' failed' if failed else ''}", *remedies])
