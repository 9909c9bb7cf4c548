"""Workers that measure nothing, and a pool of them in this process. Without torch: Ray's workers import it too."""

from dataclasses import replace

import numpy as np

from orchestrator.scheduler import Scheduler
from orchestrator.workers.kinds import Kinds
from orchestrator.workers.messages import Assignment, Subject, Variant
from orchestrator.workers.pool import Finished
from streamllm.engine.methods import METHODS
from streamllm.measuring.conditions import Conditions
from streamllm.measuring.jobs import MORE
from streamllm.measuring.sample import sample_batches
from streamllm.measuring.store import Measurement, MeasurementStore, code_digest
from streamllm.measuring.text import TokenStream

KIND = {"device": "none", "threads": 1, "software": "none"}
CONDITIONS = Conditions(
    model="m",
    model_digest="d",
    weights=None,
    dtype="float32",
    kv_bytes_per_token=8,
    layers=((None, 8),),
    trained_length=None,
    kind=KIND,
    cpu_capability=None,
    software={},
    libraries=dict.fromkeys(("torch", "transformers", "torchao", "kvpress", "flash-attn"), "1.0"),
    code=code_digest(*METHODS),
)
VARIANT = Variant("float32", "none")
TEXT = TokenStream(np.arange(51), "none", "t")
TOTAL = 32
RAW = {"measured_tpot_ms": 2.0, "reference_tpot_ms": 2.0, "pairs": 12, "timed_at": 0.0, "load": 0.5}


def subject(total=TOTAL):
    return Subject(TEXT.digest, VARIANT, total)


def description(host="here", kind=KIND, device_type="cpu", **more):
    """Of a worker that is ready. more: fields of its conditions."""
    conditions = replace(CONDITIONS, kind=KIND | kind, **more)
    return {
        "host": host,
        "pid": 1,
        "conditions": conditions,
        "device_type": device_type,
        "visible_devices": "",
        "cores": [0],
        "uncounted": None,
        "warnings": [],
    }


def losses(n_sink, tokens=51):
    return np.column_stack((np.arange(tokens - 1.0), np.full(tokens - 1, 1.0 + 0.01 * n_sink)))


def measured(job, text=TEXT, **more):
    """The measurement of a job: each sink costs 0.01 nats per token and as much time as the reference."""
    what, policy = job.what, job.what.policy
    if job.kind == "times":
        return Measurement(RAW | {"time_ratio": 1.0, "ratios": [1.0 * job.run, 2.0 * job.run]} | more)
    if job.kind == "speed":
        ratio = 10.0 if what.method == "recompute" else 2.0 + policy.n_sink
        backends = {"backend": what.backend, "backend_requested": what.backend}
        times = RAW | {"time_ratio": ratio, "speed_sec": 0.5, "prefill_sec": 0.1}
        times |= {"first_token_latency_sec": 0.1, "avg_attn_ms": 0.1, "peak_memory_mb": 9.0}
        return Measurement(times | backends | more)
    if job.kind in MORE:
        ratio, reference = {"first_token": ("ttft_ratio", "reference_ttft_ms"),
                            "energy": ("energy_ratio", "reference_joules_per_token")}[job.kind]  # fmt: skip
        ends = {f"{ratio}_low": 0.9, f"{ratio}_high": 1.0 + policy.n_sink}
        return Measurement({ratio: 1.0 + policy.n_sink / 10, **ends, reference: 5.0, "speed_sec": 0.25} | more)
    table = losses(policy.n_sink, len(text.tokens))
    if job.batch is not None:
        table = table[list(sample_batches(len(text.tokens), policy.kept))[job.batch]]
    perplexity = {"perplexity": 2.7, "perplexity_low": 2.6, "perplexity_high": 2.8}
    record = {"peak_kv": 49, "quality_sec": 0.0, "evaluated_tokens": len(table)} | perplexity
    if job.batch is not None or not (job.keeps or job.against):
        return Measurement(record | more, table, {"values": np.zeros(1)} if job.keeps else None)
    kl = 0.01 * abs(policy.n_sink - 4)  # strict StreamingLLM's sinks are four
    record |= {"kl": kl, "kl_low": kl / 2, "kl_high": 2 * kl, "kl_p99": 10 * kl}
    record |= {"same_top_percent": 100.0 - kl, "dp_rms_percent": kl, "kl_positions": len(table)}
    if job.against[1:]:
        record |= {"kl_vs_recompute": kl + 0.04, "kl_vs_recompute_positions": 8 * len(job.against[1:])}
    return Measurement(record | more, table, {"kl": np.full(len(table), kl)})


class PretendPool:
    """Workers that answer at once, as `answer(worker, job)` says (a `Finished`, or a measurement); those that die come
    back. Of the baseline it is said last."""

    def __init__(self, count=1, answer=None, descriptions=None):
        self.descriptions = list(descriptions or [description() for _ in range(count)])
        self.submitted = []
        self.asked = []
        """Jobs, and by whom each was measured."""
        self._answer = answer or (lambda worker, job: measured(job))
        self.ready = [Finished(worker, description=one) for worker, one in enumerate(self.descriptions)]

    def share(self, text):
        pass

    def lend(self, names, arrays):
        pass

    def submit(self, worker, assignment: Assignment):
        job = assignment.job
        self.submitted.append(job)
        self.asked.append((worker, job))
        answer = self._answer(worker, job)
        answer = answer if isinstance(answer, Finished) else Finished(worker, measurement=answer)
        self.ready.insert(0 if job.what.method == "recompute" and job.kind != "times" else len(self.ready), answer)

    def ask_conditions(self, worker, variant):
        digest = "d" if variant == VARIANT else f"d {variant.quantization}"
        self.ready.append(
            Finished(worker, conditions=replace(self.descriptions[worker]["conditions"], model_digest=digest))
        )

    def wait(self, timeout):
        if not self.ready:
            return
        result = self.ready.pop()
        yield result
        if result.died and not result.lost:
            self.ready.append(Finished(result.worker, description=self.descriptions[result.worker]))

    @property
    def measured(self):
        """What was submitted of all but the baseline's sample, once for each configuration."""
        return list(dict.fromkeys(job.what for job in self.submitted if job.what.method != "recompute"))

    @property
    def sampled(self):
        """The batches of the baseline's sample."""
        return [job.batch for job in self.submitted if job.batch is not None]


def scheduler(pool, folder, rows=(), note=lambda _: None, watchers=(), kinds=None):
    kinds = kinds or Kinds(rows, note)
    return Scheduler(pool, MeasurementStore(folder / "store"), VARIANT, note, watchers, kinds.check)
