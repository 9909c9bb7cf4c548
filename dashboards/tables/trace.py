"""The way from the cells of a table back: to the store's entries, the rounds of confirming, versions, hardware, commit.

`python -m dashboards.pareto STUDY --trace 5`.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence

from streamllm.errors import UsageError
from streamllm.measuring.reference_time import WORKER
from streamllm.measuring.store import MeasurementStore
from streamllm.results.checks import checked_round
from streamllm.results.damaged import read_lines
from streamllm.results.schema import POLICY_KNOBS, POLICY_WORDS, AnyRow
from streamllm.results.study import FIXED, StudyResults

from .columns import BY_KEY
from .kinds import described

_WIDTH = 80
_LABEL = 12
"""Characters of a line's heading."""
_DIGITS = 16
"""Digits of an entry's name that are enough to find its file."""
_POLICY = {field.name: field.header for field in (*POLICY_KNOBS, *POLICY_WORDS)}
_QUALITY = ("perplexity", "ppl_vs_strict_percent", "ppl_increase_percent", "kl", "peak_kv")
_SPEED = ("tpot_ms", "speedup", "front_probability")

Pair = tuple[str, str]
"""Heading and text of a line."""


def trace(study: StudyResults, trial: str) -> str:
    """A text of 80 columns. trial: a number, or what trials are compared with. Raises UsageError."""
    rows = {str(row["trial"]): row for row in (*study.trials, *study.fixed)}
    if trial not in rows:
        numbers = [name for name in rows if name not in FIXED]
        known = [f"{len(numbers)} trials, up to {max(numbers, key=int)}"] if numbers else []
        known += [name for name in FIXED if name in rows]
        raise UsageError(f"trace {trial!r}: no such trial; study {study.name!r} has {', '.join(known) or 'none yet'}")
    row, store = rows[trial], MeasurementStore(study.files.store)
    pairs = [
        ("study", f"{study.name}, in {study.folder}"),
        *_measured(row),
        *_quality(study, row, store),
        *_times(study, row, store),
        ("store", str(store.root)),
    ]
    return "\n".join(line for heading, text in pairs for line in _lines(heading, text))


def _measured(row: AnyRow) -> Iterator[Pair]:
    """The configuration that the row measured, and who measured it when."""
    policy = ", ".join(f"{name} {row[key]}" for key, name in _POLICY.items() if key in row)
    yield _title(row), f"{row.get('method')}, {policy}"
    ran = f"{row.get('backend')}, asked for {row['backend_requested']}" if row.get("backend") else "none ran"
    how = [f"backend {ran}", f"execution {row.get('execution', 'eager')}"]
    yield "", ", ".join([*how, *([f"quantization {row['quantization']}"] if "quantization" in row else [])])
    if row.get("state") != "complete":
        yield "failed", str(row.get("reason"))
    if "model" in row:
        yield "model", _named(row["model"], row.get("model_digest"), row.get("dtype"))
        yield "text", _named(row.get("dataset"), row.get("text_digest"), f"{row.get('n_tokens', '?')} tokens")
    worker = [f"by worker {row['worker']}"] if "worker" in row else []
    taken = ["from the store, nothing was measured anew"] if row.get("reused") else []
    yield "finished", ", ".join([_date(row.get("finished_at")), *worker, *taken])
    yield "commit", str(row.get("commit", "not known"))
    if row.get("state") == "complete":
        yield "timed on", described(row)


def _quality(study: StudyResults, row: AnyRow, store: MeasurementStore) -> Iterator[Pair]:
    if not (cells := _cells(row, _QUALITY)):
        return
    yield "", ""
    yield "quality", cells
    yield from _entry("losses", row.get("quality_entry"), store)
    if "ppl_vs_strict_percent" in row and study.strict is not None and row["trial"] != "strict":
        tokens = f"at {row['sampled_tokens']} tokens" if "sampled_tokens" in row else "at every token"
        yield "vs strict", f"beside {_short(study.strict.get('quality_entry'))}, of strict, {tokens}"
    if "ppl_increase_percent" in row and study.baseline is not None and row["trial"] != "baseline":
        sampled = study.baseline.get("sampled_tokens")
        tokens = f"known at {sampled} tokens" if sampled else "at every token"
        yield "increase", f"beside {_short(study.baseline.get('quality_entry'))}, of the baseline, {tokens}"


