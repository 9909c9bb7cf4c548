"""Where MLflow keeps studies, and the page that shows one: found out without MLflow, whose import takes seconds."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from .study import EXPERIMENT, FRONTS, view_of

USUAL_ADDRESS = "http://127.0.0.1:5000"
"""Of `mlflow ui`."""


def store_uri(given: str | None = None) -> str:
    """What is given, else $MLFLOW_TRACKING_URI, else the working directory's."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or _store_here()


def _store_here() -> str:
    """What MLflow itself and its `mlflow ui` take where nobody says: the folder `mlruns`, if it holds experiments of an
    old version, or the database mlflow.db."""
    if any(Path("mlruns").glob("[0-9]*/meta.yaml")):
        return Path("mlruns").absolute().as_uri()
    return f"sqlite:///{quote(str(Path('mlflow.db').absolute()))}"


def database_path(uri: str) -> Path | None:
    """The file of a SQLite database; None for other stores."""
    scheme, found, path = uri.partition(":///")
    if not found or scheme.partition("+")[0] != "sqlite":
        return None
    return Path(unquote(path.partition("?")[0]))


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def is_databricks(uri: str) -> bool:
    return uri.partition("://")[0] == "databricks"


def experiment_name() -> str:
    """An absolute path, where the server is Databricks'."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def experiment_id() -> str | None:
    """The experiment that $MLFLOW_EXPERIMENT_ID asks for, unless there is a name too: as MLflow has it."""
    return None if os.environ.get("MLFLOW_EXPERIMENT_NAME") else os.environ.get("MLFLOW_EXPERIMENT_ID")


def runs_page(experiment: str, study: str) -> str:
    """What follows the server's address where MLflow shows the study's runs. MLflow opens an experiment in the workflow
    that its browser was in last, at first that of GenAI; the address says which it shall be.

    experiment: its id."""
    return _page(experiment, view_of(study))


def fronts_page(experiment: str) -> str:
    """Where MLflow shows the fronts of all studies, in charts."""
    return f"{_page(experiment, FRONTS)}&compareRunsMode=CHART"


def artifact_page(experiment: str, run: str, name: str) -> str:
    return f"/#/experiments/{experiment}/runs/{run}/artifacts/{quote(name)}"


def _page(experiment: str, view: str) -> str:
    return f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={quote(view, safe='')}"


def page_of(experiment: str) -> str:
    """Where MLflow shows runs of the experiment, which a `&searchFilter=` chooses."""
    return f"/#/experiments/{experiment}/runs?workflowType=machine_learning"


def shown_at(uri: str, page: str) -> str:
    """The whole address of a page, and what has to run if it is to answer; "" where only Databricks knows."""
    if is_databricks(uri):
        return ""
    address, command = server_of(uri)
    return f"{address}{page}" + (f" while `{command}` runs" if command else "")


def server_of(uri: str) -> tuple[str, str]:
    """The address of a server that shows the store, and the command that has to run if it is to answer; "" for one that
    runs anyway. Not of Databricks'."""
    if is_server(uri):
        return without_password(uri).rstrip("/"), ""
    here = uri == _store_here()
    return USUAL_ADDRESS, "mlflow ui" if here else f"mlflow ui --backend-store-uri {without_password(uri)}"


def without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
