"""Texts that lie in rows: of a JSON or parquet file, or of one split of a data set. One row of them, a book, or all.

No more is read than is asked for: of parquet one column, and of a book its row group alone; of a data set the files of
one split, streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import TextError

SUFFIXES = (".jsonl", ".json", ".parquet")
"""Of files that are tables, of whatever case."""
JOINS = ("lines", "paragraphs")
"""How rows become one text. `lines`: as their own line ends have it, else a line each. `paragraphs`: those that are not
blank, with an empty line between; so the source documents join WikiText."""
_TITLES = ("short_book_title", "title")
"""Columns that titles stand in, PG19's own first."""


@dataclass(frozen=True, slots=True)
class Rows:
    what: str
    """For messages, as "data set 'pg19'"."""
    columns: Sequence[str]
    read: Callable[[str, int, int | None], Iterator[Any]]
    """(column, first row, how many; None: all that follow) -> the column's values there, none past the end."""


def slug(title: str) -> str:
    """Of a title what it is found by, and named by in a label: words, without case and apostrophes."""
    return re.sub(r"\W+", "-", re.sub("['’]", "", title)).strip("-").lower()


def text_of(rows: Rows, book: str | None, join: str) -> str:
    """One row, by its number from 0 or its title, or (None) all of them joined. Raises TextError."""
    if "text" not in rows.columns:
        raise TextError(f"{rows.what}: no column 'text' among {', '.join(rows.columns) or 'none'}")
    if book is None:
        texts = list(rows.read("text", 0, None))
        if not texts:
            raise TextError(f"{rows.what}: no rows")
        return _joined(_strings(rows, texts, 0), join)
    number = int(book) if re.fullmatch(r"-?\d+", book) else _number_of(rows, book)
    texts = list(rows.read("text", number, 1)) if number >= 0 else []
    if not texts:
        count = sum(1 for _ in rows.read(rows.columns[0], 0, None))
        raise TextError(f"book {book}: {rows.what} has {count} rows; give a number from 0 to {count - 1}, or a title")
    return _strings(rows, texts, number)[0]


def _number_of(rows: Rows, book: str) -> int:
    """Of the one title that is `book`, or else "`book` by somebody", or else has those words."""
    column = next((name for name in _TITLES if name in rows.columns), None)
    if column is None:
        raise TextError(
            f"book {book!r}: {rows.what} has no titles (no column {' or '.join(_TITLES)}); give a row's number, from 0"
        )
    titles = [str(title) for title in rows.read(column, 0, None)]
    wanted, slugs = slug(book), [slug(title) for title in titles]
    alike: tuple[Callable[[str], bool], ...] = (
        lambda name: name == wanted,
        lambda name: name.startswith(f"{wanted}-by-"),
        lambda name: f"-{wanted}-" in f"-{name}-",
    )
    found = next((those for test in alike if (those := [n for n, name in enumerate(slugs) if test(name)])), [])
    if len(found) > 1:
        some = ", ".join(f"{titles[number]!r} (--book {number})" for number in found[:5])
        raise TextError(f"book {book!r}: {len(found)} titles of {rows.what} have these words; give a number: {some}")
    if not found:
        names = {name.partition("-by-")[0]: title for name, title in zip(slugs, titles, strict=True)}
        near = ", ".join(repr(names[name]) for name in get_close_matches(wanted, names))
        raise TextError(
            f"book {book!r}: no such title in {rows.what}{f'; near it: {near}' if near else ''}; "
            f"give a title, words of one, or a number from 0 to {len(titles) - 1}"
        )
    return found[0]


def _strings(rows: Rows, texts: list[Any], first: int) -> list[str]:
    for number, text in enumerate(texts, first + 1):
        if not isinstance(text, str):
            raise TextError(f"{rows.what}: 'text' of row {number} is {text!r}, not a string; mend or remove that row")
    return texts


def _joined(texts: list[str], join: str) -> str:
    if join == "paragraphs":
        return "\n\n".join(text for text in texts if text.strip())
    return "".join(texts) if texts[0].endswith("\n") else "\n".join(texts)


def file_rows(path: Path, what: str) -> Rows:
    """Rows of a JSON or parquet file. Raises TextError if it is damaged."""
    unreadable = f"{what}: not readable as {path.suffix}"
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, what, unreadable)
    with _explained(unreadable, ""):
        return _json_rows(path, what)


