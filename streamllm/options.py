"""Everything that can be asked for by name, besides methods (`methods/`) and attention backends (`backends`).

An entry is a name and what it names, which is imported when it is used: `--help` answers without torch. Adding one is
adding an entry, and what it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True, slots=True)
class Lazy:
    """A function or value that is imported when it is asked for; of which type, says who asks."""

    where: str
    """module:name"""

    def get(self) -> Any:
        return resolve_name(self.where)


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
EXECUTIONS: dict[str, Lazy | None] = {
    "eager": None,
    "compile": Lazy("streamllm.engine.execution:compiled_step"),
    "cudagraph": Lazy("streamllm.engine.execution:graphed_step"),
}
QUANTIZATIONS: dict[str, Lazy | None] = {
    "none": None,
    "int8_weight_only": Lazy("streamllm.engine.quantization:INT8"),
    "int4_weight_only": Lazy("streamllm.engine.quantization:INT4"),
}
TASK = Lazy("streamllm.harness.jobs:measured_task")
"""Measures a task of lm-evaluation-harness: (model, configuration, `jobs.TaskAsked`) -> the record."""
PROTOCOLS: dict[str, Lazy] = {
    "fast": Lazy("streamllm.measuring.evaluation:evaluate_fast"),
    "decode-loop": Lazy("streamllm.measuring.evaluation:evaluate_decode_loop"),
    "chunked": Lazy("streamllm.measuring.evaluation:evaluate_chunked"),
}
"""fast: quality block-parallel, timing in the steady state. decode-loop: both from decoding token by token. chunked:
both from chunks of the text, each a prefill, one compression and a short continuation."""
