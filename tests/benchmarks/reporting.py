"""What the benchmarks share: models of known shape with random weights, interleaved timing, a table, a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from streamllm.configuration import Configuration
from streamllm.engine.device import copy_bandwidth, default_device, device_name, limit_threads, resolve_dtype
from streamllm.engine.loading import prepare
from streamllm.engine.model import LoadedModel
from streamllm.measuring.pairing import in_turn, load_average
from streamllm.measuring.quality import median_interval
from streamllm.measuring.timing import LONGEST_SEGMENT_SEC, TimedDecoder

SHAPES = {  # Pythia's configurations; speed does not depend on the values of the weights
    "pythia-70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "pythia-2.8b": {
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 10240,
    },
    "pythia-410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 1024,
    },
}


SEGMENT_SEC = LONGEST_SEGMENT_SEC
"""The engine's pairs are many and short; a benchmark's rounds are few, and with a dozen variants in turn each finds the
caches of the CPU as others left them: as long as the engine has any."""

_BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""
"""Ends by itself when its parent has died without ending it."""


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--shape", choices=SHAPES, default="pythia-70m")
    options.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (auto)")
    options.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    options.add_argument("--rounds", type=int, default=9, help="interleaved repetitions (9)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return options


def random_model(shape: str, dtype: str = "auto", quantization: str = "none", **sizes: int) -> LoadedModel:
    """sizes: of its configuration, in place of the shape's."""
    device = default_device()
    config = transformers.GPTNeoXConfig(
        **{"vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25} | SHAPES[shape] | sizes
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.GPTNeoXForCausalLM._from_config(config, dtype=resolve_dtype(dtype, device))
    return prepare(model, f"{shape} (random weights)", "random", quantization)


def asked_for(arguments: argparse.Namespace, quantization: str = "none") -> LoadedModel:
    """The model and the threads of the options that `parser` has."""
    limit_threads(arguments.threads)
    return random_model(arguments.shape, arguments.dtype, quantization)


def steady(loaded: LoadedModel, what: Configuration) -> Callable[[], float]:
    """A warm decoder; the function returned times a segment of whole prune cycles, in ms per token."""
    return segment_of(warm(loaded, what), SEGMENT_SEC)


def warm(loaded: LoadedModel, what: Configuration) -> TimedDecoder:
    """Its cache filled and in its cycle, compiled, its pace known."""
    tokens = np.arange(min(loaded.vocabulary, 4096))
    decoder = TimedDecoder(loaded, what, tokens)
    with decoder.backend.active():
        decoder.prefill()
        decoder.warm_up()
    return decoder


def segment_of(decoder: TimedDecoder, seconds: float) -> Callable[[], float]:
    """Times a segment of about that many seconds of a warm decoder, in ms per token."""
    count = decoder.segment_length(seconds)

    def timed() -> float:
        with decoder.backend.active():
            return 1e3 * decoder.decode(count)

    return timed


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every variant in turn, `rounds` times: what disturbs one round disturbs all. Each returns what it measured."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for done, times in enumerate(islice(in_turn(list(variants.values())), rounds), start=1):
        for name, measured in zip(variants, times, strict=True):
            results[name].append(measured)
        print(f"\rround {done}/{rounds}", end="" if done < rounds else "\n", file=sys.stderr, flush=True)
    return results


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes beside this one, each of which wants a core for itself."""
    running = []
    try:
        for _ in range(count):
            running.append(subprocess.Popen([sys.executable, "-c", _BUSY]))
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def summary(values: list[float]) -> dict[str, float]:
    estimate = median_interval(np.array(values))
    return {"median": estimate.value, "low": estimate.low, "high": estimate.high}


def machine() -> dict[str, Any]:
    """Where, when and with what something was measured; the load is that at the end of it."""
    return {
        "machine": f"{device_name(torch.device('cpu'))}, {len(os.sched_getaffinity(0))} cores",
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "load_average": load_average(),
    }


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    """Of what is there: a machine with a GPU may have the engine alone."""
    found = {}
    for name in ("torch", "transformers", "triton", "torchao", "optuna", "ray", "mlflow"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def environment(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": device_name(loaded.device),
        "threads": torch.get_num_threads(),
        "copy_bandwidth_gb_per_sec": copy_bandwidth(loaded.device) / 1e9,
        **machine(),
    }


def report(
    title: str,
    loaded: LoadedModel,
    rows: list[dict[str, Any]],
    file: Path | None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """A Markdown table on the screen, everything in the file, there with what there is `more`."""
    facts = environment(loaded)
    print(f"{title}: {facts['model']}, {facts['dtype']}, {facts['device']}, {facts['threads']} threads, "
          f"copies {facts['copy_bandwidth_gb_per_sec']:.1f} GB/s, load {facts['load_average']:.1f}")  # fmt: skip
    print(markdown_table(rows))
    if file is not None:
        file.write_text(json.dumps({"benchmark": title, **facts, **(more or {}), "rows": rows}, indent=1) + "\n")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---" for _ in columns) + "|"]
    lines += ["| " + " | ".join(_text(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
