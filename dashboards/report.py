"""The report of a study, one HTML file that needs nothing else: `python -m dashboards.report STUDY`."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import re
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from streamllm.errors import UsageError
from streamllm.files import write_atomically
from streamllm.results.schema import FIELDS, OBJECTIVES, AnyRow
from streamllm.results.study import FIXED, StudyResults
from streamllm.terminal.printing import say
from streamllm.terminal.program import command, program

from .attainment import Band, band
from .attainment import data as band_data
from .drawing.style import NoDataError
from .figures import ROW_FIGURES, STUDY_FIGURES, write_figures
from .findings import Findings, findings
from .loading import load
from .tables import kinds
from .tables.columns import COLUMNS, Column, shown_columns, unsaid_settings
from .tables.matrix_html import html_of, tables_of

_PAGE = Path(__file__).parent / "page"
_AXES = ("tpot_ms", "ppl_vs_strict_percent", "ppl_increase_percent", *OBJECTIVES)
"""Offered in this order, each once."""
_LABELS = {column.key: column.heading for column in COLUMNS} | {
    name: FIELDS[name].label for name in ("perplexity", "ppl_vs_strict_percent", "ppl_increase_percent")
}
_DECIMALS = {column.key: column.decimals for column in COLUMNS if column.decimals is not None}
_NOT_OF_A_TRIAL = {"study", "trial", "recommended", "place", "dominated_by", "no_better_than"}
_VALUES = tuple(column.key for column in COLUMNS if column.key not in _NOT_OF_A_TRIAL)
_DETAILS = (*_VALUES, "violated", "warning")
_TABLE = ("trial", "state", *_VALUES, "violated", "reason")
_SUMMED_UP = ("main_comparison", "fixed_eval_speedup", "fixed_eval_ppl_comparison", "fixed_eval_ppl_increase",
              "fixed_eval_runtime")  # fmt: skip
FIGURES = tuple(name for name in (*STUDY_FIGURES, *ROW_FIGURES) if name not in _SUMMED_UP)
"""All but what `results_summary` shows as well."""
_ENDS = {None: "running, or killed", "": "how it ended is not known"}
_DIGITS = 6
"""Significant ones in the page's data: what the chart and the table can show."""

_BAND_DIGITS = 5


def write_report(study: StudyResults, path: Path | None = None, figures: Sequence[Path] | None = None) -> Path:
    """Writes the report, `report.html` in the study's folder unless given. Returns the file.

    figures: PNGs of `FIGURES` that are there already; without them they are drawn."""
    path = path or study.folder / "report.html"
    text = report(study, figures)
    write_atomically(path, text)
    return path


