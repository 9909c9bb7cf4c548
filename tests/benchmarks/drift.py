"""What keys lose that every prune turns anew from what the prune before has left, as the source documents' `ours` does.

python -m tests.benchmarks.drift [--model smollm2 --text FILE] [--total 512] [--tokens 4096] [--json FILE]

In half precision each turn rounds, and a turn of a few ten-thousandths of a radian rounds away: after a thousand prunes
a key is not where it should be. Beside it the same policy by `ours`, which turns keys as they came, and the evaluator.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamllm.configuration import Configuration
from streamllm.engine.backends import BACKENDS
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import CachedDecoder, Decoder, negative_log_likelihood, without
from streamllm.engine.methods.ours import RerotatedCache
from streamllm.engine.model import LoadedModel
from streamllm.measuring.quality import paired_increase
from streamllm.policy import EvictionPolicy
from streamllm.terminal.progress import working

from .reporting import machine, markdown_table


class NaivelyRerotatedCache(RerotatedCache):
    """Turns what it has by what is dropped now."""

    def evict(self, n_sink: int, drop: int) -> None:
        for layer, keys in enumerate(self.keys):
            rotary = self.layers[layer].rotary
            moved = rotary.rotate(keys[:, :, n_sink + drop :], rotary.by(-drop))
            self.keys[layer] = torch.cat((keys[:, :, :n_sink], moved), dim=2)
            self.values[layer] = without(self.values[layer], n_sink, drop)


def naive_losses(loaded: LoadedModel, policy: EvictionPolicy, tokens: np.ndarray, prefilled: int = 1) -> np.ndarray:
    return _losses(
        loaded, CachedDecoder(loaded, policy, NaivelyRerotatedCache(loaded, BACKENDS["auto"])), tokens, prefilled
    )


def loop_losses(
    loaded: LoadedModel, method: str, policy: EvictionPolicy, tokens: np.ndarray, prefilled: int = 1
) -> np.ndarray:
    return _losses(loaded, make_decoder(loaded, Configuration(method, policy)), tokens, prefilled)


@torch.inference_mode()
def _losses(loaded: LoadedModel, decoder: Decoder, tokens: np.ndarray, prefilled: int) -> np.ndarray:
    """Of a decode loop, float64 nats (n - 1), the first tokens fed at once: no more than the cache holds."""
    stream = torch.from_numpy(tokens).to(loaded.device)
    with BACKENDS["auto"].active():
        logits = decoder.feed(stream[:prefilled], logits_to_keep=0)
        losses = [negative_log_likelihood(logits, stream[1 : prefilled + 1])]
        for at in range(prefilled, len(tokens) - 1):
            losses.append(negative_log_likelihood(decoder.feed(stream[at : at + 1]), stream[at + 1 : at + 2]))
    return torch.cat(losses).cpu().numpy()


def key_error(loaded: LoadedModel, moves: int, cache: type[RerotatedCache]) -> float:
    """Of a key that moved so many positions, one at a time: relative to where it should be, the rotated part only."""
    generator = torch.Generator().manual_seed(0)
    rotary = loaded.layers[0].rotary
    size = rotary.size
    raw = torch.randn(1, 1, 1, size, generator=generator, dtype=torch.float64).to(loaded.device)

    def at(position: int, vectors: Tensor) -> Tensor:
        return rotary.rotate(vectors, rotary.by(position))

    held = cache(loaded, BACKENDS["auto"])
    filler = torch.zeros(1, 1, moves, size, dtype=loaded.dtype, device=loaded.device)
    held.keys = [torch.cat((filler, at(moves, raw).to(loaded.dtype)), dim=2)]
    held.values = [held.keys[0].clone()]
    for _ in range(moves):
        held.evict(0, 1)
    return float((held.keys[0][:, :, 0].double() - raw[:, :, 0]).norm() / raw.norm())


def _table(losses: np.ndarray) -> np.ndarray:
    """(n, 2): position, nats."""
    return np.column_stack((np.arange(len(losses)), losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--total", type=int, default=512, help="sinks and window (512)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text (4096)")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4, 16, 64], metavar="R", help="(1 4 16 64)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    from streamllm.engine.loading import load_model, load_tokenizer
    from streamllm.measuring.text import TextSource, load_tokens

    loaded = load_model(arguments.model, arguments.dtype)
    source = TextSource(text=arguments.text, max_eval_tokens=arguments.tokens)
    tokens = load_tokens(source, load_tokenizer(arguments.model), loaded.vocabulary).tokens
    rows = []
    for every in arguments.every:
        policy = EvictionPolicy(n_sink=4, window_size=arguments.total - 4, compress_every=every)
        expected = block_parallel_losses(loaded, tokens, policy)
        past = np.arange(len(expected)) >= 2 * arguments.total  # where every key has moved through the window
        row: dict[str, object] = {"R": every, "ppl": float(np.exp(expected[past].mean()))}
        with working(f"R={every}"):
            for name, losses in (
                ("ours", loop_losses(loaded, "ours", policy, tokens)),
                ("turned anew", naive_losses(loaded, policy, tokens)),
            ):
                increase = paired_increase(_table(losses)[past], _table(expected))
                row |= increase.flat(f"{name}: % of ppl")
        rows.append(row)
        print(markdown_table(rows[-1:]), flush=True)
    errors = {
        cache.__name__: key_error(loaded, arguments.total - 4, cache)
        for cache in (RerotatedCache, NaivelyRerotatedCache)
    }
    facts = {"benchmark": "drift", "model": arguments.model, "dtype": arguments.dtype, "total": arguments.total,
             "dataset": source.label, "n_tokens": len(tokens), **machine()}  # fmt: skip
    print(markdown_table(rows), f"\nerror of the oldest key at R=1: {errors}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(facts | {"key_error": errors, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
