"""`--dry-run`: what a sweep would do and what it may cost, without starting anything or loading weights. A few layers
of the model's shape are run, with random ones, for the cost."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from search_spaces import SearchSpace, Value
from streamllm.errors import UsageError
from streamllm.results.schema import OBJECTIVES, Row
from streamllm.results.study_folder import StudyFolder, read_rows
from streamllm.terminal.progress import spoken, working

from .configuration import Identity, SweepConfiguration, WorkerSettings
from .estimate import estimate
from .options import AUTO_FRONT_TRIALS, USUAL_UNTIL_TIMINGS
from .search.points import configuration_of
from .workers.cluster import resources_here
from .workers.room import Room


def describe(configuration: SweepConfiguration) -> str:
    """The resolved configuration for people. Raises UsageError if the study exists with other settings."""
    exists = configuration.check() is not None
    what, search = configuration.identity, configuration.search
    space, cap, source = what.space, what.cap, what.source
    limits = f"up to {configuration.trials} trials"
    if search.until is not None:
        limits += f", until what is left would hardly add {search.until:.2%} to the front's hypervolume"
    if search.time_budget is not None:
        limits += f", finished after about {search.time_budget:g} s"
    shortened = f"; the space says {space.cap}" if cap < space.cap else ""
    auto = f" (front for {AUTO_FRONT_TRIALS} trials, then nsga2)" if search.sampler == "auto" else ""
    layout = _layout(configuration.workers)
    sections: dict[str, list[str]] = {
        "study": [f"{what.study}, {'goes on' if exists else 'new'}", str(configuration.output)],
        "model": [f"{what.model}, dtype {what.dtype}, quantization {what.quantization}"],
        "text": [f"{source.label}, {_tokens(source.offset, source.max_eval_tokens)}"],
        "space": [f"{space.name}: {space.description}", f"{space.size} configurations"],
        "total KV": [f"{cap} ({space.cap_accounting} accounting{shortened})"],
        "parameters": [*_parameters(space), f"{'window_size':15}{_windows(space)}"],
        "objectives": [f"{name} ({OBJECTIVES[name]})" for name in space.objectives],
        "constraints": [str(constraint) for constraint in space.constraints] or ["none"],
        "sampler": [f"{search.sampler}{auto}, seed {what.seed}"],
        "known first": [_known(params, space, cap) for params in space.known] or ["none"],
        "limits": [limits],
        "workers": [layout.words],
        "cost": [_cost(configuration, layout)],
    }
    lines = []
    for title, entries in sections.items():
        lines += [f"{title if first else '':13}{entry}" for first, entry in _marked(entries)]
    return "\n".join(lines)


def _marked(entries: list[str]) -> list[tuple[bool, str]]:
    return [(index == 0, entry) for index, entry in enumerate(entries)]


def _tokens(offset: int, most: int | None) -> str:
    return f"{'all' if most is None else most} tokens{f' from token {offset} on' if offset else ''}"


def _parameters(space: SearchSpace) -> list[str]:
    lines = []
    for name, choices in space.parameters.items():
        conditions = [f"{other} is {' or '.join(map(str, among))}" for other, among in space.when.get(name, {}).items()]
        when = f" where {' and '.join(conditions)}, else {space.defaults[name]}" if conditions else ""
        lines.append(f"{name:15}{', '.join(map(str, choices))}{when}")
    return lines


def _windows(space: SearchSpace) -> str:
    if space.cap_accounting == "peak":
        return "as large as lets no query attend to more than the total"
    if space.cap_accounting == "bytes":
        return "what is left, beside sinks and slack, of the keys in the bytes of the total's in 16 bits"
    sums = [int(end(space.parameters[name])) for end in (min, max) for name in ("n_sink", "cache_slack")]  # type: ignore[operator]
    totals = [int(total) for total in space.parameters["total_kv"]]
    least, most = max(min(totals) - sums[2] - sums[3], 1), max(totals) - sums[0] - sums[1]
    return f"{least} to {most}: what the total leaves beside sinks and slack"


def _known(params: Mapping[str, Value], space: SearchSpace, cap: int) -> str:
    try:
        return str(configuration_of(params, space, cap))
    except UsageError as error:
        return f"left out: {error}"


@dataclass(frozen=True, slots=True)
class WorkerLayout:
    """How many workers there will be, and the threads of each on a CPU, as far as can be told without Ray."""

    count: int
    threads: int | None
    words: str


def _layout(workers: WorkerSettings) -> WorkerLayout:
    count, cpus = workers.count, workers.cpus
    here = resources_here(workers.address)
    if here is None:
        cores = f"{cpus} cores" if cpus > 1 else "core"
        where = workers.address or os.environ.get("RAY_ADDRESS")
        words = f"{count or f'one per accelerator, or per {cores},'} of the cluster at {where}"
        return WorkerLayout(count or 1, cpus or None, words)
    from streamllm.engine.device import default_device, device_name

    room = Room.of([here], workers)
    most = room.workers([here])
    count = count or most
    if room.on_accelerators:
        return WorkerLayout(count, None, f"{count}, each with one of {most} x {device_name(default_device())}")
    each = f"{count}, each with {room.cores} of {here['CPU']:g} cores; no accelerator here"
    return WorkerLayout(count, room.cores, each)


def _cost(configuration: SweepConfiguration, layout: WorkerLayout) -> str:
    """The cost by the model's pace here, and by the trials of the studies beside this one that used the same model and
    text."""
    from streamllm.engine.device import default_device, limit_threads, resolve_dtype
    from streamllm.engine.loading import configuration_of
    from streamllm.measuring.pace import measure_pace

    what, budget = configuration.identity, configuration.search.time_budget
    rows = [row for path in configuration.output.parent.glob("*/trials.jsonl") for row in _like(path, configuration)]
    tokens = max((row["n_tokens"] for row in rows), default=0) or _length(what)
    if not tokens:
        return "unknown, as is how long the text is before it is downloaded; --max-eval-tokens N says it"
    limit_threads(layout.threads)
    dtype = resolve_dtype(what.dtype, default_device())
    with working("running a few layers, for the cost"):
        pace = measure_pace(configuration_of(what.model), dtype, what.cap)
    found = estimate(pace, tokens, configuration, layout.count, rows)
    if configuration.search.until is not None and configuration.search.trials is None and budget is None:
        usual = replace(found, trials=min(USUAL_UNTIL_TIMINGS, found.trials))
        return f"{usual}, as {usual.trials} would be usual; if all had to be timed, {spoken(found.seconds)}"
    if budget is None or found.seconds < budget:
        return str(found)
    fitting = max(int((budget - found.seconds) / found.trial) + found.trials, 0)
    return f"{spoken(budget)}, in which about {fitting} trials fit ({found.source})"


def _length(what: Identity) -> int:
    """The text's length in tokens; 0 if that cannot be told without downloading it."""
    from streamllm.engine.loading import load_tokenizer
    from streamllm.measuring.text import load_tokens, local_data

    source = what.source
    if source.dataset_name is not None and local_data(source.dataset_name) is None:
        return source.max_eval_tokens or 0
    tokenizer = None if source.token_ids is not None else load_tokenizer(what.model)
    return len(load_tokens(source, tokenizer, sys.maxsize).tokens)


def _like(path: Path, configuration: SweepConfiguration) -> list[Row]:
    now = configuration.identity.to_dict()
    try:
        before = StudyFolder(path.parent).read_configuration()
        rows = read_rows(path)
    except (OSError, ValueError, UsageError):
        return []
    if any(before.get(name) != now[name] for name in ("model", "source", "dtype", "quantization")):
        return []
    needed = {"n_tokens", "quality_sec", "speed_sec"}
    return [row for row in rows if isinstance(row.trial, int) and row.state == "complete" and needed <= row.keys()]
