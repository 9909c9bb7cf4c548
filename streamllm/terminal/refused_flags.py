"""Flags of the source documents' scripts that ask for what is not done here: each says why, and what to give instead.

Their other flags are options of ours. A value that asks for what is done anyway is taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError, shown


@dataclass(frozen=True, slots=True)
class RefusedFlag:
    name: str
    why: str
    """And what to do about it."""
    is_switch: bool = False
    """Whether it takes no value."""
    done_anyway: tuple[str, ...] = ()
    """Values that change nothing; of a switch, itself."""


_ONE_KERNEL = "one attention kernel is used throughout; give --attn-backend flash or math"
_STORE = "the baseline is found in the store, whoever measured it; give --store DIR, or --mode both to measure it"
_COPIES = "how a prune copies is the method's; --method ring copies nothing, leave it out"

OF_EVALUATIONS = (
    RefusedFlag("--text-column", "texts are read of a column 'text'; rename the column", done_anyway=("text",)),
    RefusedFlag(
        "--max-samples", "rows are not counted; --max-eval-tokens ends a text, --book N is one row, leave it out"
    ),
    RefusedFlag(
        "--trust-remote-code",
        "code that comes with a model or a data set is not run; leave it out",
        is_switch=True,
    ),
    RefusedFlag(
        "--max-length", "a cache, and the baseline's window, is --n-sink and --window-size together; leave it out"
    ),
    RefusedFlag("--stride", "every token is predicted once, in one stream, without strides; leave it out"),
    RefusedFlag(
        "--cache-implementation",
        "transformers' StaticCache evicts nothing; --method ring has static shapes, leave it out",
    ),
    RefusedFlag("--cache-backend", "the method is the cache; give --method ours or mit", done_anyway=("auto",)),
    RefusedFlag("--staging-buffers", _COPIES, is_switch=True),
    RefusedFlag("--no-staging-buffers", _COPIES, is_switch=True),
    RefusedFlag("--fp32-loss", "", is_switch=True, done_anyway=("--fp32-loss",)),
    RefusedFlag("--no-fp32-loss", "losses are float64, whatever the model's dtype; leave it out", is_switch=True),
    RefusedFlag("--baseline-results", _STORE),
    RefusedFlag("--fixed-baseline-dir", _STORE),
    RefusedFlag("--flash-prefill", _ONE_KERNEL),
    RefusedFlag("--flash-decode", _ONE_KERNEL),
    RefusedFlag("--flash-split", _ONE_KERNEL, is_switch=True),
)
"""Of `eval_streaming_llm.py`, `run_decode_perplexity.py` and `eval_kvpress.py`."""

OF_BASELINES = (
    RefusedFlag(
        "--no-skip-existing",
        "what is stored counts; give more --runs, or another --store DIR to measure all anew",
        is_switch=True,
    ),
)
"""Of `run_fixed_baseline.py`."""


def refuse_what_is_not_done(parser: argparse.ArgumentParser, flags: Sequence[RefusedFlag]) -> None:
    """Parsing raises UsageError for each of them. No help lists them."""
    for flag in flags:
        parser.add_argument(flag.name, action=_Refuse, flag=flag)


class _Refuse(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, flag: RefusedFlag) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, 0 if flag.is_switch else None, default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )  # fmt: skip
        self.flag = flag

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: object, option: str | None = None
    ) -> None:
        given = self.flag.name if self.flag.is_switch else str(value)
        if given not in self.flag.done_anyway:
            what = self.flag.name if self.flag.is_switch else f"{self.flag.name} {shown(given)}"
            raise UsageError(f"{what}: {self.flag.why}")
