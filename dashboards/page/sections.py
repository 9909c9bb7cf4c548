"""The sections of a report that are prose: what was found, how it was measured, what failed, in which environment."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from streamllm.results.schema import AnyRow
from streamllm.results.study import StudyResults

from ..findings import Findings
from .data import LABELS

_ENDS = {None: "running, or killed", "": "how it ended is not known"}


def summary(found: Findings) -> str:
    points = "".join(f"<li>{escape(text)}</li>" for text in found.found)
    why = f'<p class="why">{escape(found.why)}</p>' if found.why else ""
    sure = "".join(f"<p>{escape(text)}</p>" for text in found.certainty)
    return f"<p>{escape(found.asked)}</p><ul>{points}</ul>{why}{sure}"


def measured(study: StudyResults) -> str:
    rows = [row for row in study.trials if row["state"] == "complete"]
    row = rows[0] if rows else None
    said = []
    if study.baseline is not None:
        kept = study.baseline["n_sink"] + study.baseline["window_size"]
        said.append(
            f"The baseline runs the last {kept} tokens through the model again for every token, without a cache: "
            f"{study.baseline['tpot_ms']:.2f} ms per token, perplexity {study.baseline['perplexity']:.2f} over "
            f"{_count(study.baseline, 'evaluated_tokens')} tokens, known from "
            f"the {_count(study.baseline, 'sampled_tokens')} it was run at and strict StreamingLLM at all."
        )
    if row is not None and row.get("protocol") == "fast":
        said.append(
            f"Quality: the perplexity of {_count(row, 'evaluated_tokens')} tokens of {row.get('dataset', 'a text')}, "
            f"computed in a few block forwards, which gives the losses of token-by-token decoding. Increases are "
            f"paired: over strict StreamingLLM at every token; over the baseline that, and what strict StreamingLLM "
            f"differs from the baseline by at the tokens the baseline was sampled at."
        )
        said.append(
            "Speed: the steady state of a full cache. After a warm-up, segments of whole prune cycles are timed in "
            "turn with segments of strict StreamingLLM; the value is the median of the ratios, with a 95% interval, "
            f"times the median time of strict StreamingLLM: {'; '.join(map(str, study.references))}."
        )
    elif row is not None:
        said.append(f"Protocol {row.get('protocol')} on {row.get('dataset', 'a text')}.")
    rounds = max((row["rounds"] for row in rows if row.get("rounds")), default=None)
    if rounds is None:
        said.append("Nothing was confirmed: each time is of one measurement during the search.")
    else:
        count = sum(bool(row.get("rounds")) for row in rows)
        said.append(
            f"Confirming: after the search {count} candidates and the baseline were timed again in {rounds} rounds or "
            f"fewer, each in turn on one worker; what is hardly on the front after two is in no more. The front and "
            f"its values are of these measurements, as a search picks lucky ones."
        )
    said.append(
        "On the front are the feasible trials that no other one beats in every objective. Objectives: "
        + ", ".join(
            f"{LABELS.get(name, name)} ({'more' if way == 'maximize' else 'less'} is better)"
            for name, way in study.objectives.items()
        )
        + "."
    )
    return "".join(f"<p>{escape(text)}</p>" for text in said)


def _count(row: AnyRow, key: str) -> str:
    return f"{row[key]:,}" if key in row else "some"


def failures(study: StudyResults) -> str:
    """Reasons that differ in numbers only are one."""
    parts = []
    for title, key in (
        ("Failed", "reason"),
        ("Measured, but breaking a constraint", "violated"),
        ("Measured, with a warning", "warning"),
    ):
        rows = [row for row in study.trials if row.get(key)]
        if rows:
            parts.append(f"<h3>{title}: {len(rows)} of {len(study.trials)} trials</h3>{_reasons(rows, key)}")
    return "".join(parts) or "<p>Nothing failed, and no constraint was broken.</p>"


def _reasons(rows: Sequence[AnyRow], key: str) -> str:
    def kind(row: AnyRow) -> str:
        return re.sub(r"\d+(\.\d+)?", "0", str(row[key]))

    lines = []
    for reason, count in Counter(kind(row) for row in rows).most_common():
        like = [row for row in rows if kind(row) == reason]
        trials = ", ".join(str(row["trial"]) for row in like[:8]) + (", ..." if count > 8 else "")
        cells = f'<td class="number">{count}</td><td class="reason">{escape(str(like[0][key]))}</td>'
        lines.append(f"<tr>{cells}<td>{escape(trials)}</td></tr>")
    head = (
        '<tr><th scope="col">trials</th><th scope="col">why (the first of its kind)</th><th scope="col">which</th></tr>'
    )
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def environment(study: StudyResults) -> str:
    status, _ = study.files.read_outcome()
    settings, rows = study.configuration, [*study.trials, *([study.baseline] if study.baseline is not None else [])]
    space = settings.get("space", {})
    facts = {
        "study": f"{study.name} ({_ENDS.get(status, status)})",
        "finished": _times(rows),
        "model": _values(settings, rows, "model", "model_digest"),
        "text": _values({}, rows, "dataset", "text_digest"),
        "device": _values({}, rows, "device"),
        "threads per worker": _values({}, rows, "threads"),
        "measured with": _values({}, rows, "software"),
        "dtype": _values({}, rows, "dtype"),
        "quantization": settings.get("quantization"),
        "total KV": f"{settings['cap']} ({space.get('cap_accounting', 'nominal')})",
        "search space": space.get("name"),
        "sampler, seed": f"{settings.get('sampler', 'auto')}, {settings['seed']}",
        "commit": ", ".join(dict.fromkeys([settings["commit"], *(row["commit"] for row in rows if "commit" in row)])),
        "versions": ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items()),
        "other processes on the device": _values({}, rows, "foreign_processes"),
    }
    lines = [
        f'<tr><th scope="row">{name}</th><td>{escape(str(value))}</td></tr>' for name, value in facts.items() if value
    ]
    return f"<table>{''.join(lines)}</table>"


def _values(settings: Mapping[str, object], rows: Sequence[AnyRow], key: str, digest: str = "") -> str:
    """The different values that the rows have, with the first digits of the digest that goes with them."""
    found = dict.fromkeys(
        f"{row[key]}" + (f" ({str(row[digest])[:12]})" if digest in row else "") for row in rows if row.get(key)
    )
    return ", ".join(found) or str(settings.get(key, ""))


def _times(rows: Sequence[AnyRow]) -> str:
    times = [row["finished_at"] for row in rows if "finished_at" in row]
    if not times:
        return ""
    first, last = (time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) for at in (min(times), max(times)))
    return f"first trial {first}, last {last}"
