"""The names of measurements in the store: a job's key says everything that determines the number, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..configuration import Configuration
from ..engine.methods import check_protocol, exactness, is_evaluated, sampled_losses
from ..version import __version__
from .conditions import Conditions
from .jobs import Job
from .text import TokenStream

_WHO = ("device", "threads", "cpu_capability")


@dataclass(frozen=True, slots=True)
class Keys:
    """Of one model on one text, measured under these conditions, beside strict StreamingLLM at a total KV of
    `total`."""

    conditions: Conditions
    text: TokenStream
    total: int
    reference_digest: str | None = None
    """Of the model that times are taken beside, where that is another."""

    def of(self, job: Job) -> dict[str, Any]:
        if job.kind == "quality":
            return self._quality(job)
        if job.kind == "hits":
            return self._quality(job) | {"kind": "hits of streaming"}
        if job.task is not None:
            return task_key(self.conditions, job.what, json.loads(job.task.key))
        if job.kind in ("speed", "first_token", "energy"):
            key = self._speed(job.what) | {"kind": job.kind}
        else:
            key = self._whole(job.protocol, job.what)
        return key | ({"run": job.run} if job.run else {})

    def identity(self, what: Configuration, protocol: str) -> dict[str, Any]:
        return identity(self.conditions, self.text, what, protocol)

    def _quality(self, job: Job) -> dict[str, Any]:
        """It depends neither on the cache implementation nor on the hardware: once per policy. Raises UnavailableError
        for a method that is not the policy's function."""
        what = job.what
        check_protocol(what.method, "fast", self.conditions.dtype)
        kind = "streaming" if sampled_losses(what.method) is None else what.method
        names = ["model_digest", "text_digest", "protocol", "dtype"]
        if self.conditions.is_quantized:  # its kernels round as the machine has them
            names += ["device", "cpu_capability"]
        conditions = self.conditions.of_quality(None if kind == "streaming" else what.method)
        part: dict[str, int | str] = {}
        if job.batch is not None:
            part["batch"] = job.batch
        if job.tokens is not None:
            part["tokens"] = job.tokens
        if job.keeps:
            part["distributions"] = "kept"
        if job.against:
            part["against"] = job.against[0]
        if kind == "streaming":
            part |= _rounded(what)
        if recomputed := job.against[1:]:
            part["recomputed"] = hashlib.sha256(" ".join(recomputed).encode()).hexdigest()
        return {"kind": f"quality of {kind}"} | conditions | self._named(what, "fast", *names) | part

    def _speed(self, what: Configuration) -> dict[str, Any]:
        """It does not depend on the text."""
        named = self._named(what, "fast", "model_digest", "protocol", "dtype", "method", *_WHO)
        key = {"kind": "speed", "attn_backend": what.backend, "execution": what.execution}
        return key | self._beside() | self.conditions.of_speed(what.method, what.backend) | named

    def _whole(self, protocol: str, what: Configuration) -> dict[str, Any]:
        named = self._named(what, protocol, "model_digest", "text_digest", "protocol", "dtype", "method", *_WHO)
        key = {"kind": "evaluation", "attn_backend": what.backend, "execution": what.execution} | self._beside()
        key["compress_every"] = what.policy.compress_every  # of `recompute` by chunks, the prefill
        return self.conditions.of_speed(what.method, what.backend) | named | key

    def _beside(self) -> dict[str, Any]:
        of_another = {} if self.reference_digest is None else {"reference_digest": self.reference_digest}
        return {"reference_total": self.total} | of_another

    def _named(self, what: Configuration, protocol: str, *names: str) -> dict[str, Any]:
        values = self.identity(what, protocol)
        return {name: values[name] for name in names} | what.effective.named


def _rounded(what: Configuration) -> dict[str, str]:
    """How keys are kept, where that decides what a cache of another number format rounds."""
    return {} if what.effective.kv_dtype == "auto" else {"keys": what.keys}


def task_key(
    conditions: Conditions, what: Configuration, asked: Mapping[str, Any], writes: bool = False
) -> dict[str, Any]:
    """A task's result depends neither on the cache implementation nor, unless the weights are quantized, on the
    hardware: but where the method itself decodes, as it does if it `writes`. asked: all that determines it
    besides the model and its policy."""
    by_method = writes or not is_evaluated(what.method, conditions.dtype)
    key: dict[str, Any] = {
        "kind": "task",
        **conditions.of_quality(what.method if by_method else None),
        "model_digest": conditions.model_digest,
        "dtype": conditions.dtype,
        **what.effective.named,
        **_rounded(what),
        **asked,
    }
    if by_method:
        key |= {"method": what.method, "attn_backend": what.backend, "execution": what.execution}
    if conditions.is_quantized:
        key |= {"device": conditions.kind["device"], "cpu_capability": conditions.cpu_capability}
    return key


def identity(conditions: Conditions, text: TokenStream, what: Configuration, protocol: str) -> dict[str, Any]:
    """The subject of an evaluation: the part of a flat result that is known beforehand."""
    return {
        "model": conditions.model,
        "model_digest": conditions.model_digest,
        "weights": conditions.weights,
        "dataset": text.label,
        "text_digest": text.digest,
        "n_tokens": len(text.tokens),
        "bos": text.bos,
        "kv_bytes_per_token": what.effective.kept_bytes(conditions.kv_bytes_per_token, conditions.dtype),
        "method": what.method,
        "protocol": protocol,
        "exactness": exactness(what.method, conditions.dtype),
        **asdict(what.effective),
        "dtype": conditions.dtype,
        **conditions.kind,
        "cpu_capability": conditions.cpu_capability,
        "execution": what.execution,
        "version": __version__,
    }
