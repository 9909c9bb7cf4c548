"""Reads a search space from YAML."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from streamllm.errors import shown
from streamllm.policy import CAP_ACCOUNTINGS, TOTAL_KV_CAP, CapAccounting, PolicyError, keys_in_16_bits
from streamllm.results.constraint import Constraint
from streamllm.results.schema import OBJECTIVES, POLICY_WORDS, SCORE, can_be_objective, is_score

from .knobs import CHECKS, LEAST, USUAL, WORDS
from .reader import Reader, SpaceError, compose
from .space import SearchSpace, Value

_PARAMETERS = (*WORDS, *(name for name in LEAST if name != "window_size"))
"""The window is what the total leaves."""
_IF_NAMED = ("quantization", *(field.name for field in POLICY_WORDS))
"""Parameters that a space has only where it names them. Else the command line says how weights are quantized; and a
study whose space says nothing of a policy's words is the same as before they could be chosen."""
_KEYS = ("description", "cap", "cap_accounting", "objectives", "constraints", "tasks", "parameters", "known")
_OF_TASKS = ("folder", "limit", "num_fewshot", "apply_chat_template")
"""How a space's tasks are put."""
_OF_SCORE = ("task", "metric", "filter")
_MOST_CHOICES = 10_000
"""Of a parameter's range."""
_MOST_COMBINATIONS = 100_000
_SHOWN = 20
"""Choices that a message names."""
_RELATION = re.compile(r"([\w/.\-]+?)\s*(<=|>=)\s*(-?\d+(?:\.\d+)?)")


def load_space(name: str, devices: Collection[str] = ()) -> SearchSpace:
    """A shipped space by name, or a YAML file by path, as it is for workers on such kinds of device. Raises SpaceError,
    whatever the kinds, for what is wrong with any part of it."""
    path, node = compose(name)
    whole = _SpaceReader(path, on_cuda=True).space(node)
    return whole if "cuda" in devices else _SpaceReader(path, on_cuda=False).space(node)


