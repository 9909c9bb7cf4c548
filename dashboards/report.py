"""The report of a study, one HTML file that needs nothing else: `python -m dashboards.report STUDY`."""

from __future__ import annotations

import base64
import hashlib
import string
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from streamllm.errors import UsageError
from streamllm.files import write_atomically
from streamllm.results.study import StudyResults
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.printing import say
from streamllm.terminal.program import command, program

from .drawing.captions import caption
from .figures import ROW_FIGURES, STUDY_FIGURES, write_figures
from .findings import findings
from .loading import load
from .page.band import band_note, band_or_reason
from .page.data import data
from .page.front import front_call, front_note, front_table
from .page.sections import environment, failures, measured, summary
from .tables.conditions import EXAMPLE, GRAMMAR
from .tables.matrix_html import html_of, tables_of

_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("conditions", "scales", "study", "chart", "origins", "table", "start")
"""In the order in which they use one another."""
_SUMMED_UP = ("main_comparison", "fixed_eval_speedup", "fixed_eval_ppl_comparison", "fixed_eval_ppl_increase",
              "fixed_eval_runtime")  # fmt: skip
_PANORAMA = 2
"""Width over height from which a picture is of several side by side, and too small to read in a narrow window."""
FIGURES = tuple(name for name in (*STUDY_FIGURES, *ROW_FIGURES) if name not in _SUMMED_UP)
"""All but what `results_summary` shows as well."""


def write_report(study: StudyResults, path: Path | None = None, figures: Sequence[Path] | None = None) -> Path:
    """Writes the report, `report.html` in the study's folder unless given. Returns the file.

    figures: PNGs of `FIGURES` that are there already; without them they are drawn."""
    path = path or study.folder / "report.html"
    write_atomically(path, report(study, figures, path.parent))
    return path


def report(study: StudyResults, figures: Sequence[Path] | None = None, at: Path | None = None) -> str:
    """The page. All that comes from the study is escaped; no script runs but its own, whose digest its policy names.

    at: the folder that it will lie in, from which it links to the study's files; the study's unless given."""
    if study.is_matrix:
        return _matrix_report(study)
    front = study.front
    found = findings(study, front)
    sure = band_or_reason(study)
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return string.Template((_PAGE / "report.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'",
        title=escape(study.name),
        subtitle=escape(f"{study.configuration['summary']}.{_as_of(study)}"),
        style=(_PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        summary=summary(found),
        front_table=front_table(study, front, found.recommended),
        front_note=front_note(study, front),
        front_call=escape(front_call(study, front)),
        grammar="".join(f"<p>{escape(text)}</p>" for text in GRAMMAR),
        example=escape(EXAMPLE),
        band=band_note(sure),
        data=data(study, front, found.recommended, at or study.folder, sure),
        figures=_figures(study, figures),
        measured=measured(study),
        failures=failures(study),
        environment=environment(study),
    )


def _script() -> str:
    """The scripts as one, whose names are nobody else's."""
    parts = ((_PAGE / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"


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
        failures=failures(study),
        environment=environment(study),
    )


def _as_of(study: StudyResults) -> str:
    """When the study ended, or its last trial did: the same study makes the same page, whenever it is written."""
    times = [row["finished_at"] for row in study.trials if "finished_at" in row]
    at = study.files.read_outcome()[1] or max(times, default=None)
    return "" if at is None else f" As of {time.strftime('%Y-%m-%d %H:%M', time.localtime(at))}."


def _figures(study: StudyResults, drawn: Sequence[Path] | None) -> str:
    if not study.trials:
        return "<p>No trial has finished.</p>"
    if drawn is not None:
        return "".join(_figure(path) for path in drawn)
    with tempfile.TemporaryDirectory() as folder:
        written = write_figures([study], Path(folder), ["png"], only=FIGURES)
        return "".join(_figure(path) for path in written.paths)


def _figure(path: Path) -> str:
    """A picture of several side by side is as wide as it needs, in a narrow window wider than that."""
    png = path.read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    kind = ' class="panorama"' if width > _PANORAMA * height else ""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    name, said = escape(path.stem.replace("_", " ")), escape(caption(path.stem))
    picture = f'<div class="wide"><img{kind} src="{source}" alt="{name}"></div>'
    return f"<figure>{picture}<figcaption>{said}</figcaption></figure>"


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
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
