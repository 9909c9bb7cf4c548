"""The resolved configuration of a sweep: everything that decides its results, as written to `sweep.json`."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import streamllm
from search_spaces import SearchSpace
from streamllm.errors import UsageError
from streamllm.libraries import installed
from streamllm.results.schema import OBJECTIVES
from streamllm.results.study_folder import StudyFolder
from streamllm.text import TextSource

_FORMAT = 2
"""Format of a study's rows: from 2 on their times are ratios to a reference's."""

_MAY_CHANGE = {
    "study_id",
    "sampler",
    "trials",
    "time_budget",
    "baseline_tokens",
    "max_ppl_increase",
    "workers",
    "output",
    "summary",
    "versions",
    "commit",
}
"""Settings that may differ when a study is continued."""


def total_kv(given: int | None, cap: int, trained: int | None) -> int:
    """The given value, or else the space's cap, but no more than the trained length. Raises UsageError."""
    most = min(cap, trained or cap)
    if given is not None and not 1 <= given <= most:
        raise UsageError(f"cap {given}: must be 1 to {most}, what the space and the model's trained length allow")
    return given or most


@dataclass(frozen=True, slots=True)
class SweepConfiguration:
    study: str
    output: Path
    model: str
    source: TextSource
    dtype: str
    quantization: str
    space: SearchSpace
    cap: int
    """Total KV: the space's cap, or the model's trained length where that is shorter."""
    trials: int
    workers: int
    """0: one per accelerator, or per core."""
    seed: int
    sampler: str = "auto"
    time_budget: float | None = None
    """Seconds after which all should be finished."""
    baseline_tokens: int | None = None
    """Size of the baseline's sample; 0: all; None: as many as a share of the time allows."""
    max_ppl_increase: float | None = None
    """Percent over re-computation that what is recommended may cost; None: the front's knee is."""
    model_digest: str = ""
    """Digest of the weights, as this process finds them: the hub's commit, or a hash of the files."""
    text_file_digest: str | None = None
    """Digest of the file that the text is read from; None if there is no such file."""

    @property
    def folder(self) -> StudyFolder:
        return StudyFolder(self.output)

    @property
    def journal(self) -> Path:
        return self.folder.journal

    @property
    def store(self) -> Path:
        return self.folder.store

    @property
    def summary(self) -> str:
        return (
            f"{self.model} on {self.source.label}, space {self.space.name}, "
            f"total KV {self.cap} ({self.space.cap_accounting})"
        )

    def to_dict(self, study_id: str) -> dict[str, Any]:
        values = asdict(self)
        values["space"]["parameters"] = {name: list(choices) for name, choices in self.space.parameters.items()}
        values["space"]["known"] = [dict(known) for known in self.space.known]
        values |= {
            "study_id": study_id,
            "format": _FORMAT,
            "summary": self.summary,
            "objectives": {name: OBJECTIVES[name] for name in self.space.objectives},
            "versions": _versions(),
            "commit": commit(),
        }
        return json.loads(json.dumps(values, default=str))

    def check(self) -> str | None:
        """The id of the study that is there already; None if there is none.

        Raises UsageError that shows the difference if that one is of another sweep."""
        if not self.folder.configuration.exists():
            return None
        before = self.folder.read_configuration()
        before["source"] = asdict(TextSource()) | before["source"]  # an older study has what it lacks as by default
        study_id = str(before["study_id"])
        changed = _differences(before, self.to_dict(study_id))
        if changed:
            raise UsageError(
                f"study {self.study!r} exists with other settings ({'; '.join(changed)}); "
                f"repeat those, or give another --study"
            )
        return study_id

    def goes_on(self) -> bool:
        """Whether there is a study, and of this very sweep."""
        try:
            return self.check() is not None
        except UsageError:
            return False

    def claim(self) -> str:
        """Writes `sweep.json`, or checks that the one there is of the same sweep. Returns the study's id.

        Raises UsageError that shows the difference."""
        study_id = self.check() or uuid.uuid4().hex
        self.folder.write_configuration(self.to_dict(study_id))
        return study_id


_PACKAGES = ("streamllm/", "orchestrator/", "search_spaces/", "dashboards/")


@cache
def commit() -> str:
    """The commit of the checkout that runs, with `+dirty` where tracked files differ from it or our packages have
    others besides; the package's version where it runs from no checkout of its own, be there a repository around it."""
    folder = Path(streamllm.__file__).resolve().parent
    try:
        top, head = _git(folder, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changes = _git(folder, "status", "--porcelain").splitlines()
    except (OSError, ValueError, subprocess.CalledProcessError):
        top, head, changes = "", "", []
    if not top or Path(top).resolve() != folder.parent:
        return f"streamllm-sweep {streamllm.__version__}"
    dirty = any(not line.startswith("??") or line[3:].startswith(_PACKAGES) for line in changes)
    return head + "+dirty" * dirty


def _git(folder: Path, *arguments: str) -> str:
    """Git's output in that folder, whatever repository the environment names (a hook's does)."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changed = []
    for name in now:
        if name not in _MAY_CHANGE and before.get(name) != now[name]:
            if isinstance(now[name], dict) and isinstance(before.get(name), dict):
                inner = [key for key in now[name] if before[name].get(key) != now[name][key]]
                changed += [f"{name}.{key}: {before[name].get(key)!r} then, {now[name][key]!r} now" for key in inner]
            else:
                changed.append(f"{name}: {_shown(name, before.get(name))} then, {_shown(name, now[name])} now")
    return changed


def _shown(name: str, value: Any) -> str:
    return f"{value:.12}..." if name.endswith("digest") and value else repr(value)


def _versions() -> dict[str, str]:
    """Versions installed where the sweep is started; those that a measurement was made with are in its entry's key."""
    names = ("torch", "transformers", "torchao", "kvpress", "flash-attn", "optuna", "ray", "mlflow")
    return {name: version for name in names if (version := installed(name)) is not None}
