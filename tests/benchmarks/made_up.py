"""A study whose workers measure nothing, for benchmarks of what surrounds the measuring."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from orchestrator.tracking.mlflow_runs import PARENT_PARAMS
from search_spaces import SearchSpace
from streamllm.measuring.text import TextSource
from streamllm.results.schema import OBJECTIVES

CAP = 2048


def made_up_settings(study_id: str, space: SearchSpace) -> dict[str, Any]:
    """A `sweep.json` of a study whose workers measure nothing, with all that MLflow's projection reads of it."""
    words = dict.fromkeys(("study", "model", "commit", "quantization", "summary", *PARENT_PARAMS), "none")
    return words | {
        "study_id": study_id,
        "cap": CAP,
        "seed": 0,
        "space": {"name": space.name},
        "objectives": {name: OBJECTIVES[name] for name in space.objectives},
        "source": asdict(TextSource()),
    }
