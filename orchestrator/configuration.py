"""The resolved configuration of a sweep: everything that decides its results, as written to `sweep.json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import streamllm
from search_spaces import SearchSpace
from streamllm.errors import UsageError, shown
from streamllm.libraries import installed
from streamllm.measuring.jobs import TaskAsked
from streamllm.measuring.text import TextSource, TokenStream
from streamllm.results.damaged import keep_aside
from streamllm.results.schema import OBJECTIVES
from streamllm.results.study_folder import StudyFolder

from .options import SAMPLERS, TIMINGS
from .search.points import check_cap, check_methods, check_possible
from .search.tasks import tasks_of
from .study_name import check_study_name

_FORMAT = 2
"""Format of a study's rows: from 2 on their times are ratios to a reference's."""
_TRIALS = 16
MOST_SECONDS = 1e9
"""Thirty years: what waits can be asked to wait for so long."""
_MOST_SEED = 4_000_000_000
"""NumPy takes 32 bits, and a study that goes on adds the number of its trials."""


def total_kv(given: int | None, cap: int, trained: int | None) -> int:
    """The given value, or else the space's cap, but no more than the trained length. Raises UsageError."""
    most = min(cap, trained or cap)
    if given is not None and not 1 <= given <= most:
        raise UsageError(f"cap {shown(given)}: must be from 1 to {most}, by the space and the model's trained length")
    return given or most


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Everything that makes a sweep this study and no other: none of it may change when the study goes on.

    Raises UsageError for what can be seen to be wrong without reading weights or text."""

    study: str
    model: str
    source: TextSource
    dtype: str
    quantization: str
    space: SearchSpace
    cap: int
    """Total KV: the space's cap, or the model's trained length where that is shorter."""
    seed: int = 0
    model_digest: str = ""
    """Digest of the weights, as this process finds them: the hub's commit, or a hash of the files."""
    tasks: tuple[TaskAsked, ...] = ()
    """Those that the space's objectives and constraints are scores of, as this process finds them."""
    text_file_digest: str | None = None
    """Digest of the file that the text is read from; None if there is no such file."""

    def __post_init__(self) -> None:
        check_study_name(self.study)
        check_whole(0, seed=self.seed, most=_MOST_SEED)
        check_methods(self.space)
        _check_quantizations(self.space, self.quantization)
        check_cap(self.space, self.cap)
        check_possible(self.space, self.cap)

    def with_digests(self) -> Identity:
        """With those of weights and text, which are read for it. Raises UsageError for what is wrong with them."""
        from streamllm.engine.loading import check_files, load_tokenizer, weights_digest
        from streamllm.measuring.text import check_text, file_digest

        vocabulary = check_files(self.model)
        check_text(self.source, lambda: load_tokenizer(self.model), vocabulary)
        return replace(
            self,
            model_digest=weights_digest(self.model),
            text_file_digest=file_digest(self.source),
            tasks=tasks_of(self.space, self.model),
        )

    def tokens(self) -> TokenStream:
        """The text, read and tokenized. Raises UsageError."""
        from streamllm.engine.loading import check_files, load_tokenizer
        from streamllm.measuring.text import load_tokens

        tokenizer = None if self.source.token_ids is not None else load_tokenizer(self.model)
        return load_tokens(self.source, tokenizer, check_files(self.model) or sys.maxsize)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it."""
        values = asdict(self)
        values["space"]["parameters"] = {name: list(choices) for name, choices in self.space.parameters.items()}
        values["space"]["known"] = [dict(known) for known in self.space.known]
        values["objectives"] = {name: OBJECTIVES[name] for name in self.space.objectives}
        values["tasks"] = {task.name: json.loads(task.key)["task_digest"] for task in self.tasks}
        return _as_json(values | {"format": _FORMAT})


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How a study is searched. This and all that follows may change when it goes on."""

    trials: int | None = None
    """Configurations in all; None: 16, or those that fit in the time budget, or as many as `until` takes."""
    until: float | None = None
    """Share of the front's hypervolume: the search ends when what was not timed would hardly add so much."""
    time_budget: float | None = None
    """Seconds after which all should be finished."""
    sampler: str = "auto"
    baseline_tokens: int | None = None
    """Size of the baseline's sample; 0: all; None: as many as a share of the time allows."""

    def __post_init__(self) -> None:
        check_whole(1, trials=self.trials)
        check_whole(0, baseline_tokens=self.baseline_tokens)
        _check_seconds(time_budget=self.time_budget)
        if self.sampler not in SAMPLERS:
            raise UsageError(f"sampler {self.sampler!r}: must be one of {', '.join(SAMPLERS)}")
        if self.until is not None and not 0 < self.until < 1:
            raise UsageError(f"until {self.until}: must be a share above 0 and below 1, such as 0.01")
        if self.until is not None and self.sampler != "front":
            raise UsageError(f"until {self.until} with sampler {self.sampler!r}: only front can tell what is left")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Who measures."""

    count: int = 0
    """0: one per accelerator, or per core."""
    cpus: int = 0
    """Cores that each owns; 0: one, or an equal share."""
    address: str | None = None
    """Of a Ray cluster to join; None: one is started here."""
    trial_timeout: float | None = None
    """Seconds after which a worker that measures is ended; None: an hour, or ten times the slowest trial so far."""
    load_timeout: float = 1800.0
    """Seconds after which one that loads is."""
    timing: str = "auto"
    """Whether accelerators of a node are timed at once: `TIMINGS`."""

    def __post_init__(self) -> None:
        if self.timing not in TIMINGS:
            raise UsageError(f"timing {self.timing!r}: must be one of {', '.join(TIMINGS)}")
        check_whole(0, workers=self.count, cpus_per_worker=self.cpus)
        _check_seconds(trial_timeout=self.trial_timeout, load_timeout=self.load_timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmSettings:
    """What comes after the search."""

    rounds: int = 3
    """In which the front's times are taken again."""
    max_ppl_increase: float | None = None
    """Percent over re-computation that what is recommended may cost; None: the front's knee is."""

    def __post_init__(self) -> None:
        check_whole(0, confirm=self.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfiguration:
    output: Path
    identity: Identity
    search: SearchSettings = field(default_factory=SearchSettings)
    workers: WorkerSettings = field(default_factory=WorkerSettings)
    confirm: ConfirmSettings = field(default_factory=ConfirmSettings)

    @property
    def trials(self) -> int:
        """How many configurations are measured in all, at most."""
        limited = self.search.time_budget is not None or self.search.until is not None
        return self.search.trials or (self.identity.space.size if limited else _TRIALS)

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
        what = self.identity
        return (
            f"{what.model} on {what.source.label}, space {what.space.name}, "
            f"total KV {what.cap} ({what.space.cap_accounting})"
        )

    def to_dict(self, study_id: str) -> dict[str, object]:
        """What `sweep.json` says: flat, as older studies have it."""
        search, workers, confirm = self.search, self.workers, self.confirm
        return self.identity.to_dict() | {
            "output": str(self.output),
            "trials": self.trials,
            "until": search.until,
            "time_budget": search.time_budget,
            "sampler": search.sampler,
            "baseline_tokens": search.baseline_tokens,
            "workers": workers.count,
            "cpus_per_worker": workers.cpus,
            "trial_timeout": workers.trial_timeout,
            "load_timeout": workers.load_timeout,
            "timing": workers.timing,
            "confirm": confirm.rounds,
            "max_ppl_increase": confirm.max_ppl_increase,
            "study_id": study_id,
            "summary": self.summary,
            "versions": versions(),
            "commit": commit(),
        }

    def check(self) -> str | None:
        """The id of the study that is there already; None if there is none.

        Raises UsageError that shows the difference if that one is of another sweep."""
        before, _ = self.folder.known_configuration()
        if before is None:
            return None
        # an older study has what it lacks as by default
        before["source"] = asdict(TextSource()) | before.get("source", {})
        before["space"] = {"tasks": {}} | before.get("space", {})
        before.setdefault("tasks", {})
        changed = _differences(before, self.identity.to_dict())
        if changed:
            raise UsageError(
                f"study {self.identity.study!r} exists with other settings ({'; '.join(changed)}); "
                f"repeat those, or give another --study"
            )
        return str(before.get("study_id") or uuid.uuid4().hex)

    def goes_on(self) -> bool:
        """Whether there is a study, and of this very sweep."""
        try:
            return self.check() is not None
        except UsageError:
            return False

    def claim(self) -> str:
        """Writes `sweep.json`, or checks that the one there, or the journal's copy of it, is of the same sweep. Returns
        the study's id.

        Raises UsageError that shows the difference."""
        study_id = self.check() or uuid.uuid4().hex
        known, wrong = self.folder.known_configuration()
        if wrong:
            how = "under a new id" if known is None else "which the journal's copy agrees with"
            keep_aside(self.folder.configuration, wrong, f"it is made anew from this command, {how}")
        self.folder.write_configuration(self.to_dict(study_id))
        return study_id


def check_whole(least: int, *, most: int = 2**63 - 1, **values: int | None) -> None:
    """values: by the options' names. Raises UsageError."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{name} {shown(value)}: must be a whole number >= {least}")
        if value is not None and value > most:
            raise UsageError(f"{name} {shown(value)}: must be a whole number from {least} to {most}")


def _check_seconds(**values: float | None) -> None:
    """Raises UsageError."""
    for name, value in values.items():
        if value is not None and not 0 < value <= MOST_SECONDS:
            raise UsageError(f"{name} {value}: must be a number of seconds > 0, and at most {MOST_SECONDS:g}")


def _check_quantizations(space: SearchSpace, given: str) -> None:
    """Raises UsageError for one beside those that the space has, or without the library that makes them."""
    wanted = space.parameters.get("quantization")
    if wanted is None:
        return
    if given != "none":
        own = ", ".join(map(str, wanted))
        raise UsageError(f"quantization {given!r}: the space {space.name!r} has its own ({own}); leave it out")
    if set(wanted) != {"none"} and find_spec("torchao") is None:
        raise UsageError(f"quantization {str(wanted[-1])!r}: needs torchao; pip install -e '.[quant]'")


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


def _as_json(values: dict[str, object]) -> dict[str, object]:
    """The values as they come back from a file."""
    return dict(json.loads(json.dumps(values, default=str)))


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    changed = []
    for name, value in now.items():
        was = before.get(name)
        if isinstance(value, dict) and isinstance(was, dict):
            inner = [key for key in value if was.get(key) != value[key]]
            changed += [f"{name}.{key}: {shown(was.get(key), 200)} then, {shown(value[key], 200)} now" for key in inner]
        elif was != value:
            changed.append(f"{name}: {_shown(name, was)} then, {_shown(name, value)} now")
    return changed


def _shown(name: str, value: object) -> str:
    return f"{value:.12}..." if name.endswith("digest") and value and isinstance(value, str) else shown(value, 200)


def versions() -> dict[str, str]:
    """Versions installed where the sweep is started; those that a measurement was made with are in its entry's key."""
    names = ("torch", "transformers", "torchao", "kvpress", "flash-attn", "optuna", "ray", "mlflow")
    return {name: version for name in names if (version := installed(name)) is not None}
