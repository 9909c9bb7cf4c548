"""A search space: parameters with their choices, the conditions they exist under, objectives, constraints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from streamllm.policy import CapAccounting, keys_in_16_bits
from streamllm.results.constraint import Constraint
from streamllm.results.schema import is_score

Value = str | int


@dataclass(frozen=True, slots=True)
class SearchSpace:
    name: str
    description: str
    cap: int
    cap_accounting: CapAccounting
    objectives: tuple[str, ...]
    parameters: Mapping[str, tuple[Value, ...]]
    """Every parameter with its choices in order; a fixed one has one."""
    known: tuple[Mapping[str, Value], ...]
    """Complete configurations to try first."""
    when: Mapping[str, Mapping[str, tuple[Value, ...]]] = field(default_factory=dict)
    """Conditional parameter -> the others' values it exists with; those others are not conditional themselves."""
    defaults: Mapping[str, Value] = field(default_factory=dict)
    """A conditional parameter's value where the parameter does not exist."""
    constraints: tuple[Constraint, ...] = ()
    tasks: Mapping[str, object] = field(default_factory=dict)
    """How its tasks are put: folder, limit, num_fewshot, apply_chat_template."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Those that are objectives or constrained."""
        return tuple(dict.fromkeys([*self.objectives, *(constraint.metric for constraint in self.constraints)]))

    @property
    def scores(self) -> tuple[str, ...]:
        """Scores of tasks among them."""
        return tuple(filter(is_score, self.measures))

    @property
    def keys_per_total(self) -> int:
        """The most keys that 1 of `total_kv` stands for."""
        if self.cap_accounting != "bytes":
            return 1
        return max(keys_in_16_bits(str(name)) for name in self.parameters["kv_dtype"])

    def active(self, name: str, params: Mapping[str, Value]) -> bool:
        """Whether the parameter exists beside these values of the others."""
        return all(params[other] in values for other, values in self.when.get(name, {}).items())

    def draw(self, choose: Callable[[str, tuple[Value, ...]], Value]) -> dict[str, Value]:
        """A complete configuration: what `choose` picks where there is a choice, everywhere else the default."""
        params: dict[str, Value] = {}
        for name in sorted(self.parameters, key=self.when.__contains__):
            choices = self.parameters[name] if self.active(name, params) else (self.defaults[name],)
            params[name] = choose(name, choices) if len(choices) > 1 else choices[0]
        return {name: params[name] for name in self.parameters}

    def complete(self, params: Mapping[str, Value]) -> dict[str, Value]:
        """The configuration that these chosen values make. Raises KeyError if one is missing."""
        return self.draw(lambda name, _: params[name])

    def points(self) -> Iterator[dict[str, Value]]:
        """Every configuration once."""
        for given, free in self._blocks():
            for values in itertools.product(*free.values()):
                yield self.complete(given | dict(zip(free, values, strict=True)))

    @property
    def size(self) -> int:
        """How many configurations there are."""
        return sum(math.prod(len(choices) for choices in free.values()) for _, free in self._blocks())

    def _blocks(self) -> Iterator[tuple[dict[str, Value], dict[str, tuple[Value, ...]]]]:
        """Every combination of the values that conditions ask for, and the choices that are free beside it."""
        deciding = dict.fromkeys(other for conditions in self.when.values() for other in conditions)
        for values in itertools.product(*(self.parameters[name] for name in deciding)):
            given = dict(zip(deciding, values, strict=True))
            yield given, {n: c for n, c in self.parameters.items() if n not in given and self.active(n, given)}

    def with_backends(self, names: Sequence[str]) -> SearchSpace:
        """The space over these attention kernels, its known configurations with each of them."""
        known = [{**params, "attn_backend": name} for params in self.known for name in names]
        return replace(
            self,
            parameters={**self.parameters, "attn_backend": tuple(names)},
            known=tuple(params for index, params in enumerate(known) if params not in known[:index]),
        )

    def under(self, cap: int) -> SearchSpace:
        """The space where a model's cap is lower: a larger `total_kv` counts as the cap."""

        def clamped(name: str, value: Value) -> Value:
            return min(int(value), cap) if name == "total_kv" else value

        def all_clamped(choices: Mapping[str, tuple[Value, ...]]) -> dict[str, tuple[Value, ...]]:
            return {n: tuple(dict.fromkeys(clamped(n, value) for value in values)) for n, values in choices.items()}

        known = [{name: clamped(name, value) for name, value in params.items()} for params in self.known]
        return replace(
            self,
            parameters=all_clamped(self.parameters),
            known=tuple(params for index, params in enumerate(known) if params not in known[:index]),
            when={name: all_clamped(conditions) for name, conditions in self.when.items()},
            defaults={name: clamped(name, value) for name, value in self.defaults.items()},
        )
