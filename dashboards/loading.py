"""Studies as the commands load them: what is damaged is a warning, and of several studies no one keeps the others from
being shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from streamllm.errors import UsageError
from streamllm.results.damaged import DamagedError
from streamllm.results.schema import NewerFormatError
from streamllm.results.study import StudyResults, load_study
from streamllm.terminal.printing import say


def load(study: str) -> StudyResults:
    """`load_study`, with a line on stderr for each of its files that is damaged. Raises DamagedError, UsageError."""
    found = load_study(study)
    for problem in found.problems:
        _warn(problem)
    return found


def load_all(studies: Sequence[str]) -> list[StudyResults]:
    """Those of several that can be read, each once, with a line on stderr for each of the others. Raises DamagedError
    or NewerFormatError if none can, UsageError for one that is none."""
    found, damaged = list[StudyResults](), list[UsageError]()
    for study in studies:
        try:
            one = load(study)
            if any(one.folder.resolve() == other.folder.resolve() for other in found):
                _warn(f"study {study!r}: named twice, counts once")
            else:
                found.append(one)
        except (DamagedError, NewerFormatError) as error:
            damaged.append(error)
    if damaged and not found:
        raise damaged[0]
    for problem in damaged:
        _warn(f"{problem}; left out")
    return found


def studies_here() -> list[str]:
    """Folders of all studies under `sweeps/`, the one that went on last first."""
    files = [path for path in Path("sweeps").glob("*/trials.jsonl") if path.exists()]
    return [str(path.parent) for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)]


def _warn(text: str) -> None:
    say(f"warning: {text}", sys.stderr)
