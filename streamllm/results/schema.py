"""The schema: every knob and every measure, defined once, and the record that has them.

Command-line options, search spaces, table columns, axis labels, MLflow's params, metrics and tags, and the report are
made of these fields. A new measure is a line in `Row`, and the place that computes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Self

from ..errors import UsageError
from ..files import Json
from .field import Direction, Field, fact, measure, tokens, word


class NewerFormatError(UsageError):
    """A row of a later version's format: nothing is wrong with it, but it cannot be read."""


FORMAT = 4
"""Version of the rows' own format. 1: times were no ratios; 2: rows could have any keys; 3: of protocol `fast`,
`measuring_sec` was called `runtime_sec`."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Row(Mapping[str, Any]):
    """One measured configuration, flat, as a line of `trials.jsonl` or an object of an evaluation's JSON has it.

    What it lacks is None as an attribute, and missing as a key. Ends of intervals are keys alone."""

    # Facts about what was measured.
    trial: int | str | None = fact("#", mlflow="tag")
    state: str | None = fact("state", words=True, mlflow="tag", about="complete or failed")
    cell: str | None = fact("cell", words=True, mlflow="tag", about="of a matrix: the name of its file")
    model: str | None = fact("model", words=True, mlflow="tag")
    model_digest: str | None = fact(mlflow="tag")
    weights: str | None = fact(about="how a GGUF file had quantised them")
    dataset: str | None = fact("data set", words=True, mlflow="tag", viewed=True)
    text_digest: str | None = fact(mlflow="tag")
    n_tokens: int | None = fact("text", unit="tokens")
    bos: bool | None = fact(about="whether a BOS is the text's first token")
    protocol: str | None = fact("protocol", words=True, mlflow="tag")
    dtype: str | None = fact("dtype", words=True, mlflow="tag")
    version: str | None = fact(mlflow="tag", about="of streamllm")
    exactness: str | None = fact(
        "exactness",
        words=True,
        mlflow="tag",
        about="of a method by another library: exact, the policy's function to rounding; or approximate, and why",
    )

    # Knobs.
    method: str | None = word("method", "ours", viewed=True)
    backend: str | None = fact("backend", words=True, label="backend", mlflow="tag", tag="backend.used", viewed=True,
                                about="the attention kernel that ran")  # fmt: skip
    backend_requested: str | None = fact(
        "backend asked for",
        words=True,
        mlflow="tag",
        tag="backend.requested",
        knob=True,
        parameter="attn_backend",
        usual="auto",
    )
    execution: str | None = word("execution", "eager")
    quantization: str | None = word("quantization", "none")
    total_kv: int | None = tokens("total KV", "", 1, None, "total KV S + W + σ, tokens", "sinks, window, slack",
                                   mlflow=None, viewed=False)  # fmt: skip
    n_sink: int | None = tokens("sinks", "S", 0, 4, "sinks S, tokens", "first tokens never evicted")
    window_size: int | None = tokens("window", "W", 1, None, "window W, tokens", "recent tokens kept by a prune")
    compress_every: int | None = tokens("prune every", "R", 0, 1, "pruned every R tokens",
                                         "prune only when R divides the token count; 0: never")  # fmt: skip
    cache_slack: int | None = tokens("slack", "σ", 0, 0, "slack σ, tokens", "prune only above S + W + slack tokens",
                                      short="slack")  # fmt: skip
    max_drop: int | None = tokens("max drop", "δ", 0, 0, "max drop δ, tokens (0: no limit)",
                                   "evict at most so many tokens at a time; 0: no limit", short="drop")  # fmt: skip
    positions: str | None = word(
        "positions",
        "compact",
        about="compact: a prune numbers what is left anew, without gaps; keep: it leaves positions",
        of_policy=True,
    )
    kv_dtype: str | None = word(
        "cache", "auto", about="number format that the cache is kept in; auto: the model's", of_policy=True
    )
    layer_budgets: str | None = word(
        "layer budgets", "uniform", about="how layers share the total: pyramid:50, retrieval:1/4:50, 300,300,...",
        of_policy=True,
    )  # fmt: skip
    refresh_budget: int | None = fact(about="tokens that method refresh puts back")
    refresh_position: str | None = fact()
    overlap: int | None = fact()
    same_policy_as: str | None = fact()

    # Where.
    device: str | None = fact("device", words=True, mlflow="tag", viewed=True)
    threads: int | None = fact("threads", about="of a CPU")
    cpu_capability: str | None = fact(about="torch's CPU kernels")
    software: str | None = fact("software", words=True, mlflow="tag", about="versions that a time depends on")
    worker: int | None = fact(mlflow="tag")
    host: str | None = fact(words=True, mlflow="tag", about="where the worker is; none where all was in the store")
    foreign_processes: str | None = fact(
        words=True, mlflow="tag", about="others on the accelerator, just after the timing"
    )

    # Speed.
    tpot_ms: float | None = measure("ms/token", interval=True, final=True, label="time per output token, ms",
                                     objective="minimize", told="time_ratio", viewed=True)  # fmt: skip
    speedup: float | None = measure("speedup", "×", 1, interval=True, final=True, viewed=True,
                                     label="speedup over re-computation, ×", objective="maximize")  # fmt: skip
    time_ratio: float | None = measure("time / strict's", interval=True, final=True, decimals=3,
                                        about="time per token over strict StreamingLLM's, timed in turn")  # fmt: skip
    measured_tpot_ms: float | None = measure(
        "measured ms/token", interval=True, final=True, about="by the clock, in that minute"
    )
    reference_tpot_ms: float | None = measure("strict's ms/token", final=True, about="by the clock, in that minute")
    decode_toks_per_sec: float | None = measure(
        "decoding", "tokens/s", 1, final=True, label="decoding, tokens per second"
    )
    runtime_sec: float | None = measure(
        "runtime", "s", label="runtime over the whole text, s", about="of decoding the text, or of a chunk"
    )
    measuring_sec: float | None = measure("measuring", "s", 1, about="that protocol fast took, all in all")
    runtime_change_percent: float | None = measure("runtime change %", "", 1)
    decode_sec: float | None = measure("total time", "s")
    prefill_sec: float | None = measure("prefill", "s", 3)
    first_token_latency_sec: float | None = measure("first token", "s", 3, label="first token latency, s")
    ttft_ms: float | None = measure("TTFT", "ms", interval=True, final=True, label="time to first token, ms",
                                     objective="minimize", told="ttft_ratio",
                                     about="an empty cache takes in a prompt as long as the total KV")  # fmt: skip
    ttft_ratio: float | None = measure("TTFT / strict's", decimals=3, interval=True,
                                        about="time to first token over strict StreamingLLM's, in turn")  # fmt: skip
    measured_ttft_ms: float | None = measure("measured TTFT", "ms", interval=True)
    reference_ttft_ms: float | None = measure("strict's TTFT", "ms")
    ttft_prompt_tokens: int | None = fact(about="of the prompt whose first token was waited for")
    joules_per_token: float | None = measure("J/token", decimals=3, interval=True, final=True,
                                              label="energy per output token, J", objective="minimize",
                                              told="energy_ratio", about="by the device's counter")  # fmt: skip
    energy_ratio: float | None = measure("energy / strict's", decimals=3, interval=True,
                                          about="joules per token over strict StreamingLLM's, in turn")  # fmt: skip
    measured_joules_per_token: float | None = measure("measured J/token", decimals=3, interval=True)
    reference_joules_per_token: float | None = measure("strict's J/token", decimals=3)
    energy_segment_sec: float | None = measure("shortest segment of energy", "s", 1)
    energy_of: str | None = fact("energy of", words=True, mlflow="tag", about="what the counter counts")
    avg_attn_ms: float | None = measure("attention", "ms/token", label="attention per token, ms")
    bytes_per_token: int | None = fact(about="read for a token: weights and cache")
    bandwidth_utilization: float | None = measure("share of bandwidth", decimals=2)
    load: float | None = measure(
        "load", decimals=1, about="processes that ran or waited for a core, in the minute before"
    )
    pairs: int | None = fact(about="segments that were timed in turn with the reference's")
    timed_at: float | None = fact(about="seconds since 1970")
    timing: str | None = fact(
        "timed", words=True, mlflow="tag", about="exclusive: no other of its node was timed meanwhile; or concurrent"
    )
    tokens_per_segment: int | None = fact()
    warmup_tokens: int | None = fact()
    speed_sec: float | None = measure("timing", "s", 1, about="that the timing took")
    speed_entry: str | None = fact(about="name of the store's entry with the times; of several runs, each")
    reference_total: int | None = fact(about="total KV of strict StreamingLLM beside it")
    reference_digest: str | None = fact(about="its weights, where they are others")
    reference_execution: str | None = fact(words=True, about="how its steps were run, where that is not eagerly")

    # Confirmed.
    rounds: int | None = measure("rounds", decimals=None, final=True, of_study=True, viewed=True)
    front_probability: float | None = measure("P(front)", short="P", final=True, of_study=True, viewed=True)
    round_lines: Sequence[int] | None = fact(about="lines of rounds.jsonl that count")
    not_told_from: Sequence[int] | None = fact(about="trials that it is better than in no objective for certain")

    # Quality.
    perplexity: float | None = measure("PPL", label="perplexity", objective="minimize", viewed=True)
    ppl_vs_strict_percent: float | None = measure(
        "PPL vs strict %", decimals=1, interval=True, label="perplexity increase over strict StreamingLLM, %",
        objective="minimize", viewed=True,
    )  # fmt: skip
    ppl_increase_percent: float | None = measure(
        "PPL increase %", decimals=1, interval=True, label="perplexity increase over re-computation, %",
        objective="minimize", told="ppl_vs_strict_percent", final=True,
    )  # fmt: skip
    kl: float | None = measure(
        "KL", "nats", 4, interval=True, label="KL from strict StreamingLLM, nats", objective="minimize", viewed=True,
        about="KL(strict StreamingLLM || policy), the mean over fixed positions",
    )  # fmt: skip
    kl_p99: float | None = measure("KL p99", "nats", 3, interval=True, objective="minimize",
                                    label="KL from strict StreamingLLM, 99th percentile, nats")  # fmt: skip
    same_top_percent: float | None = measure("same top", "%", 1, interval=True, objective="maximize",
                                              label="same most probable token as strict StreamingLLM, %")  # fmt: skip
    dp_rms_percent: float | None = measure("RMS Δp", "%", 2, interval=True, objective="minimize",
                                            label="RMS change of the true token's probability, %")  # fmt: skip
    kl_positions: int | None = fact(about="at which predictions were compared with strict StreamingLLM's")
    kl_vs_recompute: float | None = measure(
        "KL vs re-computation", "nats", 4, interval=True, label="KL from re-computation, nats", objective="minimize",
        about="KL(re-computation || policy), the mean over positions of its sample",
    )  # fmt: skip
    kl_vs_recompute_p99: float | None = measure("KL vs re-computation p99", "nats", 3, interval=True)
    same_top_vs_recompute_percent: float | None = measure(
        "same top as re-computation", "%", 1, interval=True, objective="maximize",
        label="same most probable token as re-computation, %",
    )  # fmt: skip
    dp_rms_vs_recompute_percent: float | None = measure("RMS Δp vs re-computation", "%", 2, interval=True)
    kl_vs_recompute_positions: int | None = fact(about="at which predictions were compared with re-computation's")
    evaluated_tokens: int | None = measure("evaluated", "tokens", None)
    sampled_tokens: int | None = fact(about="tokens that a sampled method was evaluated at")
    quality_sec: float | None = measure("evaluating", "s", 1, about="that the losses took")
    quality_entry: str | None = fact(about="name of the store's entry with the losses")
    chunks: int | None = fact()
    prefill_tokens: int | None = fact()
    continuation_tokens: int | None = fact()

    # Memory.
    peak_kv: int | None = measure("peak KV", "tokens", None, short="KV", label="largest number of keys attended to",
                                   objective="minimize", viewed=True, about="layers' mean, by bytes")  # fmt: skip
    peak_memory_mb: float | None = measure("peak memory", "MiB", 0, label="peak memory, MiB", objective="minimize")
    kv_bytes_per_token: int | None = measure(
        "KV per token", "bytes", None, label="keys and values of a token in all layers, bytes"
    )
    peak_kv_mib: float | None = measure(
        "KV cache", "MiB", label="keys and values held at most, MiB", objective="minimize",
        about="as the method keeps them; in bytes, models and dtypes compare",
    )  # fmt: skip

    # The outcome of the measurement.
    feasible: bool | None = fact(mlflow="tag", viewed=True)
    violated: str | None = fact("violated", words=True)
    reason: str | None = fact("reason", words=True, mlflow="tag", viewed=True)
    warning: str | None = fact("warning", words=True, mlflow="tag")
    reused: bool | None = fact(about="whether all of it was in the store")
    runs: int | None = fact(about="that were averaged")
    finished_at: float | None = fact(about="seconds since 1970")
    commit: str | None = fact(mlflow="tag")

    ends: dict[str, object] = dataclasses.field(default_factory=dict)
    """`NAME_low`, `NAME_high`, and of several runs `NAME_std`; and scores of tasks, by their own names (`is_score`)."""

    def __getitem__(self, key: str) -> Any:
        value = getattr(self, key) if key in FIELDS else self.ends.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in FIELDS if getattr(self, name) is not None)
        yield from self.ends

    def __repr__(self) -> str:
        return f"Row.of({dict(self)})"

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __or__(self, values: Mapping[str, object]) -> Row:
        """The row with these values; None takes one away. Raises ValueError for keys that are none of a row's."""
        fields, ends = _sorted(values)
        return self._with(fields, self.ends | ends)

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, Row) else super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def _with(self, fields: Mapping[str, object], ends: Mapping[str, object]) -> Self:
        """A copy with other fields; `dataclasses.replace` would set each of eighty anew."""
        copied = copy(self)
        vars(copied).update(fields, ends={key: end for key, end in ends.items() if end is not None})
        return copied

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Row:
        """Raises ValueError for keys that are none of a row's."""
        fields, ends = _sorted(values)
        return _EMPTY._with(fields, ends)

    @classmethod
    def from_json(cls, values: Mapping[str, object], where: str) -> Row:
        """`where`: for the message. Raises UsageError for a row of a later version, or with keys that are none of a
        row's. Older rows might have any: those that mean nothing any more are left out."""
        try:
            return cls.checked(values)
        except NewerFormatError as error:
            raise NewerFormatError(f"{where}: {error}") from None
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None

    @classmethod
    def checked(cls, values: object) -> Row:
        """A row from what JSON says. Raises NewerFormatError; ValueError for all that is no row."""
        if not isinstance(values, dict):
            raise ValueError("not a row")
        written = values.get("format", 2)
        values = {key: value for key, value in values.items() if key != "format"}
        if not isinstance(written, int) or written > FORMAT:
            told = f"has rows of format {written}, this version reads {FORMAT}; use a newer one"
            raise NewerFormatError(told) if isinstance(written, int) else ValueError(told)
        if written < FORMAT:
            values = {key: value for key, value in renamed(values).items() if written > 2 or _is_key(key)}
        row = cls.of(values)
        for key, value in values.items():
            if value is not None and not _check_of(key)(value):
                raise ValueError(f"{key} {value!r:.40}: no such value is possible")
        return row

    def to_json(self) -> dict[str, Json]:
        return {"format": FORMAT, **self}


