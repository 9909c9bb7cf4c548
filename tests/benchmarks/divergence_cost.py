"""What comparing a policy's predictions with strict StreamingLLM's adds to the pass that its losses come from, and what
the reference's own pass takes longer for keeping its distributions. All three in turn, on the same text. On a CPU in
seconds of the processor, which others on the machine disturb less than the clock's.

python -m tests.benchmarks.divergence_cost [--model testbed] [--tokens N] [--total 512] [--threads 2] [--rounds 9]
                                           [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

from streamllm.configuration import Configuration
from streamllm.engine.device import limit_threads, synchronize
from streamllm.engine.loading import load_model, load_tokenizer
from streamllm.measuring.bench import Bench
from streamllm.measuring.jobs import Job
from streamllm.measuring.plans import strict_configuration
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import EvictionPolicy, with_derived_window

from .reporting import interleaved, report, summary

ALONE = "losses alone"


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__))
    options.add_argument("--model", default="testbed", help="as `evaluate` takes it (testbed)")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--text", type=Path, help="a file (the embedded text)")
    options.add_argument("--tokens", type=int, help="of the text (all)")
    options.add_argument("--total", type=int, default=512, help="total KV, at most the trained length (512)")
    options.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    options.add_argument("--rounds", type=int, default=9, help="interleaved repetitions (9)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = options.parse_args()
    limit_threads(arguments.threads)
    loaded = load_model(arguments.model, arguments.dtype)
    source = TextSource(text=arguments.text, max_eval_tokens=arguments.tokens)
    stream = load_tokens(source, load_tokenizer(arguments.model), loaded.vocabulary)
    total = min(arguments.total, loaded.trained_length or arguments.total)
    bench = Bench(loaded, stream, total)
    what = Configuration("ours", with_derived_window(EvictionPolicy(n_sink=4, window_size=1, compress_every=16), total))
    keeping = Job("quality", strict_configuration(total), keeps=True)
    kept = bench.measure(keeping).arrays
    assert kept is not None

    clock = process_time if loaded.device.type == "cpu" else perf_counter

    def seconds(job: Job) -> Callable[[], float]:
        def measured() -> float:
            synchronize(loaded.device)
            started = clock()
            bench.measure(job, against=[kept])
            synchronize(loaded.device)
            return clock() - started

        return measured

    times = interleaved(
        {
            ALONE: seconds(Job("quality", what)),
            "and compared": seconds(Job("quality", what, against=("kept",))),
            "the reference, kept": seconds(keeping),
        },
        arguments.rounds,
    )
    rows = []
    for name, values in times.items():
        found = summary(values)
        over = summary([100 * (value / alone - 1) for value, alone in zip(values, times[ALONE], strict=True)])
        more = {"more %": over["median"], "more low": over["low"], "more high": over["high"]}
        rows.append({"pass": name, "s": found["median"], **({} if name == ALONE else more)})
    size = kept["values"].nbytes / 2**20
    title = (
        f"divergence, total {total}, {len(stream.tokens)} tokens of {stream.label}, {len(kept['positions'])} positions "
        f"of {loaded.vocabulary} tokens, {size:.1f} MiB"
    )
    report(title, loaded, rows, arguments.json)


if __name__ == "__main__":
    main()
