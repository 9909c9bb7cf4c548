"""A configuration: all that is chosen about how a model streams, whatever the text and the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .engine.backends import BACKENDS, Backend
from .engine.methods import Keys, check_cache, method_named
from .policy import EvictionPolicy
from .results.schema import AnyRow, knobs_in_short


@dataclass(frozen=True, slots=True)
class Configuration:
    method: str
    policy: EvictionPolicy
    backend: str = "auto"
    """The attention kernel that is asked for."""
    execution: str = "eager"
    quantization: str | None = None
    """How the weights are quantized; None: as the model was loaded."""

    @property
    def effective(self) -> EvictionPolicy:
        """The part of the policy that the method means: `window` has no sinks, `dense` never evicts, and neither has
        positions to keep. Raises UsageError for a policy that it can do nothing with."""
        check_cache(self.method, self.policy)
        return method_named(self.method).effective(self.policy).canonical

    @property
    def keys(self) -> Keys:
        """How the evaluator is to round them, where a policy's cache is of another number format than the model."""
        return method_named(self.method).keys or "raw"

    @property
    def kernel(self) -> Backend:
        return BACKENDS[self.backend]

    @classmethod
    def of_row(cls, row: AnyRow) -> Configuration:
        """The configuration that a row measured, to be measured again."""
        policy = EvictionPolicy.of(row)
        execution, quantization = row.get("execution", "eager"), row.get("quantization")
        return cls(row["method"], policy, row["backend_requested"], execution, quantization)

    def __str__(self) -> str:
        how = [self.execution] * (self.execution != "eager") + [self.quantization or ""]
        return " ".join(filter(None, [self.method, self.backend, *how, knobs_in_short(asdict(self.policy))]))