_EMPTY = Row()


def renamed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """An older row's values under today's names: protocol `fast` decodes no whole text, and what it called its
    runtime is what measuring took."""
    if values.get("protocol") != "fast":
        return values
    return {key.replace("runtime_sec", "measuring_sec"): value for key, value in values.items()}


def _named(field: Field, name: str) -> Field:
    return replace(field, name=name, parameter=field.parameter or name)


AnyRow = Mapping[str, Any]
"""A row, or one with what a table adds to it."""


class _Fields(dict[str, Field]):
    """Those that every row may have; that of a task's score, of which there are any number, is made when it is asked
    for."""

    def __missing__(self, name: str) -> Field:
        if not is_score(name):
            raise KeyError(name)
        header = name.removeprefix(SCORE).replace("/", " ")
        direction: Direction = "minimize" if any(word in name for word in _LESS) else "maximize"
        return Field(name=name, header=header, label=header, decimals=3, objective=direction, mlflow="metric")


SCORE = "task/"
"""What the name of a task's score begins with: `task/NAME/METRIC`, of a filtered one `task/NAME/METRIC/FILTER`."""
STDERR = "_stderr"
"""What its standard error's name ends in."""
_LESS = ("perplexity", "bits_per_byte", "brier", "/ter", "/wer", "loss")
"""Parts of the names of the harness' metrics of which less is better."""


