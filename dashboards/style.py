"""How figures look: colours that the colour-blind can tell apart (Okabe and Ito 2008), and print; labels; saving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, BLACK, GREY = "#56b4e9", "#cc79a7", "#000000", "#999999"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vPX"

LABELS = {
    "tpot_ms": "time per output token, ms",
    "speedup": "speedup over re-computation, ×",
    "perplexity": "perplexity",
    "ppl_increase_percent": "perplexity increase over re-computation, %",
    "peak_kv": "largest number of keys attended to",
    "peak_memory_mb": "peak memory, MiB",
    "runtime_sec": "runtime over the whole text, s",
    "decode_toks_per_sec": "decoding, tokens per second",
    "avg_attn_ms": "attention per token, ms",
    "first_token_latency_sec": "first token latency, s",
    "n_sink": "sinks S, tokens",
    "window_size": "window W, tokens",
    "compress_every": "pruned every R tokens",
    "cache_slack": "slack σ, tokens",
    "max_drop": "max drop δ, tokens (0: no limit)",
    "total_kv": "total KV S + W + σ, tokens",
    "method": "method",
    "backend": "backend",
    "execution": "execution",
}


class NoDataError(Exception):
    """A figure has nothing to show; the message says what it would take."""


@contextmanager
def style() -> Iterator[None]:
    """Figures are drawn and saved inside."""
    import matplotlib

    settings = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "hatch.linewidth": 0.8,
        "pdf.fonttype": 42,  # letters stay letters
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """In inches; its layout is made when it is saved."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, stem: Path, suffixes: Sequence[str]) -> list[Path]:
    """Writes STEM.SUFFIX for each of png and pdf; the same figure gives the same bytes."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in suffixes]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    return paths
