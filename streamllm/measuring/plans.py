"""What it takes to know a quality, a speed or both: plans, whoever measures their jobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..configuration import Configuration
from ..engine.decoding import Progress
from ..engine.methods import method_named, sampled_losses
from ..errors import UsageError
from ..policy import EvictionPolicy, strict_policy
from .divergence import MOST_POSITIONS
from .done import Done
from .evaluation import Quality, fast_record
from .jobs import Job, More, Plan
from .keys import Keys
from .sample import BATCH, FixedSize, SampleSize
from .store import Measurement, MeasurementStore, entry_name
from .text import TokenStream


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a plan has found out about a configuration."""

    record: dict[str, Any]
    losses: np.ndarray
    """(n, 2): position, nats."""
    keys: Keys
    """Of the conditions that its times were taken under, where it has any."""
    is_fresh: bool
    """False where the store had all of it."""
    seconds: float = 0.0
    """That was measured for it just now."""
    worker: int | None = None
    """That measured, or would have measured, the last of it."""
    whole_sample: tuple[dict[str, Any], Measurement] | None = None
    """Of a sample: key and measurement by which its losses are kept as one."""


def strict_configuration(total: int) -> Configuration:
    """The reference: its losses at every token are what all others are compared with."""
    return Configuration("ring", strict_policy(total))


def strict(total: int) -> Plan[Evaluated]:
    """The reference's quality, with the distributions that others are compared with."""
    (done,) = yield [_reference(total)]
    return _of_quality(done)


def compared(what: Configuration, total: int) -> Plan[Evaluated]:
    """Protocol `fast`, with how far its predictions are from those of the reference at that total; not of a method that
    is sampled."""
    (done,) = yield [(yield from _compared(what, total))]
    return _of_quality(done)


def references(total: int, recomputed: int = 0) -> Plan[tuple[str, ...]]:
    """The entries with the distributions that policies are compared with: the reference's, and those of so many batches
    of re-computation's sample, as far as the store has them."""
    what = Configuration("recompute", EvictionPolicy(n_sink=0, window_size=total))
    reference, *parts = yield [_reference(total), *(batch(what, number) for number in range(recomputed))]
    return (reference.entry, *(part.entry for part in parts if part.measurement.has_arrays))


def quality(
    what: Configuration, text: TokenStream, size: SampleSize | None = None, progress: Progress | None = None
) -> Plan[Evaluated]:
    """Protocol `fast`. Of a method that is sampled, a sample that is grown to `size` (`LEAST_TOKENS`), what is stored
    included."""
    if sampled_losses(what.method) is None:
        (done,) = yield [Job("quality", what)]
        return _of_quality(done)
    return joined(what, (yield from sample(what, text, size or FixedSize(), progress)))


def _compared(what: Configuration, total: int | None, recomputed: int = 0) -> Plan[Job]:
    """The job of its quality, once that is measured which it is compared with."""
    if total is None:
        return Job("quality", what)
    if not recomputed and _is_reference(what, total):
        return _reference(total)
    return Job("quality", what, against=(yield from references(total, recomputed)))


def _reference(total: int) -> Job:
    return Job("quality", strict_configuration(total), keeps=True)


def _is_reference(what: Configuration, total: int) -> bool:
    """Whether it predicts what the reference does, whatever implements it: another library's implementation may, but in
    some dtypes not, and is asked for as itself."""
    try:
        return (
            what.quantization is None
            and method_named(what.method).approximate is None
            and what.effective == strict_policy(total)
        )
    except UsageError:  # its method can do nothing with the policy
        return False


def hits(what: Configuration) -> Plan[Measurement]:
    """The policy's losses at every token, and which tokens were the likeliest (n, 3: position, nats, 1 or 0)."""
    (done,) = yield [Job("hits", what)]
    measured: Measurement = done.measurement
    return measured


def sample(
    what: Configuration, text: TokenStream, size: SampleSize, progress: Progress | None = None
) -> Plan[list[Done]]:
    """Its parts, batch by batch, each kept as soon as it is there. What is stored counts whole."""
    parts: list[Done] = []
    is_stored = True
    for number in range(batches_of(what, text)):
        job = batch(what, number)
        if is_stored:
            (part,) = yield [replace(job, peek=True)]
            is_stored = part is not None
        if not is_stored:
            table = table_of(parts)
            if len(table) and size.reached(table):
                break
            if progress is not None:
                progress(len(table), max(size.expected(table), len(table) + 1))
            (part,) = yield [job]
        parts.append(part)
    if progress is not None:
        total = len(table_of(parts))
        progress(total, total)
    return parts