def is_score(name: str) -> bool:
    """Whether it names a task's score, not its standard error."""
    return name.startswith(SCORE) and name.count("/") in (2, 3) and not name.endswith(STDERR)


FIELDS: dict[str, Field] = _Fields(
    {
        field.name: _named(field.metadata["field"], field.name)
        for field in dataclasses.fields(Row)
        if "field" in field.metadata
    }
)
KNOBS = tuple(field for field in FIELDS.values() if field.knob)
POLICY_KNOBS = tuple(field for field in KNOBS if field.symbol)
"""The numbers of tokens of an `EvictionPolicy`, which rows have."""
POLICY_WORDS = tuple(field for field in KNOBS if field.of_policy)
"""Its words, which rows may not say: `words_of`."""


class _Objectives(dict[str, Direction]):
    def __missing__(self, name: str) -> Direction:
        direction = FIELDS[name].objective
        if direction is None:
            raise KeyError(name)
        return direction


OBJECTIVES: dict[str, Direction] = _Objectives(
    {field.name: field.objective for field in FIELDS.values() if field.objective}
)
"""Measures that a sweep can optimise, and which way; constraints are on the same measures. Scores of tasks, which are
not among the names here, are too."""
_TYPES = {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(Row)}
ENDS = ("_low", "_high", "_std")


