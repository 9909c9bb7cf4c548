"""What a second worker is worth: `python -m tests.benchmarks.workers [--json FILE]`.

Trials per minute for the quality part, which is what workers do beside one another (timings take turns): real Ray
workers with the embedded model, each trial another policy, nothing stored beforehand; the first trial of each worker
warms it up and does not count; counts of workers interleaved.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.configuration import WorkerSettings
from orchestrator.workers.messages import Assignment, Subject, Variant, WorkerSetup
from orchestrator.workers.pool import WorkerPool
from streamllm.configuration import Configuration
from streamllm.engine.loading import load_tokenizer
from streamllm.measuring.jobs import Job
from streamllm.measuring.text import TextSource, TokenStream, load_tokens
from streamllm.policy import EvictionPolicy

from .reporting import interleaved, machine, summary

TOTAL = 250


VARIANT = Variant("float32", "none")


def measure(pool: WorkerPool, idle: deque[int], text: TokenStream, policies: Sequence[EvictionPolicy]) -> None:
    waiting, left, subject = deque(policies), len(policies), Subject(text.digest, VARIANT, TOTAL)
    while left:
        while idle and waiting:
            job = Job("quality", Configuration("ours", waiting.popleft()))
            pool.submit(idle.popleft(), Assignment.of(subject, job))
        for finished in pool.wait(0.1):
            assert finished.measurement is not None, finished.error
            idle.append(finished.worker)
            left -= 1


def trials_per_minute(workers: int, trials: int, text: TokenStream) -> float:
    pool = WorkerPool(WorkerSetup("testbed", VARIANT), WorkerSettings(count=workers, cpus=1))
    pool.share(text)
    try:
        idle: deque[int] = deque()
        while len(idle) < workers:
            idle += [finished.worker for finished in pool.wait(0.1)]
        policies = [EvictionPolicy(n_sink=n, window_size=TOTAL - n, compress_every=1) for n in range(workers + trials)]
        measure(pool, idle, text, policies[:workers])
        started = time.perf_counter()
        measure(pool, idle, text, policies[workers:])
        return 60 * trials / (time.perf_counter() - started)
    finally:
        pool.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="beside one (2)")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    text = load_tokens(TextSource(max_eval_tokens=arguments.tokens), load_tokenizer("testbed"), sys.maxsize)
    paces = interleaved(
        {
            str(count): lambda count=count: trials_per_minute(count, arguments.trials, text)  # type: ignore[misc]
            for count in (1, arguments.workers)
        },
        arguments.rounds,
    )
    one, more = paces["1"], paces[str(arguments.workers)]
    ratios = [b / a for a, b in zip(one, more, strict=True)]
    print(
        f"1 worker {np.median(one):.1f}, {arguments.workers} workers {np.median(more):.1f} trials a minute: "
        f"{np.median(ratios):.2f} times [{min(ratios):.2f}, {max(ratios):.2f} over {len(ratios)} rounds]"
    )
    if arguments.json is not None:
        result = {"trials_per_minute": paces, "ratio": summary(ratios) | {"rounds": ratios}}
        arguments.json.write_text(json.dumps({"benchmark": "workers"} | machine() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
