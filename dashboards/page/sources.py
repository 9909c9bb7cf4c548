"""Where a report's numbers can be had elsewhere: the Python call that gives its tables, and MLflow's runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from urllib.parse import quote

from streamllm.results.mlflow_address import is_databricks, page_of, server_of
from streamllm.results.study import StudyResults


def called(study: StudyResults) -> str:
    """Python that has the study as `study`, where the commands are typed."""
    return f"import dashboards\n\nstudy = dashboards.load_study({_name(study)!r})\n"


def traced(study: StudyResults) -> str:
    """The command that says where the numbers of a trial come from, to be followed by the trial."""
    return f"python -m dashboards.pareto {shlex.quote(_name(study))} --trace"


def _name(study: StudyResults) -> str:
    """As commands take it: by itself where it lies where studies lie, else its folder."""
    is_here = study.folder.resolve() == (Path("sweeps") / study.name).resolve()
    return study.name if is_here else str(study.folder)


def runs_address(study: StudyResults) -> dict[str, str] | None:
    """Where MLflow shows the run of a trial, to be followed by `'5'`, and the command that has to run if it is to
    answer; None where nobody noted where the runs are, or the address is not known."""
    uri, experiment = study.files.read_tracking()
    study_id = study.configuration.get("study_id")
    if not uri or is_databricks(uri) or study_id is None:
        return None
    address, command = server_of(uri)
    condition = quote(f"tags.study_id = '{study_id}' and tags.trial = ", safe="")
    return {"address": f"{address}{page_of(experiment)}&searchFilter={condition}", "command": command}