def report(study: StudyResults, figures: Sequence[Path] | None = None) -> str:
    """The page. All that comes from the study is escaped; no script runs but its own, whose digest its policy names."""
    if study.is_matrix:
        return _matrix_report(study)
    front = study.front
    found = findings(study, front)
    sure = _band(study)
    script = (_PAGE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return string.Template((_PAGE / "report.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        title=escape(study.name),
        subtitle=escape(f"{study.configuration['summary']}.{_as_of(study)}"),
        style=(_PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        summary=_summary(found),
        front_table=_front_table(study, front, found.recommended),
        front_note=_front_note(study, front),
        band=_band_words(sure),
        data=_data(study, front, found.recommended, sure),
        figures=_figures(study, figures),
        measured=_measured(study),
        failures=_failures(study),
        environment=_environment(study),
    )


def _matrix_report(study: StudyResults) -> str:
    """The page of a matrix: tables in place of a front. It has no script."""
    drawn = sorted(study.folder.glob("*.png"))
    return string.Template((_PAGE / "matrix.html").read_text(encoding="utf-8")).substitute(
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        title=escape(study.name),
        subtitle=escape(f"{study.configuration['summary']}.{_as_of(study)}"),
        style=(_PAGE / "report.css").read_text(encoding="utf-8"),
        description=escape(study.configuration["space"].get("description", "")),
        tables="".join(map(html_of, tables_of(study).values())) or "<p>No cell has finished.</p>",
        figures="".join(_figure(path) for path in drawn),
        failures=_failures(study),
        environment=_environment(study),
    )


def _as_of(study: StudyResults) -> str:
    """When the study ended, or its last trial did: the same study makes the same page, whenever it is written."""
    times = [row["finished_at"] for row in study.trials if "finished_at" in row]
    at = study.files.read_outcome()[1] or max(times, default=None)
    return "" if at is None else f" As of {time.strftime('%Y-%m-%d %H:%M', time.localtime(at))}."


def _summary(found: Findings) -> str:
    points = "".join(f"<li>{escape(text)}</li>" for text in found.found)
    why = f'<p class="why">{escape(found.why)}</p>' if found.why else ""
    sure = "".join(f"<p>{escape(text)}</p>" for text in found.certainty)
    return f"<p>{escape(found.asked)}</p><ul>{points}</ul>{why}{sure}"


def _front_table(study: StudyResults, front: Sequence[AnyRow], recommended: AnyRow | None) -> str:
    rows = [*front, *study.fixed]
    timed_on = kinds.letters([rows])
    columns = (*shown_columns(front, study.objectives), *([kinds.TIMED_ON] if timed_on else []))
    marked = recommended["trial"] if recommended is not None else None
    lines = []
    for row in kinds.marked(rows, timed_on):
        kind = "recommended" if row["trial"] == marked else "baseline" if row["trial"] in FIXED else ""
        cells = "".join(f'<td class="{_alignment(column)}">{escape(column.text(row))}</td>' for column in columns)
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    heads = "".join(f'<th scope="col" class="{_alignment(column)}">{escape(column.title)}</th>' for column in columns)
    return f'<table id="front-table"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _alignment(column: Column) -> str:
    return "" if column.words or column.key == "trial" else "number"


def _front_note(study: StudyResults, front: Sequence[AnyRow]) -> str:
    text = (
        "Intervals are 95%. The increase over strict StreamingLLM is over every token, that over re-computing rests on "
        "the tokens it was sampled at. The last rows are what everything is compared with."
    )
    if any(row.get("rounds") for row in front):
        text += (
            " Times are of rounds after the search. P(front) is the share of draws from the measurements in which no "
            "other candidate is better; what cannot be told from a row of the front is left out."
        )
    return escape(" ".join([text, *kinds.notes(kinds.letters([[*front, *study.fixed]]))]))


def _band(study: StudyResults) -> Band | str:
    """How sure the front is; why that is not known, or nothing for one that was not confirmed."""
    try:
        return band(study)
    except NoDataError as reason:
        return f"How sure the front is cannot be drawn: {reason}." if study.is_confirmed else ""


def _band_words(sure: Band | str) -> str:
    if isinstance(sure, str):
        return escape(sure)
    key = '<span class="key band-key"></span> nine of ten drawn fronts, and what half of them attain.'
    return f"{key} {escape(sure.words)}"


def _data(study: StudyResults, front: Sequence[AnyRow], recommended: AnyRow | None, sure: Band | str = "") -> str:
    """The data that the script draws and sorts, as JSON that cannot end its element: no `<` is left in it."""
    rows = list(study.trials)
    index = {row["trial"]: place for place, row in enumerate(rows)}
    used = {key for row in rows for key in row}
    shown = used - _needless(rows)
    table, details = ([key for key in keys if key in shown] for keys in (_TABLE, _DETAILS))
    measures = [name for name in dict.fromkeys([*study.objectives, *_AXES]) if name in used]
    intervals = [f"{name}{end}" for name in _DETAILS for end in ("_low", "_high") if f"{name}{end}" in used]
    keys = [*dict.fromkeys([*table, *measures, *details, "state", "feasible"]), *intervals]
    value = {
        "keys": keys,
        "rows": [[_shown(row.get(key)) for key in keys] for row in rows],
        "front": [index[row["trial"]] for row in front],
        "recommended": None if recommended is None else index[recommended["trial"]],
        "baseline": {name: _shown(study.baseline.get(name)) for name in measures} if study.baseline else None,
        "objectives": study.objectives,
        "band": None if isinstance(sure, str) else band_data(sure, _BAND_DIGITS),
        "axes": measures if len(measures) > 1 else [*study.objectives][:2],
        "labels": {key: _LABELS.get(key, key) for key in keys},
        "decimals": _DECIMALS,
        "details": details,
        "table": table,
    }
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _needless(rows: Sequence[AnyRow]) -> set[str]:
    """Columns that say nothing: settings that go without saying, and a state that all rows share."""
    complete = all(row["state"] == "complete" for row in rows)
    return unsaid_settings(rows) | ({"state"} if complete else set())


def _shown(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def _figures(study: StudyResults, drawn: Sequence[Path] | None) -> str:
    if not study.trials:
        return "<p>No trial has finished.</p>"
    if drawn is not None:
        return "".join(_figure(path) for path in drawn)
    with tempfile.TemporaryDirectory() as folder:
        written = write_figures([study], Path(folder), ["png"], only=FIGURES)
        return "".join(_figure(path) for path in written.paths)


def _figure(path: Path) -> str:
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    caption = escape(path.stem.replace("_", " "))
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _measured(study: StudyResults) -> str:
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
            f"{_LABELS.get(name, name)} ({'more' if way == 'maximize' else 'less'} is better)"
            for name, way in study.objectives.items()
        )
        + "."
    )
    return "".join(f"<p>{escape(text)}</p>" for text in said)


def _count(row: AnyRow, key: str) -> str:
    return f"{row[key]:,}" if key in row else "some"


def _failures(study: StudyResults) -> str:
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


def _environment(study: StudyResults) -> str:
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


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program("dashboards.report"),
        description="Write the report of a study: one HTML file, which opens offline.",
    )
    parser.add_argument("study", metavar="STUDY", help="a name under sweeps/, or the path of an output folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to (report.html in the study's folder)")
    arguments = parser.parse_args(argv)
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise UsageError(f"output {str(arguments.output)!r}: its folder does not exist; create it")
    if arguments.output is not None and arguments.output.is_dir():
        raise UsageError(f"output {str(arguments.output)!r}: a folder; give the name of a file")
    path = write_report(load(arguments.study), arguments.output)
    say(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
