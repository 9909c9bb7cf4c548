"""Texts that lie in rows: of a JSON or parquet file, or of one split of a data set. One row of them, a book, or all.

No more is read than is asked for: of parquet one column, and of a book its row group alone; of a data set the files of
one split, streamed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from ..errors import TextError, plain, reason_of, shown

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

SUFFIXES = (".jsonl", ".json", ".parquet")
"""Suffixes of files that are tables, in any case."""
JOINS = ("lines", "paragraphs")
"""How rows become one text. `lines`: as their own line ends have it, else a line each. `paragraphs`: those that are not
blank, with an empty line between; so the source documents join WikiText."""
_TITLES = ("short_book_title", "title")
"""Columns that titles stand in, PG19's own first."""
_FIX = "; give a cached hub id, a local folder or a file as text"


@dataclass(frozen=True, slots=True)
class Rows:
    what: str
    """For messages, as "data set 'pg19'"."""
    columns: Sequence[str]
    read: Callable[[str, int, int | None], Iterator[object]]
    """(column, first row, how many; None: all that follow) -> the column's values there, none past the end."""


def slug(title: str) -> str:
    """The form of a title by which it is found, and named in a label: words, without case and apostrophes."""
    return re.sub(r"\W+", "-", re.sub("['’]", "", title)).strip("-").lower()


def text_of(rows: Rows, book: str | None, join: str) -> str:
    """One row, by its number from 0 or its title, or (None) all of them joined. Raises TextError."""
    if "text" not in rows.columns:
        columns = plain(", ".join(rows.columns), 200) or "none"
        raise TextError(f"{rows.what}: no column 'text' among {columns}; the text must be in a column of that name")
    if book is None:
        texts = list(rows.read("text", 0, None))
        if not texts:
            raise TextError(f"{rows.what}: no rows; give another file or split")
        return _joined(_strings(rows, texts, 0), join)
    number = int(book) if re.fullmatch(r"-?\d{1,18}", book) else _number_of(rows, book)
    texts = list(rows.read("text", number, 1)) if number >= 0 else []
    if not texts:
        count = sum(1 for _ in rows.read(rows.columns[0], 0, None))
        raise TextError(
            f"book {plain(book)}: {rows.what} has {count} rows; give a number from 0 to {count - 1}, or a title"
        )
    return _strings(rows, texts, number)[0]


