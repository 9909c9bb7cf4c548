"""`python -m dashboards.summarize RESULTS_DIR`: the results of single evaluations in one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from streamllm.errors import UsageError
from streamllm.results.schema import POLICY_WORDS, AnyRow
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.printing import say
from streamllm.terminal.program import command, program

from .tables.columns import BY_KEY, POLICY_COLUMNS, SPEEDUP, Column, unsaid_settings
from .tables.content import Table
from .tables.evaluations import read_results
from .tables.formats import FORMATS, write_file

EVALUATION_COLUMNS = (
    *map(Column.of, ("model", "dataset", "n_tokens", "protocol")),
    *(BY_KEY[key] for key in ("method", "backend", "execution", "quantization")),
    *POLICY_COLUMNS,
    *(BY_KEY[field.name] for field in POLICY_WORDS),
    *(BY_KEY[key] for key in ("peak_kv", "peak_kv_mib", "perplexity", "ppl_increase_percent", "tpot_ms")),
    SPEEDUP,
    *map(Column.of, ("decode_toks_per_sec", "runtime_sec", "measuring_sec", "prefill_sec")),
    *map(Column.of, ("first_token_latency_sec", "avg_attn_ms")),
    BY_KEY["peak_memory_mb"],
    Column("file", "file", words=True),
)


def summary_table(rows: Sequence[AnyRow], folder: Path) -> Table:
    """The rows by model, data set and protocol, the baseline first; columns that no row has are left out."""

    def order(row: AnyRow) -> tuple[list[str], bool, str, str]:
        group = [str(row.get(key, "")) for key in ("model", "dataset", "protocol")]
        return group, row.get("role") != "baseline", str(row.get("method", "")), str(row.get("file", ""))

    protocols = {row.get("protocol") for row in rows}
    notes = ("Times by different protocols are not comparable.",) if len(protocols) > 1 else ()
    unsaid = unsaid_settings(rows) & {field.name for field in POLICY_WORDS}
    told = [column for column in EVALUATION_COLUMNS if column.key not in unsaid]
    columns = tuple(column for column in told if any(column.text(row) for row in rows))
    return Table(f"Results in {folder.name or folder}", (), columns, sorted(rows, key=order), notes=notes)


@command
def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    folder = arguments.results_dir or arguments.folder
    if folder is None:
        raise UsageError("no RESULTS_DIR: give the folder with the JSON files")
    chosen = _format(arguments.format, arguments.output_file)
    rows, problems = read_results(folder)
    for problem in problems:
        print(f"warning: left out {problem}", file=sys.stderr)
    if not rows:
        raise UsageError(
            f"results {str(folder)!r}: no JSON file in it has results, as `streamllm evaluate --output-file` "
            "writes; python -m dashboards.pareto shows studies"
        )
    content = FORMATS[chosen].write(summary_table(rows, folder))
    if arguments.output_file is None:
        say(content)
    else:
        write_file(arguments.output_file, content)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog=program("dashboards.summarize"),
        description="One table of the JSON results of `streamllm evaluate --output-file`, or of the source documents.",
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="RESULTS_DIR", help="searched with its subfolders")
    parser.add_argument("--results-dir", type=Path, metavar="DIR", help="the same, as the source documents spell it")
    parser.add_argument("--format", choices=FORMATS, help="format (by the output file's name, or md)")
    parser.add_argument("--output-file", type=Path, metavar="FILE", help="where the table is written (standard output)")
    return parser.parse_args(argv)


def _format(name: str | None, file: Path | None) -> str:
    """Raises UsageError."""
    if name is not None or file is None:
        return name or "md"
    by_suffix = {f".{form.suffix}": name for name, form in FORMATS.items()}
    if file.suffix not in by_suffix:
        raise UsageError(f"output {str(file)!r}: must end in {', '.join(by_suffix)}, or give --format")
    return by_suffix[file.suffix]


if __name__ == "__main__":
    sys.exit(main())