def _parquet_rows(path: Path, what: str, unreadable: str) -> Rows:
    from pyarrow.parquet import ParquetFile

    def read(column: str, first: int, count: int | None) -> Iterator[Any]:
        with _explained(unreadable, ""), path.open("rb") as content, ParquetFile(content) as file:
            groups, before = [], 0
            for group in range(file.num_row_groups):
                if before + file.metadata.row_group(group).num_rows > first:
                    groups.append(group)
                elif not groups:
                    before += file.metadata.row_group(group).num_rows
            batches = file.iter_batches(batch_size=count or 4096, row_groups=groups, columns=[column])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            yield from islice(values, first - before, None if count is None else first - before + count)

    with _explained(unreadable, ""), path.open("rb") as content, ParquetFile(content) as file:
        return Rows(what, file.schema_arrow.names, read)


def _json_rows(path: Path, what: str) -> Rows:
    """A list of objects, or an object per line; a single object is one row."""
    content = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(content)
    except json.JSONDecodeError:
        whole = [json.loads(line) for line in content.split("\n") if line.strip()]
    rows = whole if isinstance(whole, list) else [whole]
    lacking = next((row for row in rows if not isinstance(row, dict) or "text" not in row), None)
    if lacking is not None:
        return Rows(what, list(lacking) if isinstance(lacking, dict) else [], lambda *_: iter(()))

    def read(column: str, first: int, count: int | None) -> Iterator[Any]:
        return (row.get(column) for row in islice(rows, first, None if count is None else first + count))

    return Rows(what, list(rows[0]) if rows else ["text"], read)


def dataset_rows(name: str, config: str | None, split: str, what: str, by_file: bool) -> Rows:
    """Rows of one split of a data set of the hub, or of a folder in its layout; of others no file is opened. `by_file`:
    a plain text is one row, its file's name the title, and not a row per line.

    Raises TextError if there is no such data set or split."""
    builder = _builder(name, config, what)
    splits = list(builder.config.data_files or builder.info.splits or ())
    if split not in splits:
        raise TextError(f"split {split!r}: {what} has {', '.join(splits)}; give --split with one of these")
    files = list((builder.config.data_files or {}).get(split, ()))

    def read(column: str, first: int, count: int | None) -> Iterator[Any]:
        last = None if count is None else first + count
        with _explained(what):
            stream = _stream(_builder(name, config, what), split, column)
            yield from (row[column] for row in islice(stream, first, last))

    def read_files(column: str, first: int, count: int | None) -> Iterator[Any]:
        chosen = files[first : None if count is None else first + count]
        if column == "title":
            yield from (PurePosixPath(file).stem for file in chosen)
        elif chosen:
            with _explained(what):
                documents = _builder(name, config, what)
                documents.config.sample_by, documents.config.encoding = "document", "utf-8-sig"
                yield from (row["text"] for row in _stream(documents, split, column, chosen))

    if by_file and hasattr(builder.config, "sample_by"):
        return Rows(what, ["title", "text"], read_files)
    with _explained(what):
        stream = _stream(builder, split)
        return Rows(what, stream.column_names or list(next(iter(stream), {"text": None})), read)


def _builder(name: str, config: str | None, what: str) -> Any:
    """Knows the files of a data set, and has opened none. It serves for one stream: it remembers that one's columns."""
    import datasets

    datasets.disable_progress_bars()
    with _explained(what):
        return datasets.load_dataset_builder(name, name=config)


def _stream(builder: Any, split: str, column: str | None = None, files: Sequence[str] | None = None) -> Any:
    """Rows (dict) of one split: the builder is made to forget the others, whose first file it would look into."""
    if builder.config.data_files:  # else it is a cached data set, which has no files but its own
        builder.config.data_files = {split: files or builder.config.data_files[split]}
    if column is not None and hasattr(builder.config, "columns"):  # parquet
        builder.config.columns = [column]
    return builder.as_streaming_dataset(split=split)


@contextmanager
def _explained(what: str, fix: str = "; give a cached hub id, a local folder or --text FILE") -> Iterator[None]:
    """`datasets` and pyarrow raise a dozen kinds for a name, a network or a file that is not there or damaged."""
    try:
        yield
    except TextError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TextError(f"{what}: {reason[:200]}{fix}" if fix else f"{what} ({reason[:200]})") from error
