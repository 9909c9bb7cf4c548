"""What becomes of every causal architecture that transformers knows, at both doors, and by how much the gates decide.

python -m tests.benchmarks.architectures [--dtype float32] [ARCHITECTURE ...] [--json FILE]

Tiny random models of standard deviation 2 / sqrt(inputs). `layer`: the largest relative difference of what a layer
makes of its keys, queries and outputs in float32 to what it should, 1e-4 allowed.
`noise`: the whole model's difference by our attention, over what its own noise allows. `ours`, `ring`, `ring_far` (a
million tokens after its sinks), `generate` (a StreamingCache), `generate_far` (from position a million on): the mean
difference of log probabilities over 48 tokens of a policy that keeps 15, to plain forward passes of the model itself,
in float32, over the tokens that survive; `own`: that of such passes in the model's dtype.

`tests/test_every_architecture.py` holds this table to what it says: the popular ones always, all if it is asked to.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from streamllm.configuration import Configuration
from streamllm.engine import architecture
from streamllm.engine import loading as models
from streamllm.engine.decoder import make_decoder
from streamllm.engine.generation import StreamingCache
from streamllm.errors import UnsupportedModelError
from streamllm.policy import EvictionPolicy
from tests.plain import streamed_each, surviving_logits
from tests.zoo import ARCHITECTURES, random_model

from .reporting import markdown_table


def measure(name: str, dtype: torch.dtype) -> dict[str, Any]:
    try:
        model = random_model(name, dtype)
    except Exception as error:  # configurations that do not shrink, packages that are not there
        return {"architecture": name, "engine": f"not made: {type(error).__name__}"}
    layer, noise = _recorded_layers(), _recorded_noise()
    with layer[0], noise[0]:
        engine = verdict(lambda: models.prepare(model, name, ""))
    cache = verdict(lambda: StreamingCache(random_model(name, dtype), 4, 24))
    row = {"architecture": name, "engine": engine, "layer": max(layer[1], default=math.nan)}
    row |= {"noise": max(noise[1], default=math.nan), "cache": cache}
    return row | differences_of_policies(name, dtype, engine == "accepted", cache == "accepted")


def error_in(row: dict[str, Any]) -> str | None:
    """What of a row must not be: what is accepted is the model itself, as far as its dtype can tell."""
    for door in ("engine", "cache"):
        if row.get(door, "").startswith("ERROR"):
            return f"{door}: {row[door]}"
    allowed = 1e-3 + _TIMES_ITS_OWN * row.get("own", 0.0)
    for way in ("ours", "ring", "ring_far", "generate", "generate_far"):
        if not row.get(way, 0.0) <= allowed:
            return f"{way}: {row[way]:.2g} nats off on average ({allowed:.2g} allowed)"
    return None


_TIMES_ITS_OWN = 3
_SINKS, _WINDOW, _FAR = 4, 11, 1_000_000


def verdict(make: Callable[[], Any]) -> str:
    try:
        make()
    except UnsupportedModelError as error:
        return f"refused: {error}"
    except Exception as error:  # what must not be
        return f"ERROR: {type(error).__name__}: {error}"
    return "accepted"


def _recorded_layers() -> tuple[Any, list[float]]:
    """Of a layer's rotations, one of which is its own, that which comes closest."""
    found: list[float] = []
    tried: list[float] = []
    alike, failure, choice = architecture._alike, architecture._failure, architecture._rotary_of
    check = architecture.checked_layers

    def recorded(one: torch.Tensor, other: torch.Tensor) -> bool:
        if one.shape == other.shape:
            found.append(float((one - other).norm() / other.norm()))
        return alike(one, other)

    def failing(*arguments: Any) -> Any:
        before = len(found)
        reason = failure(*arguments)
        if reason is not None:
            tried.append(max(found[before:]))
            del found[before:]
        return reason

    def chosen(*arguments: Any) -> Any:
        tried.clear()
        try:
            return choice(*arguments)
        except UnsupportedModelError:
            found.append(min(tried))
            raise

    def checked(*arguments: Any, **options: Any) -> Any:
        found.clear()  # of what was tried before
        return check(*arguments, **options)

    changed = {"_alike": recorded, "_failure": failing, "_rotary_of": chosen}
    return patch.multiple(architecture, checked_layers=checked, **changed), found


def _recorded_noise() -> tuple[Any, list[float]]:
    found: list[float] = []
    check = models._check_logits

    def recorded(loaded: Any, tokens: Any, expected: Any, noise: float) -> None:
        limit = architecture.allowed(expected, noise)
        found.extend(
            architecture.difference(logits, expected) / limit for _, logits in models._engine_logits(loaded, tokens)
        )
        check(loaded, tokens, expected, noise)

    return patch.object(models, "_check_logits", recorded), found


def differences_of_policies(name: str, dtype: torch.dtype, engine: bool, cache: bool) -> dict[str, float]:
    if not engine and not cache:
        return {}
    stream = torch.arange(3, 51)[None] * 7 % 120
    expected = surviving_logits(random_model(name, dtype).float(), stream, _SINKS, _WINDOW)
    found = {}
    if dtype != torch.float32:
        found["own"] = surviving_logits(random_model(name, dtype), stream, _SINKS, _WINDOW)
    if engine:
        loaded = models.prepare(random_model(name, dtype), name, "")
        found["ours"] = _decoded(loaded, "ours", stream[0])
        found["ring"] = _decoded(loaded, "ring", stream[0])
        found["ring_far"] = _decoded(loaded, "ring", stream[0], _FAR)
    if cache:
        model = random_model(name, dtype)
        found["generate"] = streamed_each(model, stream, _SINKS, _WINDOW)
        found["generate_far"] = streamed_each(model, stream, _SINKS, _WINDOW, start=_FAR)
    return {way: architecture.difference(logits, expected) for way, logits in found.items()}


@torch.inference_mode()
def _decoded(loaded: models.LoadedModel, method: str, stream: torch.Tensor, away: int = 0) -> torch.Tensor:
    """The logits after each token; behind the sinks so many tokens were evicted that nobody saw."""
    decoder: Any = make_decoder(loaded, Configuration(method, EvictionPolicy(n_sink=_SINKS, window_size=_WINDOW)))
    found = []
    for at, token in enumerate(stream.split(1)):
        if away and at == _SINKS:
            decoder.cache.evict(_SINKS, away)
        found.append(decoder.feed(token))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="(all)")
    parser.add_argument("--dtype", default="float32", help="(float32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    dtype = getattr(torch, arguments.dtype)
    rows = []
    for name in arguments.architectures or ARCHITECTURES:
        rows.append(measure(name, dtype))
        print(f"{name}: {rows[-1]['engine'][:90]}", flush=True)
    print(markdown_table([{name: _shown(value) for name, value in row.items()} for row in rows]))
    if arguments.json is not None:
        import transformers

        kept = [{name: _kept(value) for name, value in row.items()} for row in rows]
        result = {"transformers": transformers.__version__, "dtype": arguments.dtype, "rows": kept}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)[:60]


def _kept(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
