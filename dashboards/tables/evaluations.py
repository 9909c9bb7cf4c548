"""JSON results of single evaluations as flat rows: those of `streamllm evaluate --output-file`, and files in the source
documents' own format, with whatever of it they have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from streamllm.errors import UsageError
from streamllm.files import Json, Scalar
from streamllm.results.damaged import parsed
from streamllm.results.schema import FIELDS, dtype_of, renamed
from streamllm.results.study_folder import StudyFolder

_SPELLINGS = {
    "model_name": "model",
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "streaming_mode": "method",
    "implementation": "method",
    "start_size": "n_sink",
    "recent_size": "window_size",
    "cache_size": "window_size",
    "attn_backend": "backend",
    "attn_implementation": "backend",
    "attn_impl": "backend",
    "ppl": "perplexity",
    "ppl_increase_pct": "ppl_increase_percent",
    "runtime": "runtime_sec",
    "total_time": "runtime_sec",
    "prefill_time": "prefill_sec",
    "mean_latency_ms": "tpot_ms",
    "mean_memory_mb": "peak_memory_mb",
    "ttft_sec": "first_token_latency_sec",
    "throughput": "decode_toks_per_sec",
    "tokens_per_sec": "decode_toks_per_sec",
    "decode_tokens_per_second": "decode_toks_per_sec",
    "max_eval_tokens": "n_tokens",
    "num_tokens": "n_tokens",
    "total_tokens": "n_tokens",
}
"""Other names of what our rows have, which hold where ours is missing; of several for one, the last here."""
_METRICS = "metrics"
"""The object of a file that says how its other result compares with the baseline, or is itself the only one."""
_LISTED = "results"
"""The list of a file that has several, of an ablation or a sweep."""

_MEASURES = ("perplexity", "runtime_sec", "tpot_ms")
"""An object with one of them is a result."""
_OTHER_KINDS = {"parts_ms": "profile", "fused": "profile --fusion", "jump_nats": "diagnose", "policies": "recall"}
"""Keys of documents that are no results of evaluations, whatever measures they have: the command that writes them."""
_NOT_THE_BASELINES = ("method", "speedup", "ppl_increase_percent", "compress_every", "cache_slack", "max_drop")
"""Values beside the results in a file that are not the baseline's."""
_IN_NAMES = {
    "dataset": r"(?:^|[_-])(wikitext|pg19)",
    "backend": r"backend-([a-z_]+?)(?:[_-]\d+)?$",
    "protocol": r"(decode[_-]loop|chunked)",
}
"""Facts that the source documents' file names give."""


def read_results(folder: Path) -> tuple[list[dict[str, Scalar]], list[str]]:
    """A row per result of the folder's `*.json`, subfolders included, with its `file` and `role`; and a line per file
    that has none. Hidden folders, as the store is, and files of studies, which other tables show, are passed over.
    Raises UsageError if the folder is none."""
    if not folder.is_dir():
        raise UsageError(f"results {str(folder)!r}: no such folder; give the one with the JSON files")
    rows: list[dict[str, Scalar]] = []
    problems = []
    for path in sorted(folder.rglob("*.json")):
        within = path.relative_to(folder)
        if any(part.startswith(".") for part in within.parts) or StudyFolder(path.parent).configuration.exists():
            continue
        name = str(within)
        try:
            document = parsed(path.read_bytes())
            found = [{"file": name, **row} for row in _results(document, path.stem)]
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{name}: {' '.join(str(error).split())}")
            continue
        if (writer := _of_another_kind(document)) is not None:
            problems.append(f"{name}: of another kind, what `streamllm {writer}` writes")
            continue
        rows += found
        if not found:
            problems.append(f"{name}: no object with {' or '.join(_MEASURES)}")
    return rows, problems


def _of_another_kind(document: Json) -> str | None:
    """The command that writes such documents."""
    return next((name for key, name in _OTHER_KINDS.items() if isinstance(document, dict) and key in document), None)


def _results(document: Json, name: str) -> Iterator[dict[str, Scalar]]:
    if not isinstance(document, dict):
        return
    if isinstance(listed := document.get(_LISTED), list):
        about = {key: value for key, value in document.items() if not isinstance(value, dict | list)}
        for one in listed:
            yield from _results({**about, **one} if isinstance(one, dict) else one, name)
        return
    objects = {role: _renamed(value) for role, value in document.items() if isinstance(value, dict)}
    metrics = objects.pop(_METRICS, {})
    results = {role: values for role, values in objects.items() if _is_result(values)}
    shared = _said_by(name)
    for role, values in objects.items():
        if role not in results:  # settings, under whatever name
            shared |= values
    shared |= _renamed(document)
    if "ablation_type" in document:  # those are of their own StreamingLLM, and do not say so
        shared = {"method": "ours", **shared}
    if not results and _is_result(shared | metrics):
        role = "baseline" if "baseline" in name or shared.get("method") == "recompute" else ""
        yield _row(role, metrics, shared)
    for role, values in results.items():
        if role != "baseline":
            yield _row(role, values, shared | metrics)
            continue
        raw = document[role]
        grows = isinstance(raw, dict) and "mean_latency_ms" in raw  # of their latencies the baseline is the whole cache
        others = (*_NOT_THE_BASELINES, *(("n_sink", "window_size") if grows else ()))
        usual = {"method": "dense"} if grows else {}
        yield _row(role, values, {k: v for k, v in shared.items() if k not in others} | usual)


def _row(role: str, values: Mapping[str, Scalar], shared: Mapping[str, Scalar]) -> dict[str, Scalar]:
    usual: dict[str, Scalar] = {"method": "recompute" if role == "baseline" else role} if role else {}
    return {"role": role, **renamed({"state": "complete", **usual, **shared, **values})}


def _renamed(values: Mapping[str, Json]) -> dict[str, Scalar]:
    """Its single values, under our names; not those that our columns cannot show."""
    single: dict[str, Scalar] = {
        name: value
        for name, value in values.items()
        if name != "format" and not isinstance(value, dict | list) and value is not None
    }
    renamed = {ours: single[theirs] for theirs, ours in _SPELLINGS.items() if theirs in single}
    renamed |= {name: value for name, value in single.items() if name not in _SPELLINGS}
    return {name: _in_our_words(name, value) for name, value in renamed.items() if _can_be_shown(name, value)}


def _in_our_words(name: str, value: Scalar) -> Scalar:
    """`wikitext:wikitext-103-v1`, `torch.float16` and `baseline` as our rows say them."""
    if not isinstance(value, str):
        return value
    if name == "dataset":
        return value.partition(":")[0]
    if name == "dtype":
        return value.removeprefix("torch.")
    return "recompute" if (name, value) == ("method", "baseline") else value


def _can_be_shown(name: str, value: Scalar) -> bool:
    """Where a column shows numbers, only numbers."""
    field = re.sub("_(low|high|std)$", "", name)
    if field in FIELDS and dtype_of(field) in ("Int64", "Float64"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return True


def _is_result(values: Mapping[str, Scalar]) -> bool:
    return any(isinstance(values.get(name), int | float) for name in _MEASURES)


def _said_by(name: str) -> dict[str, Scalar]:
    found = {key: re.search(pattern, name) for key, pattern in _IN_NAMES.items()}
    return {key: match[1].replace("_loop", "-loop") for key, match in found.items() if match is not None}
