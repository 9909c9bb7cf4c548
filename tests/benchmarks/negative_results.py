"""What the source documents tried in vain, measured again on the same knobs: one table.

python -m tests.benchmarks.negative_results [--cache 512] [--tokens 4096] [--json FILE]

Speed: Pythia-70M's shape with random weights, whose decode step is bound by the weights it reads; variants interleaved,
ratios taken within a round. Perplexity: the embedded model and text, compared token by token.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from streamllm.configuration import Configuration
from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.decoder import make_decoder
from streamllm.engine.decoding import decode_loop
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.engine.methods import check_execution
from streamllm.engine.model import LoadedModel
from streamllm.errors import UsageError
from streamllm.measuring.quality import Estimate, paired_increase, perplexity
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.measuring.timing import no_garbage_collection
from streamllm.options import QUANTIZATIONS
from streamllm.policy import EvictionPolicy, RefreshPolicy, evicted_before
from streamllm.testbed import MODEL_FOLDER

from .reporting import asked_for, environment, interleaved, parser, steady, summary

AS_IS = "torchao as it is, MLP only"
VARIANTS: dict[str, tuple[str, str, str]] = {
    "ours": ("ours", "eager", "none"),
    f"ours, {AS_IS}": ("ours", "eager", AS_IS),
    "ours, int8": ("ours", "eager", "int8_weight_only"),
    "ours, int4": ("ours", "eager", "int4_weight_only"),
    "ring": ("ring", "eager", "none"),
    "ring, int8": ("ring", "eager", "int8_weight_only"),
    "ring, int4": ("ring", "eager", "int4_weight_only"),
    "ring, compile": ("ring", "compile", "none"),
    "ring, compile, int8": ("ring", "compile", "int8_weight_only"),
    "ring, compile, int4": ("ring", "compile", "int4_weight_only"),
}
"""Method, execution, quantization."""
REFRESHES = ((256, 1, 64), (192, 64, 64))
"""Total S + W + b, R and b; with R = 64 a total of 192 grows to the trained length of 256."""
OVERLAP = 64
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    what: str
    theirs: str
    ours: str
    why: str


class Speeds:
    """Milliseconds per token of every variant, round by round."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times = times

    def faster(self, variant: str, than: str) -> str:
        """How many times, median and interval over the rounds."""
        ratios = [slow / fast for slow, fast in zip(self.times[than], self.times[variant], strict=True)]
        found = summary(ratios)
        return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}] times as fast as {than}"

    def rows(self) -> list[dict[str, Any]]:
        return [{"variant": name, **summary(values), "rounds": values} for name, values in self.times.items()]


class Quality:
    """Losses on the embedded model and text, each measured once."""

    def __init__(self, n_tokens: int) -> None:
        self.loaded = load_model("testbed", "float32")
        source = TextSource(max_eval_tokens=n_tokens + 1)
        self.tokens = load_tokens(source, load_tokenizer("testbed"), self.loaded.vocabulary).tokens
        self.rows: list[dict[str, Any]] = []

    def block_parallel(self, policy: EvictionPolicy, quantization: str = "none") -> np.ndarray:
        loaded = self.loaded if quantization == "none" else load_model("testbed", "float32", quantization=quantization)
        return block_parallel_losses(loaded, self.tokens, policy)

    def refreshed(self, policy: RefreshPolicy) -> np.ndarray:
        decoder = make_decoder(self.loaded, Configuration("refresh", policy))
        return decode_loop(decoder, self.tokens, self.loaded.device).losses

    def above(self, what: dict[str, Any], losses: np.ndarray, reference: np.ndarray) -> str:
        """Percent of perplexity above the reference's, in words; noted down."""
        positions = np.arange(len(losses))
        increase = paired_increase(np.column_stack((positions, losses)), np.column_stack((positions, reference)))
        values = perplexity(losses).flat("perplexity") | increase.flat("ppl_increase_percent")
        self.rows.append(what | {"reference_perplexity": perplexity(reference).value} | values)
        return _percent(increase)


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:+.2f}% [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def measure_speeds(arguments: Any) -> tuple[LoadedModel, Speeds]:
    models = {quantization: asked_for(arguments, quantization) for quantization in QUANTIZATIONS}
    models[AS_IS] = asked_for(arguments)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        models[AS_IS].model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, torch.nn.Linear) and "mlp" in name
    )
    policy = EvictionPolicy(n_sink=4, window_size=arguments.cache - 4)
    with no_garbage_collection():
        variants = {
            name: steady(models[quantization], Configuration(method, policy, execution=execution))
            for name, (method, execution, quantization) in VARIANTS.items()
        }
        return models["none"], Speeds(interleaved(variants, arguments.rounds))


def quantization_rows(speeds: Speeds, quality: Quality) -> list[Row]:
    policy, rows = EvictionPolicy(), []
    plain = quality.block_parallel(policy)
    for bits, as_theirs in ((8, f"; as they did ({AS_IS}): {speeds.faster(f'ours, {AS_IS}', 'ours')}"), (4, "")):
        name = f"int{bits}"
        losses = quality.block_parallel(policy, f"{name}_weight_only")
        change = quality.above({"what": name}, losses, plain)
        rows.append(
            Row(
                f"INT{bits} weight-only",
                "no gain in TPOT, or slower" if bits == 8 else "as INT8",
                f"{speeds.faster(f'ours, {name}', 'ours')}; "
                f"{speeds.faster(f'ring, compile, {name}', 'ring, compile')}; perplexity {change}{as_theirs}",
                "batch 1 is bound by reading weights: they shrink only if one kernel reads them packed, and all of "
                "them are packed, the output layer too; torchao's eager product is not that kernel",
            )
        )
    return rows


