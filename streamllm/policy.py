"""Which tokens stay in the KV cache, and where: the eviction policy and its schedule.

Visibility depends on the policy alone, never on the data. `Schedule` is the single source of that truth: the decode
loop runs it token by token, the block-parallel evaluator and the timing ask it for whole streams. No torch in here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from . import layer_budgets
from .errors import PolicyError as PolicyError
from .errors import shown

CapAccounting = Literal["nominal", "peak", "bytes"]
CAP_ACCOUNTINGS: tuple[CapAccounting, ...] = get_args(CapAccounting)
RefreshPosition = Literal["tail", "order"]
Positions = Literal["compact", "keep"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
KvDtype = Literal["auto", "float16", "bfloat16", "float8_e4m3"]
KV_DTYPES: tuple[KvDtype, ...] = get_args(KvDtype)


TOTAL_KV_CAP = 2048
"""Tokens that a cache holds where nobody says (the source documents' cap), unless the trained length is shorter."""
WORDS: dict[str, tuple[str, ...]] = {
    "positions": POSITIONS,
    "kv_dtype": KV_DTYPES,
    "layer_budgets": (layer_budgets.UNIFORM,),
}
"""Knobs of a policy that are no number, and their choices, the usual one first."""
FORMS = {"layer_budgets": layer_budgets.FORMS}
"""Of words that may be any of some form besides."""
_MOST = 2**24
"""Tokens: schedules are run token by token."""


ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1}
"""Of a number of each format."""
_BYTES_OF_A_KEY = 2
"""By accounting in bytes, of each of a counted key's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionPolicy:
    """StreamingLLM's attention sinks and window (Xiao et al. 2023), with lazy pruning and softlite eviction.

    After the forward pass of token t = 1, 2, ... the cache holds n tokens. If `compress_every` > 0 divides t and
    n > n_sink + window_size + cache_slack, pruning starts: the oldest tokens that are not sinks are evicted, at most
    `max_drop` after each token, until n_sink + window_size are left.

    Raises PolicyError for values out of range.
    """

    n_sink: int = 4
    """S: first tokens never evicted."""
    window_size: int = 252
    """W: most recent tokens kept by a prune."""
    compress_every: int = 1
    """R: a prune starts only when it divides the count of processed tokens; 0 = never evict."""
    cache_slack: int = 0
    """sigma: a prune starts only when the cache holds more than S + W + sigma."""
    max_drop: int = 0
    """delta: most tokens evicted after any one token; 0 = no limit."""
    positions: Positions = "compact"
    """What survives a prune is numbered 0 .. n-1 without gaps (compact, StreamingLLM's), or keeps the rotation of its
    position in the stream (keep). Rotary attention knows distances only: it is those to the sinks that differ."""
    kv_dtype: KvDtype = "auto"
    """The number format that keys and values are kept in between one token and the next; auto: the model's, which
    everything is computed in."""
    layer_budgets: str = layer_budgets.UNIFORM
    """How the total is shared out over layers (`layer_budgets`). S + W is the layers' mean then; each layer runs the
    schedule above with its own S and W, as if it were alone, and its positions are those in its own cache."""

    def __post_init__(self) -> None:
        for field in fields(EvictionPolicy):
            value, least = getattr(self, field.name), 1 if field.name == "window_size" else 0
            if field.name in WORDS:
                check_word(field.name, value)
            elif not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
                raise PolicyError(f"{field.name} {shown(value)}: must be a whole number from {least} to {_MOST:,}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> EvictionPolicy:
        """The policy of a row. Rows from before there was a choice do not say what they have."""
        counts = {field.name: values[field.name] for field in fields(EvictionPolicy) if field.name not in WORDS}
        return EvictionPolicy(**counts, **{name: values.get(name, choices[0]) for name, choices in WORDS.items()})

    def kept_bytes(self, computed: int, dtype: str) -> int:
        """The bytes that it keeps of keys and values that have `computed` bytes in the model's `dtype`."""
        if self.kv_dtype == "auto":
            return computed
        return computed * ITEM_BYTES[self.kv_dtype] // ITEM_BYTES[dtype]

    @property
    def keeps_positions(self) -> bool:
        return self.positions == "keep"

    @property
    def named(self) -> dict[str, Any]:
        """What names a measurement: all knobs, words only where they are not the usual ones, so that what was measured
        before there was a choice is found by the name it has."""
        return {name: value for name, value in asdict(self).items() if name not in WORDS or value != WORDS[name][0]}

    @property
    def canonical(self) -> EvictionPolicy:
        """The same function by its plainest name: without evictions a layer's budget means nothing; without sinks, or
        without evictions, no distance depends on `positions`; what a cache of another number format rounds may."""
        plain = self if self.compress_every else replace(self, layer_budgets=layer_budgets.UNIFORM)
        has_sinks = self.n_sink or not self.is_uniform  # a list may say so
        if (has_sinks and self.compress_every) or self.kv_dtype != "auto":
            return plain
        return replace(plain, positions="compact")

    @property
    def kept(self) -> int:
        """Tokens left by a finished prune: S + W; the layers' mean."""
        return self.n_sink + self.window_size

    @property
    def is_uniform(self) -> bool:
        """Whether it is the same in every layer."""
        return self.layer_budgets == layer_budgets.UNIFORM

    def of_layers(self, count: int) -> list[EvictionPolicy]:
        """What it is in each of so many layers. Raises PolicyError if it cannot be meant for as many."""
        if self.is_uniform:
            return [self] * count
        shares = layer_budgets.budgets(self.layer_budgets, count, self.n_sink, self.window_size)
        alike = replace(self, layer_budgets=layer_budgets.UNIFORM)
        return [replace(alike, n_sink=sinks, window_size=window).canonical for sinks, window in shares]

    def check_uniform(self, what: str) -> None:
        """Raises PolicyError, for what knows one schedule only."""
        if not self.is_uniform:
            raise PolicyError(
                f"layer_budgets {shown(self.layer_budgets)}: {what} knows one schedule for all layers; use uniform, or "
                f"evaluate"
            )


@dataclass(frozen=True, kw_only=True)
class RefreshPolicy(EvictionPolicy):
    """A prune leaves S + W + refresh_budget tokens: those behind sinks and window are not the next older ones, but
    spread over all that a prune ever passed by. Only method `refresh` knows which; counts are as in any policy."""

    refresh_budget: int
    """b: tokens put back."""
    refresh_position: RefreshPosition = "tail"
    """Where: behind the window (tail), or between sinks and window, in the order of the text (order)."""

    def __post_init__(self) -> None:
        EvictionPolicy.__post_init__(self)
        if self.refresh_budget < 1:
            raise PolicyError(f"refresh_budget {self.refresh_budget}: must be a whole number >= 1")

    @property
    def kept(self) -> int:
        return self.n_sink + self.window_size + self.refresh_budget


class Schedule:
    """Runs a policy token by token: call `after_token()` once per processed token, evict as many as it says."""

    def __init__(self, policy: EvictionPolicy) -> None:
        """policy: of one layer, or the same in all. Raises PolicyError for another."""
        policy.check_uniform("what is asked for")
        self.policy = policy
        self.seen = 0
        """t: tokens processed so far."""
        self.held = 0
        """n: tokens in the cache."""
        self.pruning = False

    def after_token(self) -> int:
        """Counts one processed token in and returns how many tokens to evict now."""
        policy = self.policy
        self.seen += 1
        self.held += 1
        due = policy.compress_every > 0 and self.seen % policy.compress_every == 0
        if due and self.held > policy.kept + policy.cache_slack:
            self.pruning = True
        if not self.pruning:
            return 0
        drop = self.held - policy.kept
        if policy.max_drop > 0:
            drop = min(drop, policy.max_drop)
        self.held -= drop
        self.pruning = self.held > policy.kept
        return drop

    @property
    def state(self) -> tuple[int, int, bool]:
        """Everything that the rest of the schedule depends on."""
        return self.seen % max(self.policy.compress_every, 1), self.held, self.pruning


def check_word(name: str, value: object) -> None:
    """Raises PolicyError for what is no choice, nor of the form, of a policy's word."""
    if value in WORDS[name]:
        return
    if name not in FORMS or not isinstance(value, str):
        raise PolicyError(f"{name} {shown(value)}: must be one of {FORMS.get(name) or ', '.join(WORDS[name])}")
    layer_budgets.check(value)


def strict_policy(total: int) -> EvictionPolicy:
    """StreamingLLM as it was published (Xiao et al. 2023, section 3.2): four sinks, pruned after every token; holds
    `total` tokens. What times and qualities are compared with."""
    n_sink = min(4, total - 1)
    return EvictionPolicy(n_sink=n_sink, window_size=total - n_sink)


def for_chunks(policy: EvictionPolicy, prefill: int) -> EvictionPolicy:
    """The policy of protocol `chunked`: "a prefill, then one compression" is a policy that prunes after just so many
    tokens."""
    return replace(policy, compress_every=prefill, cache_slack=0, max_drop=0)


def evicted_before(policy: EvictionPolicy, n_tokens: int) -> list[int]:
    """Element t: tokens evicted before query t (counted from 0), so that it attends to t + 1 - element t keys."""
    schedule = Schedule(policy)
    drops = (schedule.after_token() for _ in range(n_tokens - 1))
    return list(itertools.accumulate(drops, initial=0))[:n_tokens]


def prune_starts(policy: EvictionPolicy, n_tokens: int) -> list[int]:
    """Queries (counted from 0, ascending, below `n_tokens`) that are the first to see a prune: it began just before
    them. With `max_drop`, it may go on before the next ones."""
    schedule, starts = Schedule(policy), []
    for t in range(1, n_tokens):
        going_on = schedule.pruning
        if schedule.after_token() and not going_on:
            starts.append(t)
    return starts


def peak_kv(policy: EvictionPolicy, n_tokens: int, layers: Sequence[int] = (1,)) -> int:
    """Largest number of keys any of the first `n_tokens` queries attends to, its own included: `mean_keys` of them.
    layers: bytes, or other weights, of each."""
    weights: dict[EvictionPolicy, int] = {}
    for own, weight in zip(policy.of_layers(len(layers)), layers, strict=True):
        weights[own] = weights.get(own, 0) + weight
    evicted = zip(*(evicted_before(own, n_tokens) for own in weights), strict=True)
    return max(mean_keys([t + 1 - gone for gone in each], [*weights.values()]) for t, each in enumerate(evicted))


def mean_keys(keys: Sequence[int], layers: Sequence[int]) -> int:
    """The mean over layers by their bytes, as many keys as have the bytes that are held; rounded up."""
    return -(-sum(map(math.prod, zip(keys, layers, strict=True))) // sum(layers))


def longest_kv(policy: EvictionPolicy, n_tokens: int, n_layers: int) -> int:
    """Largest number of keys any of the first `n_tokens` queries attends to in any layer."""
    return max(peak_kv(own, n_tokens) for own in set(policy.of_layers(n_layers)))


@dataclass(frozen=True, slots=True)
class SteadyState:
    """The state that a full cache settles into: the same `cycle` tokens, prunes included, over and over."""

    start: int
    """Tokens processed when the first whole cycle begins."""
    cycle: int
    """Tokens in a cycle."""
    peak_kv: int
    """Largest number of keys attended to, from the first token on."""


def steady_state(policy: EvictionPolicy, n_layers: int = 1) -> SteadyState | None:
    """Where the policy's schedule becomes periodic, in all layers; None if it never evicts. `peak_kv` is that of the
    layer that has most."""
    states = [state for own in set(policy.of_layers(n_layers)) if (state := _steady_state(own)) is not None]
    if not states:
        return None
    start, cycle = max(state.start for state in states), math.lcm(*(state.cycle for state in states))
    return SteadyState(start, cycle, max(state.peak_kv for state in states))


def _steady_state(policy: EvictionPolicy) -> SteadyState | None:
    if policy.compress_every == 0:
        return None
    schedule, peak = Schedule(policy), 0
    first_seen: dict[tuple[int, int, bool], int] = {}
    for tokens in itertools.count():
        start = first_seen.setdefault(schedule.state, tokens)
        if start < tokens:
            return SteadyState(start, tokens - start, peak)
        peak = max(peak, schedule.held + 1)
        schedule.after_token()
    raise AssertionError("unreachable: a schedule is a finite automaton")


def peak_without_end(policy: EvictionPolicy) -> int | None:
    """Largest number of keys any query of an endless stream attends to; None if the policy never evicts."""
    steady = steady_state(policy)
    return None if steady is None else steady.peak_kv


def keys_in_16_bits(kv_dtype: str) -> int:
    """Keys of that format in the bytes of one whose numbers have 16 bits. Raises PolicyError for `auto`."""
    if kv_dtype == "auto":
        raise PolicyError(
            f"kv_dtype 'auto': has the model's bytes, whichever; to count a cache in bytes, "
            f"name one of {', '.join(KV_DTYPES[1:])}"
        )
    return _BYTES_OF_A_KEY // ITEM_BYTES[kv_dtype]


def with_derived_window(policy: EvictionPolicy, cap: int, accounting: CapAccounting = "nominal") -> EvictionPolicy:
    """The policy with the largest window the total-KV cap leaves; its own window is ignored.

    nominal: S + W + sigma <= cap (the source documents' Auto-cap).
    peak:    no query attends to more than `cap` keys, lazy growth and the query's own key included.
    bytes:   nominal, of as many keys as have the bytes of `cap` keys in 16 bits, by the policy's `kv_dtype`.

    With layers of several budgets, S + W is their mean, and given where they are listed: then it must not be above the
    cap.

    Raises PolicyError if no window of at least one token is left, by bytes for a format that is the model's, and by
    peak for layers of several budgets, which no one number of keys is the peak of.
    """
    if accounting == "bytes":
        cap *= keys_in_16_bits(policy.kv_dtype)
    least = policy.n_sink + policy.cache_slack + 1
    if cap < least:
        raise PolicyError(
            f"cap {cap}: below n_sink {policy.n_sink} + cache_slack {policy.cache_slack} + a window of 1; "
            f"raise the cap to at least {least} or lower n_sink or cache_slack"
        )
    widest = cap - policy.n_sink - policy.cache_slack
    if (mean := layer_budgets.mean_total(policy.layer_budgets)) is not None:
        if not 0 < mean - policy.n_sink <= widest:
            raise PolicyError(
                f"layer_budgets {shown(policy.layer_budgets)}: the mean of its totals is {mean}, must be "
                f"from {policy.n_sink + 1} to {widest + policy.n_sink}, the cap less cache_slack; list others"
            )
        widest = mean - policy.n_sink
    if accounting != "peak":
        return replace(policy, window_size=widest)
    policy.check_uniform("a cap by peak accounting")
    # Without pruning at all, or before the first prune, nothing fits; where a prune ends at once, the next is R later.
    interval = policy.compress_every
    if interval == 0 or interval > cap:
        widest = 0
    elif policy.max_drop == 0:
        widest = min(widest, cap - policy.n_sink - interval)
    for window in range(widest, 0, -1):
        candidate = replace(policy, window_size=window)
        state = steady_state(candidate)
        if state is not None and state.peak_kv <= cap:
            return candidate
    raise PolicyError(
        f"cap {cap} by peak accounting: pruning every {policy.compress_every} tokens with n_sink {policy.n_sink}, "
        f"cache_slack {policy.cache_slack}, max_drop {policy.max_drop} grows past it with any window; "
        f"raise the cap or lower compress_every (0 never prunes)"
    )
