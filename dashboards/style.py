"""How the figures of studies look: the engine's style, and labels."""

from __future__ import annotations

from streamllm.figure_style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    save,
    style,
)

__all__ = [
    "BLACK",
    "BLUE",
    "CYCLE",
    "GREEN",
    "GREY",
    "LABELS",
    "MARKERS",
    "ORANGE",
    "PURPLE",
    "SKY",
    "VERMILLION",
    "NoDataError",
    "new_figure",
    "save",
    "style",
]

LABELS = {
    "tpot_ms": "time per output token, ms",
    "speedup": "speedup over re-computation, ×",
    "perplexity": "perplexity",
    "ppl_vs_strict_percent": "perplexity increase over strict StreamingLLM, %",
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
    "quantization": "quantization",
}


class NoDataError(Exception):
    """A figure has nothing to show; the message says what it would take."""