def compile_row(speeds: Speeds) -> Row:
    try:
        check_execution("ours", "compile")
    except UsageError as error:
        refused = str(error)
    graphs = "outstanding (no GPU here)"
    return Row(
        "torch.compile, CUDA graphs",
        "graphs overwrite their own tensors, unstable",
        f"{speeds.faster('ring, compile', 'ring')}, {speeds.faster('ring, compile', 'ours')}; CUDA graphs: {graphs}",
        f"a sliced, re-rotated cache changes shape and address at every prune ({refused.split(':')[0]} of `ours` is "
        f"refused); the ring's step has one shape, and nothing moves",
    )


def refresh_rows(quality: Quality) -> list[Row]:
    found: dict[str, list[str]] = {"tail": [], "order": []}
    for total, interval, budget in REFRESHES:
        plain = EvictionPolicy(window_size=total - 4, compress_every=interval)
        reference = quality.block_parallel(plain)
        values = asdict(replace(plain, window_size=total - 4 - budget))
        for position, results in found.items():
            policy = RefreshPolicy(**values, refresh_budget=budget, refresh_position=position)  # type: ignore[arg-type]
            what = {"what": f"refresh, {position}", "total": total, "compress_every": interval, "budget": budget}
            change = quality.above(what, quality.refreshed(policy), reference)
            results.append(f"R {interval}, {budget} of {total}: {change}")
            print(f"refresh, {position}: {results[-1]}", flush=True)
    return [
        Row(
            "refresh, at the tail",
            "perplexity collapses, +10 to +30%",
            "; ".join(found["tail"]),
            "keys are rotated right, but the last words before the query are now a whole budget away from it",
        ),
        Row(
            "refresh, in order",
            "not tried",
            "; ".join(found["order"]),
            "no collapse, so it was the position; yet tokens from far back are worth no more than the ones just "
            "behind the window, whose place they take",
        ),
    ]


def overlap_row(quality: Quality) -> Row:
    plain = EvictionPolicy(window_size=252, compress_every=16)
    derived = replace(plain, window_size=252 - OVERLAP)
    with_overlap = replace(derived, window_size=derived.window_size + OVERLAP)  # what a prune then leaves
    n_losses = len(quality.tokens) - 1
    same_schedule = evicted_before(plain, n_losses) == evicted_before(with_overlap, n_losses)
    difference = abs(quality.block_parallel(plain) - quality.block_parallel(with_overlap)).max()
    quality.rows.append({"what": "overlap", "same_schedule": same_schedule, "largest_difference_nats": difference})
    return Row(
        "overlap at constant total",
        "no better, TPOT within noise",
        f"the same: largest difference of {n_losses} losses {difference:g} nats, schedules equal: {same_schedule}",
        "by construction: W = total - S - slack - o, and a prune leaves W + o",
    )


def outgrown_static_cache(length: int = 64) -> str:
    """What transformers' StaticCache of `length` tokens says to one more."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    cache = transformers.StaticCache(config=model.config, max_cache_len=length)
    try:
        with torch.inference_mode():
            for position in range(length + 1):
                at = torch.tensor([position])
                logits = model(at[None] % 100, past_key_values=cache, position_ids=at[None], cache_position=at).logits
    except (IndexError, RuntimeError) as error:
        return f"token {position + 1}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return f"no error at token {length + 1}; its logits are {'finite' if logits.isfinite().all() else 'not finite'}"


def static_row(speeds: Speeds) -> Row:
    return Row(
        "static cache",
        "index out of bounds once the stream is longer",
        f"transformers' StaticCache, {outgrown_static_cache()}; the ring goes on, {speeds.faster('ring', 'ours')}",
        "a StaticCache has a slot per position and ends; a ring has a slot per kept token, and a prune moves nothing",
    )


def markdown(rows: list[Row]) -> str:
    lines = ["| what | their finding | today | why |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(asdict(row).values())} |" for row in rows])


@torch.inference_mode()
def main() -> None:
    options = parser(str(__doc__))
    options.add_argument("--cache", type=int, default=512, help="sinks and window of the speed rows (512)")
    options.add_argument("--tokens", type=int, default=4096, help="of the embedded text (4096)")
    options.set_defaults(json=RESULTS / "negative-cpu.json")
    arguments = options.parse_args()
    loaded, speeds = measure_speeds(arguments)
    quality = Quality(arguments.tokens)
    rows = [
        *quantization_rows(speeds, quality),
        compile_row(speeds),
        *refresh_rows(quality),
        overlap_row(quality),
        static_row(speeds),
    ]
    print(markdown(rows))
    facts = {"benchmark": f"negative results, cache {arguments.cache}", **environment(loaded)}
    facts |= {"perplexity_on": "testbed", "tokens": arguments.tokens, "rows": [asdict(row) for row in rows]}
    facts |= {"speeds_ms_per_token": speeds.rows(), "perplexities": quality.rows}
    arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