def told_name(objective: str) -> str:
    """The name of the measure that a search is told instead of the objective."""
    return FIELDS[objective].told or objective


def words_of(row: AnyRow) -> dict[str, str]:
    """The words of its policy; of rows from before they could be chosen, the usual ones."""
    return {field.name: str(row.get(field.name) or field.usual) for field in POLICY_WORDS}


def unusual_words(row: AnyRow) -> list[str]:
    """`positions=keep`, `kv_dtype=float16`: those of its policy that are not the usual ones."""
    return [f"{name}={value}" for name, value in words_of(row).items() if value != FIELDS[name].usual]


def can_be_objective(name: str) -> bool:
    return name in OBJECTIVES or is_score(name)


def knobs_in_short(row: AnyRow, symbols: bool = False) -> str:
    """`S=4 W=252 R=1 slack=0 drop=0`, of those that it has, and the policy's words where they are unusual."""
    named = [(field.symbol if symbols else field.short, row.get(field.name)) for field in POLICY_KNOBS]
    return " ".join([*(f"{letter}={value}" for letter, value in named if value is not None), *unusual_words(row)])


def number(row: AnyRow, name: str) -> float | None:
    """The value; None if there is none, or none that is finite."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def dtype_of(key: str) -> str:
    """The dtype of a column of such values in pandas, which may be missing. Lists, and numbers beside words, are
    objects."""
    if key not in FIELDS:
        return "Float64"
    kinds = {"int": "Int64", "float": "Float64", "str": "string", "bool": "boolean"}
    return kinds.get(_TYPES[key], "object")


def _sorted(values: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Fields, and ends of intervals. Raises ValueError."""
    fields = {key: value for key, value in values.items() if key in FIELDS}
    ends = {key: value for key, value in values.items() if key not in FIELDS}
    if unknown := [key for key in ends if not _is_key(key)]:
        raise ValueError(f"key {unknown[0]!r}: no knob, measure or fact of a row")
    return fields, ends


