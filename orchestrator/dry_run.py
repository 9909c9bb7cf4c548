"""`--dry-run`: what a sweep would do and what it may cost, without starting anything or loading weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from search_spaces import OBJECTIVES, SearchSpace
from streamllm.errors import UsageError

from .configuration import SweepConfiguration
from .options import AUTO_TPE_TRIALS
from .study import spec_of


def describe(configuration: SweepConfiguration, address: str | None, cpus_per_worker: int) -> str:
    """The resolved configuration for people. Raises UsageError if the study exists with other settings."""
    exists = configuration.check() is not None
    space, cap, source = configuration.space, configuration.cap, configuration.source
    limits = f"up to {configuration.trials} trials"
    if configuration.time_budget is not None:
        limits += f", nothing new after {configuration.time_budget:g} s"
    shortened = f", the model's trained length; the space says {space.cap}" if cap < space.cap else ""
    auto = f" (tpe for {AUTO_TPE_TRIALS} trials, then nsga2)" if configuration.sampler == "auto" else ""
    sections: dict[str, list[str]] = {
        "study": [f"{configuration.study}, {'goes on' if exists else 'new'}", str(configuration.output)],
        "model": [f"{configuration.model}, dtype {configuration.dtype}, quantization {configuration.quantization}"],
        "text": [f"{source.label}, {_tokens(source.offset, source.max_eval_tokens)}"],
        "space": [f"{space.name}: {space.description}", f"{space.size} configurations"],
        "total KV": [f"{cap} ({space.cap_accounting} accounting{shortened})"],
        "parameters": [*_parameters(space), f"{'window_size':15}{_windows(configuration)}"],
        "objectives": [f"{name} ({OBJECTIVES[name]})" for name in space.objectives],
        "constraints": [str(constraint) for constraint in space.constraints] or ["none"],
        "sampler": [f"{configuration.sampler}{auto}, seed {configuration.seed}"],
        "known first": [_known(params, configuration) for params in space.known] or ["none"],
        "limits": [limits],
        "workers": [_workers(configuration.workers, cpus_per_worker, address)],
        "cost": [_cost(configuration)],
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


def _windows(configuration: SweepConfiguration) -> str:
    space = configuration.space
    if space.cap_accounting == "peak":
        return "as large as lets no query attend to more than the total"
    sums = [int(end(space.parameters[name])) for end in (min, max) for name in ("n_sink", "cache_slack")]  # type: ignore[operator]
    totals = [int(total) for total in space.parameters["total_kv"]]
    least, most = max(min(totals) - sums[2] - sums[3], 1), max(totals) - sums[0] - sums[1]
    return f"{least} to {most}: what the total leaves beside sinks and slack"


def _known(params: Any, configuration: SweepConfiguration) -> str:
    try:
        spec = spec_of(dict(params), configuration.space, configuration.cap)
    except UsageError as error:
        return f"left out: {error}"
    policy = spec.policy
    return (
        f"{spec.method} {spec.attn_backend} {spec.execution} S={policy.n_sink} W={policy.window_size} "
        f"R={policy.compress_every} slack={policy.cache_slack} drop={policy.max_drop}"
    )


def _workers(count: int, cpus_per_worker: int, address: str | None) -> str:
    cores = f"{cpus_per_worker} cores" if cpus_per_worker > 1 else "core"
    if address is not None:
        return f"{count or f'one per accelerator, or per {cores},'} of the cluster at {address}"
    from torch import accelerator

    from streamllm.device import default_device, device_name

    if accelerators := accelerator.device_count():
        return f"{count or accelerators}, each with one of {accelerators} x {device_name(default_device())}"
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = count or max(here // max(cpus_per_worker, 1), 1)
    each = cpus_per_worker or max(here // count, 1)
    if not 1 <= count <= here // each:
        raise UsageError(
            f"workers {count}: there is room for {here // each} with {each} of the {here} cores each; "
            f"give fewer of one or the other"
        )
    return f"{count}, each with {each} of {here} cores; no accelerator here"


def _cost(configuration: SweepConfiguration) -> str:
    """From the trials of the studies beside this one that used the same model and text."""
    rows = [row for path in configuration.output.parent.glob("*/trials.jsonl") for row in _like(path, configuration)]
    if not rows:
        return "unknown: no study beside this one has measured this model on this text; the first trials will tell"
    quality, speed = (median(row[name] for row in rows) for name in ("quality_sec", "speed_sec"))
    workers = configuration.workers or 1
    seconds = configuration.trials * (speed + quality / workers)
    return (
        f"about {seconds / 60:.1f} min for {configuration.trials} trials, start and baseline apart: {quality:.1f} s of "
        f"quality each, {workers} at a time, and {speed:.1f} s of timing, one at a time (medians of {len(rows)} trials)"
    )


def _like(path: Path, configuration: SweepConfiguration) -> list[dict[str, Any]]:
    now = configuration.to_dict("")
    try:
        before = json.loads((path.parent / "sweep.json").read_text())
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    if any(before.get(name) != now[name] for name in ("model", "source", "dtype", "quantization")):
        return []
    return [row for row in rows if isinstance(row["trial"], int) and row["state"] == "complete"]