class _SpaceReader(Reader):
    """Reads one file, once. Without CUDA, `cuda_only` fills with the choices that are left out."""

    def __init__(self, path: Path, on_cuda: bool) -> None:
        super().__init__(path)
        self.on_cuda = on_cuda
        self.cuda_only: dict[str, tuple[Value, ...]] = {}

    def space(self, node: yaml.Node | None) -> SearchSpace:
        if node is None:
            raise SpaceError(f"{self.path}: empty; a space needs at least 'parameters'")
        entries = self.mapping(node, "the space", _KEYS)
        if "parameters" not in entries:
            raise self.fail(node, "key 'parameters' is missing")
        cap = self.whole(entries["cap"], "cap", 1) if "cap" in entries else TOTAL_KV_CAP
        given = self.mapping(entries["parameters"], "parameters", _PARAMETERS)
        defaults = {name: USUAL.get(name, cap) for name in _PARAMETERS}
        parameters = {
            name: self.choices(name, given[name]) if name in given else (defaults[name],)
            for name in _PARAMETERS
            if name in given or name not in _IF_NAMED
        }
        if (most := max(int(value) for value in parameters["total_kv"])) > cap:
            raise self.fail(given["total_kv"], f"total_kv {most}: must not be above the cap {cap}")
        when = {name: self.conditions(name, node, parameters) for name, node in self.conditional(given).items()}
        for name in [name for name in when if self.is_never_chosen(name, parameters[name], when[name], defaults)]:
            parameters[name] = (defaults[name],)
            del when[name]
        self.check_combinations(when, parameters, node)
        for name, condition in when.items():
            if other := next((other for other in condition if other in when), None):
                raise self.fail(given[name], f"{name}: depends on {other}, which is conditional itself")
        space = SearchSpace(
            name=self.path.stem,
            description=str(self.scalar(entries["description"])) if "description" in entries else "",
            cap=cap,
            cap_accounting=self.accounting(entries.get("cap_accounting"), parameters, when),
            objectives=self.objectives(entries.get("objectives")),
            parameters=parameters,
            known=(),
            when=when,
            defaults={name: defaults[name] for name in when},
            constraints=self.constraints(entries.get("constraints")),
            tasks=self.tasks(entries.get("tasks")),
        )
        if space.tasks and not space.scores:
            raise self.fail(entries["tasks"], "tasks: no objective and no constraint is a score of one")
        known = self.sequence(entries["known"], "known") if "known" in entries else []
        return replace(space, known=tuple(self.known(entry, space) for entry in known if not self.is_of_cuda(entry)))

    def check_combinations(
        self, when: Mapping[str, Mapping[str, object]], parameters: Mapping[str, Sequence[Value]], node: yaml.Node
    ) -> None:
        """Whoever counts a space's points goes through those of the parameters that conditions depend on."""
        deciding = sorted({other for conditions in when.values() for other in conditions})
        count = math.prod(len(parameters[name]) for name in deciding)
        if count > _MOST_COMBINATIONS:
            raise self.fail(
                node,
                f"{count} combinations of {', '.join(deciding)}, which conditions depend on; "
                f"give at most {_MOST_COMBINATIONS}, with fewer choices or conditions",
            )

    def accounting(
        self, node: yaml.Node | None, parameters: Mapping[str, Sequence[Value]], when: Mapping[str, object]
    ) -> CapAccounting:
        if node is None:
            return "nominal"
        accounting = self.word(node, "cap_accounting", CAP_ACCOUNTINGS)
        if accounting == "bytes":
            formats = parameters.get("kv_dtype", ()) if "kv_dtype" not in when else ()
            try:
                for name in formats or ("auto",):
                    keys_in_16_bits(str(name))
            except PolicyError as error:
                raise self.fail(node, f"cap_accounting bytes: {error}, for every point") from None
        return accounting

    def objectives(self, node: yaml.Node | None) -> tuple[str, ...]:
        if node is None:
            return ("tpot_ms", "ppl_vs_strict_percent")
        values = [self.objective(entry) for entry in self.sequence(node, "objectives")]
        if len(values) not in (2, 3) or len(set(values)) < len(values):
            raise self.fail(node, "objectives: give two or three different ones")
        return tuple(values)

    def objective(self, node: yaml.Node) -> str:
        """A measure's name, or a mapping that names a task and a metric of it."""
        if not isinstance(node, yaml.MappingNode):
            return self.word(node, "objective", tuple(OBJECTIVES))
        given = {key: self.text(value, key) for key, value in self.mapping(node, "objective", _OF_SCORE).items()}
        name = SCORE + "/".join(given[key] for key in _OF_SCORE if key in given)
        if not {"task", "metric"} <= given.keys() or not is_score(name):
            raise self.fail(node, "objective: needs the task and the metric, for example {task: passkey, metric: acc}")
        return name

    def tasks(self, node: yaml.Node | None) -> dict[str, object]:
        """How tasks are put, by the harness' names; their folder is relative to the space's file."""
        given = self.mapping(node, "tasks", _OF_TASKS) if node is not None else {}
        found: dict[str, object] = {}
        for key, value in given.items():
            if key == "folder":
                found[key] = str((self.path.parent / self.text(value, key)).resolve())
            elif key == "apply_chat_template":
                found[key] = self.word(value, key, (True, False))
            else:
                found[key] = self.whole(value, key, 0 if key == "num_fewshot" else 1)
        return found

    def constraints(self, node: yaml.Node | None) -> tuple[Constraint, ...]:
        found = []
        for entry in self.sequence(node, "constraints") if node is not None else []:
            text = self.scalar(entry)
            match = _RELATION.fullmatch(str(text).strip())
            if match is None or not can_be_objective(match[1]) or math.isinf(float(match[3])):
                raise self.fail(
                    entry,
                    f"constraint {shown(text)}: must be METRIC <= NUMBER or >=, METRIC one of {', '.join(OBJECTIVES)}, "
                    f"or task/NAME/METRIC",
                )
            found.append(Constraint(match[1], "<=" if match[2] == "<=" else ">=", float(match[3])))
        for low, high in itertools.product(found, found):
            if low.relation == ">=" and high.relation == "<=" and low.metric == high.metric and low.limit > high.limit:
                assert node is not None
                raise self.fail(node, f"constraints {low} and {high}: nothing can be both; give one of them")
        return tuple(found)

    def choices(self, name: str, node: yaml.Node) -> tuple[Value, ...]:
        """Choices from a list, a single value, or a mapping of either or of a range."""
        if not isinstance(node, yaml.MappingNode):
            return self.distinct(name, [node])
        allowed = ("choices", "cuda", "when") if name in WORDS else ("choices", "low", "high", "step", "log", "when")
        keys = self.mapping(node, name, allowed)
        if "choices" not in keys:
            return self.range(name, node, keys)
        if extra := keys.keys() - {"choices", "cuda", "when"}:
            raise self.fail(
                node, f"{name}: has choices, so {', '.join(sorted(extra))} cannot be meant; leave one of them out"
            )
        everywhere = self.distinct(name, [keys["choices"]])
        if "cuda" not in keys:
            return everywhere
        on_cuda = self.distinct(name, [keys["choices"], keys["cuda"]])
        if self.on_cuda:
            return on_cuda
        self.cuda_only[name] = on_cuda[len(everywhere) :]
        return everywhere

    def distinct(self, name: str, nodes: Sequence[yaml.Node]) -> tuple[Value, ...]:
        """The values of such lists or single values together."""
        entries = [e for node in nodes for e in (self.sequence(node, name) if _is_list(node) else [node])]
        values = tuple(self.value(name, entry) for entry in entries)
        if len(set(values)) < len(values):
            raise self.fail(nodes[-1], f"{name}: a choice is given twice")
        return values

    def is_of_cuda(self, known: yaml.Node) -> bool:
        """Whether a known configuration says something that is left out here."""
        given = self.mapping(known, "a known configuration", _PARAMETERS)
        return any(self.value(name, given[name]) in only for name, only in self.cuda_only.items() if name in given)

    def is_never_chosen(
        self,
        name: str,
        choices: tuple[Value, ...],
        conditions: Mapping[str, tuple[Value, ...]],
        defaults: Mapping[str, Value],
    ) -> bool:
        """Whether nothing is left to choose of a conditional parameter: it is fixed then, as if it were not there."""
        only_default = name in self.cuda_only and choices == (defaults[name],)
        return only_default or not all(conditions.values())

    def range(self, name: str, node: yaml.Node, keys: dict[str, yaml.Node]) -> tuple[int, ...]:
        if not {"low", "high"} <= keys.keys():
            raise self.fail(node, f"{name}: needs choices, or low and high")
        log = "log" in keys and self.word(keys["log"], "log", (True, False))
        least = max(LEAST[name], 1 if log else 0)
        low, high = (self.whole(keys[end], f"{name} {end}", least) for end in ("low", "high"))
        if low > high:
            raise self.fail(node, f"{name}: low {low} is above high {high}")
        if not log:
            values = range(low, high + 1, self.whole(keys["step"], f"{name} step", 1) if "step" in keys else 1)
            if (high - low) // values.step >= _MOST_CHOICES:
                count = (high - low) // values.step + 1
                raise self.fail(node, f"{name}: {count} choices; give at most {_MOST_CHOICES}, by a larger step or log")
            return tuple(values)
        factor = self.whole(keys["step"], f"{name} step of a log range", 2) if "step" in keys else 2
        powers = [low]
        while powers[-1] * factor <= high:
            powers.append(powers[-1] * factor)
        return tuple(powers)

    def value(self, name: str, node: yaml.Node) -> Value:
        if name in LEAST:
            return self.whole(node, name, LEAST[name])
        return self.formed(node, name, CHECKS[name]) if name in CHECKS else self.word(node, name, WORDS[name])

    def conditional(self, given: dict[str, yaml.Node]) -> dict[str, yaml.Node]:
        """Parameter -> its `when`."""
        return {
            name: value
            for name, node in given.items()
            if isinstance(node, yaml.MappingNode)
            for key, value in node.value
            if key.value == "when"
        }

    def conditions(
        self, name: str, node: yaml.Node, parameters: Mapping[str, tuple[Value, ...]]
    ) -> dict[str, tuple[Value, ...]]:
        others = self.mapping(node, f"when of {name}", [other for other in parameters if other != name])
        if not others:
            raise self.fail(node, f"{name}: when needs at least one other parameter with its values")
        if mapping := next((value for value in others.values() if isinstance(value, yaml.MappingNode)), None):
            raise self.fail(mapping, f"when of {name}: give a value or a list of values")
        conditions = {other: self.choices(other, values) for other, values in others.items()}
        for other, values in conditions.items():
            here = tuple(value for value in values if value not in self.cuda_only.get(other, ()))
            self.check_among(f"{name} when {other}", here, parameters[other], others[other])
            conditions[other] = here
        return conditions

    def check_among(self, what: str, values: tuple[Value, ...], choices: tuple[Value, ...], node: yaml.Node) -> None:
        for value in values:
            if value not in choices:
                raise self.fail(node, f"{what} {value!r} is not among its choices: {_listed(choices)}")

    def known(self, node: yaml.Node, space: SearchSpace) -> dict[str, Value]:
        """A configuration; what it does not say is a parameter's first choice."""
        given = self.mapping(node, "a known configuration", tuple(space.parameters))
        values = {name: self.value(name, entry) for name, entry in given.items()}
        known = space.draw(lambda name, choices: values.get(name, choices[0]))
        for name, value in values.items():
            allowed = space.parameters[name] if space.active(name, known) else (space.defaults[name],)
            self.check_among(f"known {name}", (value,), allowed, given[name])
        return known


def _listed(choices: Sequence[Value]) -> str:
    return ", ".join(map(str, choices[:_SHOWN])) + f", ... {choices[-1]}" * (len(choices) > _SHOWN)


def _is_list(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode)
