"""What to do about a store that MLflow cannot open or may not write to: MLflow's own messages name neither the file nor
the whole command."""

from __future__ import annotations

import re
from pathlib import Path

from streamllm.results.mlflow_address import database_path, is_databricks, is_server, without_password

_REVISION = re.compile(r"out-of-date database schema \(found version (\w+)|Can't locate revision identified by '(\w+)'")


class ExperimentDeletedError(Exception):
    """MLflow itself finds it only when it is to keep a run, and takes it for a refusal of that run."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the experiment {name!r} was deleted")


def with_remedy(error: Exception, uri: str, experiment: str | None = None) -> Exception:
    """The error, with a note that says what the user can do about it, where that is not just to try again.

    uri: the store's; experiment: the id, if it is known."""
    for note in _remedies(error, uri, experiment):
        error.add_note(note)
    return error


def _remedies(error: Exception, uri: str, experiment: str | None) -> list[str]:
    text, shown = str(error), without_password(uri)
    if isinstance(error, ExperimentDeletedError):
        return [
            f"MLFLOW_TRACKING_URI={shown} mlflow experiments restore --experiment-id {experiment} brings it back, "
            "MLFLOW_EXPERIMENT_NAME=NAME takes another"
        ]
    if found := _REVISION.search(text):
        if _is_known(found[1] or found[2]):
            return [f"keep a copy of the database, then: mlflow db upgrade {shown}"]
        return [f"a newer MLflow has written it: pip install --upgrade mlflow, or {_another_database(uri)}"]
    if "file is not a database" in text:
        return [_another_database(uri)]
    if "maintenance mode" in text:
        return [f"mv {_path(uri)} {_path(uri)}.old, or MLFLOW_TRACKING_URI=sqlite:///mlflow.db leaves it where it is"]
    if "absolute path is required" in text or (is_databricks(uri) and "experiment name" in text):
        return ["MLFLOW_EXPERIMENT_NAME=/Users/YOU/streamllm-sweep: there, names are absolute paths"]
    return _of_the_user(getattr(error, "get_http_status_code", int)()) if is_server(uri) or is_databricks(uri) else []


def _of_the_user(status: int) -> list[str]:
    names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if status == 401:
        return [f"set {names}"]
    if status == 403:
        return [
            f"ask whoever runs the server for the right to write there, set MLFLOW_EXPERIMENT_NAME to an experiment of "
            f"yours, or set {names} to those of somebody who may"
        ]
    return []


def _is_known(revision: str) -> bool:
    """Whether this MLflow knows how to upgrade from there."""
    import mlflow

    folder = Path(mlflow.__file__).parent / "store/db_migrations/versions"
    return any(folder.glob(f"{revision}_*.py"))


def _another_database(uri: str) -> str:
    path = database_path(uri)
    return f"mv {path} {path}.old" if path is not None else "set MLFLOW_TRACKING_URI to another database"


def _path(uri: str) -> str:
    return uri.removeprefix("file://")