def _number_of(rows: Rows, book: str) -> int:
    """The number of the one title that is `book`, or else "`book` by somebody", or else has those words."""
    column = next((name for name in _TITLES if name in rows.columns), None)
    if column is None:
        raise TextError(
            f"book {shown(book)}: {rows.what} has no titles (no column {' or '.join(_TITLES)}); "
            f"give a row's number, from 0"
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
        some = ", ".join(f"{titles[number]!r} (book {number})" for number in found[:5])
        raise TextError(f"book {book!r}: {len(found)} titles of {rows.what} have these words; give a number: {some}")
    if not found:
        names = {name.partition("-by-")[0]: title for name, title in zip(slugs, titles, strict=True)}
        near = ", ".join(repr(names[name]) for name in get_close_matches(wanted, names))
        raise TextError(
            f"book {shown(book)}: no such title in {rows.what}{f'; near it: {near}' if near else ''}; "
            f"give a title, words of one, or a number from 0 to {len(titles) - 1}"
        )
    return found[0]


def _strings(rows: Rows, texts: Sequence[object], first: int) -> list[str]:
    for number, text in enumerate(texts, first + 1):
        if not isinstance(text, str):
            raise TextError(
                f"{rows.what}: 'text' of row {number} is {shown(text)}, not a string; mend or remove that row"
            )
    return [text for text in texts if isinstance(text, str)]


def _joined(texts: list[str], join: str) -> str:
    if join == "paragraphs":
        return "\n\n".join(text for text in texts if text.strip())
    return "".join(texts) if texts[0].endswith("\n") else "\n".join(texts)


def file_rows(path: Path, what: str) -> Rows:
    """Rows of a JSON or parquet file. Raises TextError if it is damaged."""
    damaged = f"{what}: not readable as {path.suffix}"
    if path.suffix.lower() == ".parquet":
        return _parquet_rows([str(path)], what, damaged)
    with _explained(damaged, ""):
        return _json_rows(path, what)


def _parquet_rows(files: Sequence[str], what: str, damaged: str, fix: str = "") -> Rows:
    """Rows from files of one schema, local or an address that fsspec knows. Not by `datasets`: where reading stops
    before the end, as after a book, the threads of pyarrow's scanner now and then abort the process when it ends."""
    from pyarrow.parquet import ParquetFile

    def read(column: str, first: int, count: int | None) -> Iterator[object]:
        last = math.inf if count is None else first + count
        before = 0
        for name in files:
            if before >= last:
                return
            with _explained(damaged, fix), _opened(name) as content, ParquetFile(content) as file:
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    start, stop = max(first - before, 0), min(size, last - before)
                    if start < stop:
                        values = file.read_row_group(group, columns=[column]).column(0)
                        yield from values.slice(start, stop - start).to_pylist()
                    before += size

    with _explained(damaged, fix), _opened(files[0]) as content, ParquetFile(content) as file:
        return Rows(what, file.schema_arrow.names, read)


def _opened(name: str) -> AbstractContextManager[IO[bytes]]:
    if "://" not in name:
        return Path(name).open("rb")
    import fsspec

    remote: AbstractContextManager[IO[bytes]] = fsspec.open(name, "rb")
    return remote


def _json_rows(path: Path, what: str) -> Rows:
    """A list of objects, or an object per line; a single object is one row."""
    content = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(content)
    except json.JSONDecodeError:
        whole = [json.loads(line) for line in content.split("\n") if line.strip()]
    rows = whole if isinstance(whole, list) else [whole]
    lacking = next((row for row in rows if not isinstance(row, dict) or "text" not in row), rows)
    if lacking is not rows:
        return Rows(what, [str(column) for column in lacking] if isinstance(lacking, dict) else [], lambda *_: iter(()))

    def read(column: str, first: int, count: int | None) -> Iterator[object]:
        return (row.get(column) for row in islice(rows, first, None if count is None else first + count))

    return Rows(what, list(rows[0]) if rows else ["text"], read)


def dataset_rows(name: str, config: str | None, split: str, what: str, by_file: bool) -> Rows:
    """Rows of one split of a data set of the hub, or of a folder in its layout; of others no file is opened. `by_file`:
    a plain text is one row, its file's name the title, and not a row per line.

    Raises TextError if there is no such data set or split."""
    import datasets

    datasets.disable_progress_bars()
    with _explained(what):
        builder = datasets.load_dataset_builder(name, name=config)
    there = builder.config.data_files or {}  # a cached data set has none
    splits = [str(one) for one in there or builder.info.splits or ()]
    if split not in splits:
        raise TextError(f"split {shown(split)}: {what} has {', '.join(splits)}; give one of these as split")
    files = [str(file) for file in there.get(split, ())]
    if files and all(file.endswith(".parquet") for file in files):
        return _parquet_rows(files, what, what, _FIX)
    if by_file and hasattr(builder.config, "sample_by"):
        return _document_rows(builder, split, files, what)
    return _streamed_rows(builder, split, files, what)


def _streamed_rows(builder: DatasetBuilder, split: str, files: list[str], what: str) -> Rows:
    def read(column: str, first: int, count: int | None) -> Iterator[object]:
        with _explained(what):
            last = None if count is None else first + count
            yield from (row[column] for row in islice(_stream(builder, split, files), first, last))

    with _explained(what):
        stream = _stream(builder, split, files)
        return Rows(what, stream.column_names or list(next(iter(stream), {"text": None})), read)


def _document_rows(builder: DatasetBuilder, split: str, files: list[str], what: str) -> Rows:
    """A row per text file."""
    builder.config.sample_by, builder.config.encoding = "document", "utf-8-sig"

    def read(column: str, first: int, count: int | None) -> Iterator[object]:
        chosen = files[first : None if count is None else first + count]
        if column == "title":
            yield from (PurePosixPath(file).stem for file in chosen)
        elif chosen:
            with _explained(what):
                yield from (row["text"] for row in _stream(builder, split, chosen))

    return Rows(what, ["title", "text"], read)


def _stream(builder: DatasetBuilder, split: str, files: list[str]) -> IterableDataset:
    """Rows (dict) of a split, of these files only: the builder would look into the first file of every split."""
    if files:
        builder.config.data_files = {split: files}
    return builder.as_streaming_dataset(split=split)


@contextmanager
def _explained(what: str, fix: str = _FIX) -> Iterator[None]:
    """`datasets` and pyarrow raise a dozen kinds for a name, a network or a file that is not there or damaged."""
    try:
        yield
    except TextError:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise TextError(f"{what}: {reason}{fix}" if fix else f"{what} ({reason})") from error