def _is_key(key: str) -> bool:
    if key in FIELDS or is_score(key.removesuffix(STDERR)):
        return True
    return any(key.endswith(end) and key.removesuffix(end) in FIELDS for end in ENDS)


_POSITIVE = (
    *("time_ratio", "tpot_ms", "measured_tpot_ms", "reference_tpot_ms", "speedup", "perplexity"),
    *("ttft_ratio", "ttft_ms", "measured_ttft_ms", "reference_ttft_ms"),
    *("energy_ratio", "joules_per_token", "measured_joules_per_token", "reference_joules_per_token"),
)
_DATES = ("finished_at", "timed_at")
_LARGEST = 1 << 62
"""Of numbers; one over it is the least of those that are above 0."""


@cache
def _check_of(key: str) -> Callable[[object], bool]:
    """Tells whether a row can have a value there; NaN and infinity are what a failed measurement may come to."""
    name = next((key.removesuffix(end) for end in ENDS if key not in FIELDS and key.endswith(end)), key)
    kind = "float" if name != key or key.startswith(SCORE) else _TYPES[key]
    if name in _DATES:
        return is_date
    if kind == "float":
        return _is_positive if name in _POSITIVE and not key.endswith("_std") else _is_number
    if kind == "int":
        return partial(_is_whole, least=FIELDS[key].least or 0)
    return {"bool": _is_truth, "str": _is_text, "int | str": _is_name}.get(kind, _are_whole)


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and not _LARGEST < abs(value) < math.inf  # type: ignore[arg-type]


def _is_positive(value: object) -> bool:
    return _is_number(value) and not value < 1 / _LARGEST  # type: ignore[operator]


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _is_name(value: object) -> bool:
    return _is_whole(value) or _is_text(value)


def _are_whole(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def is_date(value: object) -> bool:
    """Whether it is a number of seconds since 1970, in the next centuries."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 34


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _is_text(value: object) -> bool:
    return isinstance(value, str)