def batch(what: Configuration, number: int) -> Job:
    """A part of its sample; the first are where policies are compared with it."""
    return Job("quality", what, batch=number, keeps=number < MOST_POSITIONS // BATCH)


def batches_of(what: Configuration, text: TokenStream) -> int:
    """How many batches its whole sample has."""
    n_losses = len(text.tokens) - 1
    return 1 if n_losses <= what.policy.kept else -(-n_losses // BATCH)


def comparable_batches(tokens: int, total: int, text: TokenStream) -> int:
    """How many batches that policies can be compared with are in a sample of so many tokens, of re-computation by
    windows of `total`."""
    if len(text.tokens) - 1 <= total:
        return 1
    return min(-(-min(tokens, len(text.tokens) - 1) // BATCH), MOST_POSITIONS // BATCH)


def joined(what: Configuration, parts: Sequence[Done]) -> Evaluated:
    """The parts of a sample as one quality, under the name of as many losses."""
    table, first = table_of(parts), parts[0].measurement.record
    seconds = sum(part.measurement.record["quality_sec"] for part in parts)
    whole = Quality(table[:, 1], table[:, 0], first["peak_kv"], seconds, first.get("warning"))
    key = parts[-1].keys.of(Job("quality", what, tokens=len(table)))
    measurement = Measurement(whole.summary() | {"quality_entry": entry_name(key)}, table)
    return replace(_evaluated(parts, measurement), whole_sample=(key, measurement))


def keep_sample(store: MeasurementStore, evaluated: Evaluated) -> None:
    """Keeps the losses of a whole sample in one file too, as those of any other quality. Raises StoreError."""
    if evaluated.whole_sample is not None:
        key, measurement = evaluated.whole_sample
        if store.get(key) is None:
            store.put(key, measurement)


def grown(before: Evaluated, sample: Evaluated) -> Evaluated:
    """The same with a larger sample."""
    record = before.record | sample.record
    return replace(
        sample, record=record | {"measuring_sec": record["quality_sec"] + record["speed_sec"]}, keys=before.keys
    )


def fast(
    what: Configuration,
    text: TokenStream,
    run: int = 0,
    size: SampleSize | None = None,
    progress: Progress | None = None,
    total: int | None = None,
    recomputed: int = 0,
) -> Plan[Evaluated]:
    """Quality and speed by protocol `fast`; the speed is taken once per run. total: of the reference that its
    predictions are compared with, where they are; not of a method that is sampled. recomputed: and with those of
    re-computation at so many batches of its sample."""
    timing = Job("speed", what, run=run)
    if sampled_losses(what.method) is not None:
        known = yield from quality(what, text, size, progress)
        (speed,) = yield [timing]
        return with_speed(known, speed)
    of_quality, speed = yield [(yield from _compared(what, total, recomputed)), timing]
    return with_speed(_of_quality(of_quality), speed)


def fast_quality(what: Configuration, text: TokenStream, total: int, recomputed: int = 0) -> Plan[Evaluated]:
    """The quality that `fast` would find."""
    if sampled_losses(what.method) is not None:
        return (yield from quality(what, text))
    (done,) = yield [(yield from _compared(what, total, recomputed))]
    return _of_quality(done)


def with_speed(known: Evaluated, speed: Done) -> Evaluated:
    """Both halves."""
    return replace(
        known,
        record=fast_record(known.record, speed.measurement.record | {"speed_entry": speed.entry}),
        keys=speed.keys,
        is_fresh=known.is_fresh or speed.is_fresh,
        seconds=known.seconds + speed.seconds,
        worker=speed.worker,
    )


_MORE: dict[str, More] = {"ttft_ms": "first_token", "joules_per_token": "energy"}


def more_for(measures: Iterable[str]) -> list[More]:
    """The jobs besides quality and speed that these measures come from: they are measured where they are asked for."""
    return [_MORE[name] for name in dict.fromkeys(measures) if name in _MORE]


def with_more(plan: Plan[Evaluated], what: Configuration, kinds: Sequence[More]) -> Plan[Evaluated]:
    """What the plan finds out, and what such jobs do."""
    known = yield from plan
    if not kinds:
        return known
    done = yield [Job(kind, what) for kind in kinds]
    record = known.record
    for one in done:
        record = with_found(record, one.measurement.record)
    return replace(
        known,
        record=record,
        is_fresh=known.is_fresh or any(one.is_fresh for one in done),
        seconds=known.seconds + sum(one.seconds for one in done),
        worker=done[-1].worker,
    )


def with_found(record: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The record of both; of how it was timed (`timing`), what the speed's says."""
    return found | record | {"speed_sec": record["speed_sec"] + found["speed_sec"]}


def whole(
    protocol: str,
    what: Configuration,
    text: TokenStream,
    run: int = 0,
    size: SampleSize | None = None,
    progress: Progress | None = None,
    total: int | None = None,
    recomputed: int = 0,
) -> Plan[Evaluated]:
    """Quality and speed by any protocol; they come from the same run in all but `fast`. total, recomputed: see
    there."""
    if protocol == "fast":
        return (yield from fast(what, text, run, size, progress, total, recomputed))
    (done,) = yield [Job("whole", what, protocol, run)]
    return _evaluated([done], _named(done, "quality_entry", "speed_entry"))


def table_of(parts: Sequence[Done]) -> np.ndarray:
    """(n, 2): position, nats, of all of them, ascending."""
    known = [part.measurement.losses for part in parts if part.measurement.losses is not None]
    table = np.concatenate([np.empty((0, 2)), *known])
    return table[np.argsort(table[:, 0])]


def _of_quality(done: Done) -> Evaluated:
    return _evaluated([done], _named(done, "quality_entry"))


def _named(done: Done, *names: str) -> Measurement:
    """With its own name in the store, under these keys."""
    return replace(done.measurement, record=done.measurement.record | dict.fromkeys(names, done.entry))


def _evaluated(parts: Sequence[Done], measurement: Measurement) -> Evaluated:
    assert measurement.losses is not None
    return Evaluated(
        measurement.record,
        measurement.losses,
        parts[-1].keys,
        any(part.is_fresh for part in parts),
        sum(part.seconds for part in parts),
        parts[-1].worker,
    )
