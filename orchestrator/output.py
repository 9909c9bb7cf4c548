"""Where a study lives: `--output`, a folder of this machine or a URL at which a copy of it is kept."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from streamllm.errors import UsageError, shown
from streamllm.terminal.output import check_folder

_OF_JOBS = ("runtime_resources", "working_dir_files")
"""Below its session, Ray unpacks the working directories of jobs here; it removes them when it needs the room."""


@dataclass(frozen=True, slots=True)
class Output:
    folder: Path | None
    """None: `sweeps/STUDY`."""
    copy: str | None = None
    """The URL."""

    @classmethod
    def of(cls, given: str | None) -> Output:
        if given is not None and "://" in given:
            return cls(None, given)
        return cls(None if given is None else Path(given))

    def of_study(self, study: str) -> Path:
        """The study's folder here. Raises UsageError if it cannot be written, or would be lost."""
        folder = self.folder or Path("sweeps") / study
        check_folder("output", folder)
        if self.copy is None and is_discarded(folder):
            raise UsageError(
                f"output {shown(str(folder))}: lies in the working directory of a Ray job, which Ray discards; give an "
                f"absolute --output on a disk that stays, or a URL such as s3://BUCKET/{study}"
            )
        return folder


def is_discarded(folder: Path) -> bool:
    """Whether it lies in the working directory that Ray has unpacked for a job."""
    parts = folder.absolute().resolve().parts
    return _OF_JOBS in pairwise(parts)


def warn_of_tracking(tracking_uri: str | None) -> None:
    """Says that what MLflow keeps by default in the working directory is discarded with a Ray job's."""
    if tracking_uri is None and not os.environ.get("MLFLOW_TRACKING_URI") and is_discarded(Path()):
        print(
            "warning: MLflow's default store is in the Ray job's working directory, which Ray discards; give "
            "--tracking-uri, or bring an MLflow that stays up to date later: streamllm sync STUDY",
            file=sys.stderr,
        )
