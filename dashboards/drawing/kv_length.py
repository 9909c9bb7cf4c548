"""How many keys a query attends to while a text goes on: of the front's policies, and of nothing but them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from streamllm.configuration import Configuration
from streamllm.policy import WORDS, EvictionPolicy, evicted_before
from streamllm.results.schema import knobs_in_short
from streamllm.results.study import StudyResults

from .style import CYCLE, NoDataError, grid, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = 5
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def kv_length(study: StudyResults) -> Figure:
    """Raises NoDataError for an empty front."""
    evicting = [Configuration.of_row(row).policy for row in study.front if row["compress_every"] > 0]
    usual: dict[str, Any] = {
        name: choices[0] for name, choices in WORDS.items()
    }  # which lengths do not show, or not their mean
    policies = list(dict.fromkeys(replace(policy, **usual) for policy in evicting))[:_LINES]
    if not policies:
        raise NoDataError("no policy on the front ever evicts")
    cap = study.configuration["cap"]
    cycle = max(p.compress_every for p in policies)
    filled = max(p.kept + p.cache_slack for p in policies) + 2 * cycle
    n_tokens = filled + max(3 * cycle, 64)
    figure = new_figure(8.4, 3.4, panels=2)
    whole, steady = figure.subplots(*grid(2))
    for policy, color, dashes in zip(policies, CYCLE, _DASHES, strict=False):
        tokens, keys = keys_attended(policy, n_tokens)
        how = {"color": color, "linestyle": dashes, "linewidth": 1.3}
        whole.plot(tokens, keys, label=knobs_in_short(asdict(policy), symbols=True), **how)
        steady.plot(tokens[filled:], keys[filled:], **how)
    for axes in (whole, steady):
        axes.axhline(cap, color="0.4", linewidth=0.8)
        axes.set_xlabel("token of the text")
    whole.annotate(f"total KV {cap}", (0, cap), (2, 2), textcoords="offset points", fontsize=7, color="0.3")
    whole.set_ylim(bottom=0)
    whole.set_title("keys that a token's query attends to")
    steady.set_title("the same when the cache is full")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=grid(2)[1])
    return figure


def keys_attended(policy: EvictionPolicy, n_tokens: int) -> tuple[range, list[int]]:
    """Tokens from 1, and the keys that each query attends to, its own included."""
    return range(1, n_tokens + 1), [t + 1 - gone for t, gone in enumerate(evicted_before(policy, n_tokens))]