def _times(study: StudyResults, row: AnyRow, store: MeasurementStore) -> Iterator[Pair]:
    if not (cells := _cells(row, _SPEED)):
        return
    yield "", ""
    yield "speed", cells
    if "time_ratio" in row:
        yield "ratio", f"{_number(row, 'time_ratio')} of the reference's time beside it, {row.get('pairs', '?')} pairs"
    if row.get("rounds"):
        yield from _rounds(study, row)
        yield from _entry("the search", row.get("speed_entry"), store)
    else:
        yield from _entry("timing", row.get("speed_entry"), store)
    for unit in study.references:
        if (unit.device, unit.threads, unit.software) == tuple(row.get(name) for name in WORKER):
            yield "unit", f"{unit}: what the ratio is multiplied with"
    if "speedup" in row and study.baseline is not None and row["trial"] != "baseline":
        whose = "times in the same rounds" if row.get("rounds") else _short(study.baseline.get("speed_entry"))
        yield "speedup", f"beside the baseline's {whose}: ratio {_number(study.baseline, 'time_ratio')}"


def _rounds(study: StudyResults, row: AnyRow) -> Iterator[Pair]:
    """Those that the confirmed times are of."""
    numbers = row.get("round_lines", ())
    if not numbers:
        yield "confirmed", f"in {row['rounds']} rounds, whose lines in rounds.jsonl were not noted then"
        return
    path, trial = study.files.rounds, str(row["trial"])
    lines, _ = read_lines(path, checked_round)
    found = [number for number in numbers if trial in lines.get(number, {}).get("ratios", {})]
    gone = "" if len(found) == len(numbers) else ", which are not all there, or damaged"
    yield "confirmed", f"{path}, lines {', '.join(map(str, numbers))}{gone}"
    for number in found:
        one = lines[number]
        ratios, times = one["ratios"][trial], one["times"][trial]
        middle = sorted(ratios)[len(ratios) // 2]
        when = f"{_date(times.get('timed_at'))}, load {times.get('load', math.nan):.2f}, code {one['code']}"
        yield f"line {number}", f"ratio {middle:.4g} of {len(ratios)} pairs, {when}, on {described(times)}"


def _entry(heading: str, names: str | None, store: MeasurementStore) -> Iterator[Pair]:
    """For each of the store's entries, its file and what its key says about code, versions and machine."""
    if not names:
        yield heading, "the entry was not noted when this was measured"
        return
    for name in names.split():
        key = store.key(name)
        yield heading, f"{_short(name)}" + ("" if key is not None else ", which is in the store no more")
        if key is not None:
            yield "", f"{key.get('kind')}, code {key.get('code')}"
            yield "", _versions(key)


def _versions(key: Mapping[str, object]) -> str:
    """The parts of an entry's key that belong neither to the model, nor to the text, nor to the policy."""
    names = ("torch", "transformers", "torchao", "kvpress", "flash-attn", "triton", "python", "cuda", "rocm", "driver",
             "omp_wait_policy", "device", "threads", "cpu_capability")  # fmt: skip
    return ", ".join(f"{name} {key[name]}" for name in names if key.get(name) is not None)


def _cells(row: AnyRow, names: Sequence[str]) -> str:
    """The named cells as a table shows them."""
    columns = [BY_KEY[name] for name in names]
    return ", ".join(f"{column.title} {text}" for column in columns if (text := column.text(row)))


def _number(row: AnyRow, name: str) -> str:
    ends = f" [{row[f'{name}_low']:.4g}, {row[f'{name}_high']:.4g}]" if f"{name}_low" in row else ""
    return f"{row[name]:.4g}{ends}" if name in row else "not known"


def _short(name: str | None) -> str:
    """An entry as the pattern of its file below the store."""
    return f"{name[:2]}/{name[:_DIGITS]}*.json" if name else "an entry that was not noted"


def _title(row: AnyRow) -> str:
    return str(row["trial"]) if row["trial"] in FIXED else f"trial {row['trial']}"


def _named(name: str | None, digest: str | None, more: str | None) -> str:
    return ", ".join(str(part) for part in (name, f"digest {digest[:_DIGITS]}" if digest else None, more) if part)


def _date(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds is not None else "no one knows when"


def _lines(heading: str, text: str) -> list[str]:
    """Whole words; only one that is longer than a line, as a path may be, reaches beyond the width."""
    whole = textwrap.wrap(text, _WIDTH - _LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{heading if not number else '':{_LABEL}}{line}".rstrip() for number, line in enumerate(whole)]
