"""How a policy's total is shared out over a model's layers: the words of `EvictionPolicy.layer_budgets`.

    uniform                    the same n_sink and window in every layer
    pyramid:PERCENT            windows fall by equal steps from layer to layer, the first that much longer than the
                               mean, the last that much shorter; with a minus they rise (PyramidKV, Cai et al. 2024)
    retrieval:WHERE:PERCENT    the layers WHERE hold what the others, with that much of the mean window, leave over
                               (by layers what DuoAttention, Xiao et al. 2024, does by heads). WHERE is a part of the
                               depth, 1/4 the first of four equal ones, or layers by number: 0,3
    T,T,...                    each layer's total, or S+W where its sinks are not n_sink: 300,300,4+96,0+60

All but the last can be meant for any number of layers. The mean over layers of sinks and windows is the policy's
n_sink + window_size, to the token; layers are counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .errors import PolicyError, shown

UNIFORM = "uniform"
FORMS = "uniform, pyramid:PERCENT (-99 to 99), retrieval:PART/PARTS:PERCENT, retrieval:LAYER,...:PERCENT (1 to 99), or \
each layer's total TOTAL,... (or SINKS+WINDOW)"
_PYRAMID = re.compile(r"pyramid:(-?[1-9]\d?)")
_PART = re.compile(r"retrieval:(\d{1,4})/(\d{1,4}):([1-9]\d?)")
_NUMBERED = re.compile(r"retrieval:(\d{1,4}(?:,\d{1,4})*):([1-9]\d?)")
_LISTED = re.compile(r"(?:\d{1,8}\+)?\d{1,8}(?:,(?:\d{1,8}\+)?\d{1,8})*")

Budget = tuple[int, int]
"""Of a layer: sinks S, window W."""


def check(word: str) -> None:
    """Raises PolicyError for what can be meant for no model."""
    part = _PART.fullmatch(word)
    if not any(form.fullmatch(word) for form in (_PYRAMID, _PART, _NUMBERED, _LISTED)) and word != UNIFORM:
        raise PolicyError(f"layer_budgets {shown(word)}: must be one of {FORMS}")
    if part and not 1 <= int(part[1]) <= int(part[2]) >= 2:
        raise PolicyError(
            f"layer_budgets {shown(word)}: there is no part {part[1]} of {part[2]}; say 1/2, 2/2, 1/3, ..."
        )
    if _LISTED.fullmatch(word):
        mean_total(word)


def mean_total(word: str) -> int | None:
    """The mean of the layers' totals where the word lists them. Raises PolicyError if it is no whole number."""
    if not _LISTED.fullmatch(word):
        return None
    totals = [sinks + window for sinks, window in _listed(word, n_sink=0)]
    mean, left = divmod(sum(totals), len(totals))
    if left:
        raise PolicyError(
            f"layer_budgets {shown(word)}: the mean of its {len(totals)} totals, {mean + left / len(totals):g}, must "
            f"be a whole number; take {left} off one of them"
        )
    return mean


def budgets(word: str, n_layers: int, n_sink: int, window: int) -> list[Budget]:
    """Of each layer. n_sink, window: of the mean. Raises PolicyError where the model has other layers, or one would be
    left no window."""
    if pyramid := _PYRAMID.fullmatch(word):
        windows = _falling(n_layers, window, int(pyramid[1]))
    elif retrieval := _PART.fullmatch(word) or _NUMBERED.fullmatch(word):
        windows = _split(_long_layers(word, n_layers), n_layers, window, int(retrieval[retrieval.lastindex or 0]))
    elif word == UNIFORM:
        windows = [window] * n_layers
    else:
        found = _listed(word, n_sink)
        if len(found) != n_layers:
            raise PolicyError(f"layer_budgets {shown(word)}: has {len(found)} totals; the model has {n_layers} layers")
        if (mean := mean_total(word)) != n_sink + window:
            raise PolicyError(
                f"layer_budgets {shown(word)}: the mean of its totals is {mean}, n_sink {n_sink} + window_size "
                f"{window} is {n_sink + window}; leave out window_size, or give {mean - n_sink if mean else 1}"
            )
        return _checked(word, found)
    return _checked(word, [(n_sink, own) for own in windows])


def _checked(word: str, found: list[Budget]) -> list[Budget]:
    for layer, (sinks, own) in enumerate(found):
        if own < 1:
            raise PolicyError(
                f"layer_budgets {shown(word)}: leaves layer {layer} a window of {own} behind {sinks} sinks, at least 1 "
                f"is needed; raise the total, or shift less"
            )
    return found


def _falling(n_layers: int, window: int, percent: int) -> list[int]:
    """What a layer has more than the mean, the one as far from the other end has less: the sum is exact."""
    steps = max(n_layers - 1, 1)
    more = [round(window * percent * (steps - 2 * layer) / (100 * steps)) for layer in range(n_layers // 2)]
    middle = [0] * (n_layers % 2)
    return [window + shift for shift in (*more, *middle, *(-shift for shift in reversed(more)))]


def _split(long: Sequence[int], n_layers: int, window: int, percent: int) -> list[int]:
    short = max(round(window * percent / 100), 1)
    each, left = divmod(n_layers * window - (n_layers - len(long)) * short, len(long))
    windows = [short] * n_layers
    for place, layer in enumerate(long):
        windows[layer] = each + (place < left)
    return windows


def _long_layers(word: str, n_layers: int) -> list[int]:
    """Ascending."""
    if part := _PART.fullmatch(word):
        number, parts = int(part[1]), int(part[2])
        long = [layer for layer in range(n_layers) if layer * parts // n_layers == number - 1]
    else:
        long = sorted({int(layer) for layer in word.split(":")[1].split(",")})
    if not long or long[-1] >= n_layers or len(long) == n_layers:
        raise PolicyError(
            f"layer_budgets {shown(word)}: of the model's {n_layers} layers, 0 to {n_layers - 1}, some must be meant, "
            f"and not all"
        )
    return long


def _listed(word: str, n_sink: int) -> list[Budget]:
    found = []
    for entry in word.split(","):
        sinks, plus, rest = entry.partition("+")
        found.append((int(sinks), int(rest)) if plus else (n_sink, int(entry) - n_sink))
    return found
