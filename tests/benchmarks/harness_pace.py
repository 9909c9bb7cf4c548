"""Requests a second of lm-evaluation-harness, by our model class and by its own `hf`, in turn in one process:
`python -m tests.benchmarks.harness_pace [--model testbed] [--context 90] [--answers 4]`.

Each context is followed by several answers, as in multiple choice; all are pieces of the embedded text. With nothing
evicted the numbers are `hf`'s; that is checked.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from streamllm.configuration import Configuration
from streamllm.engine.device import limit_threads
from streamllm.engine.loading import load_model, load_tokenizer, resolve_model
from streamllm.policy import EvictionPolicy
from streamllm.testbed import TEXT_FILE

from .reporting import interleaved, machine, markdown_table, summary


def requests(documents: int, context: int, answers: int) -> list[Any]:
    """context: words."""
    from lm_eval.api.instance import Instance

    words, made = TEXT_FILE.read_text(encoding="utf-8").split(), []
    for document in range(documents):
        start = document * 50
        before = " ".join(words[start : start + context + document % 10])
        for choice in range(answers):
            at = start + 2 * context + 17 * choice
            after = " " + " ".join(words[at : at + 8])
            made.append(Instance("loglikelihood", {}, (before, after), choice, ("t", document, 1)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--context", type=int, default=60, help="words (60)")
    parser.add_argument("--answers", type=int, default=4, help="to a context (4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    limit_threads(arguments.threads)
    from lm_eval.models.huggingface import HFLM

    from streamllm.harness.model import StreamingLM

    asked = requests(arguments.documents, arguments.context, arguments.answers)
    tokenizer, loaded = load_tokenizer(arguments.model), load_model(arguments.model, "float32")
    folder = resolve_model(arguments.model)
    length = len(tokenizer(asked[0].args[0])["input_ids"])
    half = EvictionPolicy(n_sink=4, window_size=max(length // 2 - 4, 1))
    models = {f"hf, batch {size}": HFLM(str(folder), device="cpu", dtype="float32", batch_size=size) for size in (1, 8)}
    models["ours, nothing evicted"] = StreamingLM(loaded, tokenizer, Configuration("dense", EvictionPolicy()))
    models["ours, half evicted"] = StreamingLM(loaded, tokenizer, Configuration("ours", half))
    found: dict[str, list[Any]] = {}

    def paced(name: str) -> float:
        started = time.perf_counter()
        found[name] = models[name].loglikelihood(asked, disable_tqdm=True)
        return len(asked) / (time.perf_counter() - started)

    paces = interleaved({name: lambda name=name: paced(name) for name in models}, arguments.rounds)  # type: ignore[misc]
    one, other = (np.array([value for value, _ in found[name]]) for name in ("hf, batch 1", "ours, nothing evicted"))
    np.testing.assert_allclose(one, other, rtol=1e-4)
    rows = [{"model class": name, "requests/s": summary(values)} for name, values in paces.items()]
    shown = [
        {
            "model class": row["model class"],
            "requests/s": "{median:.1f} [{low:.1f}, {high:.1f}]".format(**row["requests/s"]),
        }
        for row in rows
    ]
    about = {"model": arguments.model, "context_tokens": length, "answers": arguments.answers, "requests": len(asked)}
    print(about, f"load {os.getloadavg()[0]:.1f}", "", markdown_table(shown), sep="\n")
    if arguments.json is not None:
        result = {"benchmark": "harness_pace"} | machine() | about | {"rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
