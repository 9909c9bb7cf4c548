"""The formats a table is written in. Adding one is adding an entry to `FORMATS`.

For reading: Markdown, LaTeX, HTML, with digits by the interval and the baseline below. For computing: CSV, JSON,
Parquet, with all digits, intervals in columns of their own and the rows' own keys as headers.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streamllm.errors import UsageError

from .columns import Column
from .content import Table
from .latex import latex

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Format:
    suffix: str
    """The file's suffix, without the dot."""
    write: Callable[[Table], str | bytes]


def markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown(cell) for cell in cells) + " |"

    lines = [
        f"# {table.title}",
        *(f"\n{text}" for text in table.summary),
        "",
        line([column.title for column in table.columns]),
        "|" + "|".join("---:" if _is_right(column) else "---" for column in table.columns) + "|",
        *(line(cells) for cells in table.cells),
        *(f"\n{text}" for text in table.notes),
        "",
    ]
    return "\n".join(lines)


def html_page(table: Table) -> str:
    """A page of its own, which needs nothing else: its table breaks lines rather than run wide, and scrolls by itself
    where that is not enough."""

    def line(cells: Sequence[str], tag: str) -> str:
        pairs = zip(cells, table.columns, strict=True)
        return "".join(f"<{tag}{' class=r' if _is_right(c) else ''}>{_html_cell(text)}</{tag}>" for text, c in pairs)

    body = [
        f"<tr{' class=recommended' if row.get('recommended') else ''}>{line(cells, 'td')}</tr>"
        for row, cells in zip((*table.rows, *table.baselines), table.cells, strict=True)
    ]
    body.insert(len(table.rows), "</tbody><tbody>")
    title = html.escape(table.title)
    return "\n".join(
        (
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            *(f"<p>{html.escape(text)}</p>" for text in table.summary),
            f'<div class="wide" tabindex="0" role="region" aria-label="{title}">',
            f"<table><thead><tr>{line([column.title for column in table.columns], 'th')}</tr></thead><tbody>",
            *body,
            "</tbody></table></div>",
            *(f"<p>{html.escape(text)}</p>" for text in table.notes),
            "</body></html>",
            "",
        )
    )


def _html_cell(text: str) -> str:
    """An interval stays in one piece, on a line of its own where there is no room beside its value."""
    value, bracket, interval = text.partition(" [")
    return f"{html.escape(value)} <span>[{html.escape(interval)}</span>" if bracket else html.escape(text)


def comma_separated(table: Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, table.keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return text.getvalue()


def json_records(table: Table) -> str:
    """A list of objects with the same keys, one a line; what is missing or not finite is null."""
    keys = table.keys
    records = [json.dumps({key: _finite(row.get(key)) for key in keys}, allow_nan=False) for row in table.rows]
    return "[\n" + ",\n".join(records) + "\n]\n"


def parquet(table: Table) -> bytes:
    buffer = io.BytesIO()
    data_frame(table).to_parquet(buffer, index=False)
    return buffer.getvalue()


def data_frame(table: Table) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame.from_records([[row.get(key) for key in table.keys] for row in table.rows], columns=table.keys)
    return frame.convert_dtypes()


FORMATS: dict[str, Format] = {
    "md": Format("md", markdown),
    "csv": Format("csv", comma_separated),
    "latex": Format("tex", latex),
    "json": Format("json", json_records),
    "parquet": Format("parquet", parquet),
    "html": Format("html", html_page),
}
"""The formats by the name that `--format` takes."""


def write_file(path: Path, content: str | bytes) -> None:
    """Creates the folder too. Raises UsageError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UsageError(f"output {str(path)!r}: cannot be written ({error.strerror})") from error


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2024;--quiet:#5f6b76;--line:#d9dee3;--accent:#eaf3fa}
@media(prefers-color-scheme:dark){
:root{--paper:#14181c;--ink:#e6e9ec;--quiet:#9aa6b2;--line:#343c44;--accent:#1b2f3e}}
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;background:var(--paper);color:var(--ink)}
h1{font-size:1.5em}p{max-width:90ch;overflow-wrap:anywhere}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93em}
th,td{padding:.25em .4em;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);max-width:24em}
th{vertical-align:bottom}td span{white-space:nowrap}.r{text-align:right}
thead,tbody+tbody{border-top:1px solid;border-bottom:1px solid}
td:first-child,th:first-child{position:sticky;left:0;background:var(--paper)}
tbody+tbody{color:var(--quiet)}.recommended,.recommended td:first-child{background:var(--accent)}
"""


def _is_right(column: Column) -> bool:
    return not column.words


def _markdown(text: str) -> str:
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "|\\`*" else c for c in escaped)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
