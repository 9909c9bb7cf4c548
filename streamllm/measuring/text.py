"""The token stream a policy is evaluated on, pinned by a digest."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TextError, reason_of, shown
from ..files import is_file, is_folder
from ..testbed import TEXT_FILE
from .tables import JOINS, SUFFIXES, dataset_rows, file_rows, slug, text_of

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

HUB_DATASETS = {"wikitext": ("Salesforce/wikitext", "wikitext-103-v1"), "pg19": ("emozilla/pg19", None)}
"""Short names -> hub id and default configuration. Script data sets are gone from `datasets`: these are parquet."""


_NO_TOKENIZER = "this model has no tokenizer; give token_ids, a file of them"
_CHARACTERS = 64
"""Far more than a token has on average."""
_LONGEST_BOOK = 40
"""Characters of a label, which is a folder's name too."""


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where tokens come from: a text file (plain, JSON or parquet), a JSON list of token ids, a data set, or (all None)
    the embedded text."""

    text: Path | None = None
    token_ids: Path | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    split: str = "test"
    """Split of the data set."""
    offset: int = 0
    """Tokens of the text to skip; what the tokenizer puts before every text (its BOS) stays the first token."""
    max_eval_tokens: int | None = None
    """How many tokens there are at most, the BOS among them."""
    book: str | None = None
    """The one row to read, of a data set or table: its number from 0, its title or words of that. None: of PG19 the
    first, of others all."""
    join: str = "lines"
    """How rows become one text, see `JOINS`."""

    @property
    def name(self) -> str:
        """Name of the data set or file."""
        if self.dataset_name is not None:
            return Path(self.dataset_name).name
        file = self.text or self.token_ids
        return file.stem if file is not None else "testbed"

    @property
    def label(self) -> str:
        """A short name for tables, tags and studies; of another book, split or join it is another."""
        split = self.split if self.split != "test" else ""
        book = slug(self.book or "")
        if len(book) > _LONGEST_BOOK:
            book = f"{book[:_LONGEST_BOOK]}-{hashlib.sha256(book.encode()).hexdigest()[:6]}"
        return "-".join(filter(None, (self.name, split, book, self.join if self.join != "lines" else "")))

    @property
    def row(self) -> str | None:
        """The book to read; None: all rows."""
        return "0" if self.book is None and self.dataset_name is not None and self.name == "pg19" else self.book

    def __post_init__(self) -> None:
        """From Python, a file's name will do."""
        for name in ("text", "token_ids"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))

    def check(self) -> None:
        """Raises TextError for what can be seen to be wrong without reading anything."""
        self._check_types()
        given = [value for value in (self.text, self.token_ids, self.dataset_name) if value is not None]
        if len(given) > 1:
            raise TextError("text, token_ids, dataset_name: several are given; give one of them")
        for path in (self.text, self.token_ids):
            if path is not None and not is_file(path):
                raise TextError(f"text {shown(str(path))}: {_why_no_file(path)}")
        self._check_rows()
        if self.offset < 0:
            raise TextError(f"offset {shown(self.offset)}: must be a whole number >= 0")
        if self.max_eval_tokens is not None and self.max_eval_tokens < 2:
            raise TextError(
                f"max_eval_tokens {shown(self.max_eval_tokens)}: must be >= 2 (one token to predict another)"
            )

    def _check_types(self) -> None:
        """Of values from Python; the command line's are what they should be."""
        for name in ("text", "token_ids"):
            if not isinstance(value := getattr(self, name), Path | None):
                raise TextError(f"{name} {shown(value)}: must be a path")
        for name in ("dataset_name", "dataset_config", "split", "book", "join"):
            if not isinstance(value := getattr(self, name), str | None):
                raise TextError(f"{name} {shown(value)}: must be a text")
        length = 2 if self.max_eval_tokens is None else self.max_eval_tokens
        for name, value in (("offset", self.offset), ("max_eval_tokens", length)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TextError(f"{name} {shown(value)}: must be a whole number")

    def _check_rows(self) -> None:
        if self.split != "test" and self.dataset_name is None:
            raise TextError(f"split {shown(self.split)}: is for data sets; give dataset_name, or leave split out")
        if self.join not in JOINS:
            raise TextError(f"join {shown(self.join)}: must be one of {', '.join(JOINS)}")
        if self.book is not None and not slug(self.book):
            raise TextError(f"book {shown(self.book)}: must be a title, words of one, or a number from 0")
        asked = self._asked_of_rows()
        if asked and self.dataset_name is None and (self.text is None or not _is_table(self.text)):
            raise TextError(
                f"{asked}: is for texts in rows; give dataset_name, or as text a file with {', '.join(SUFFIXES)}, "
                f"or leave it out"
            )
        if self.join != "lines" and self.row is not None:
            raise TextError(f"join {shown(self.join)}: joins many rows, and a book is one; leave join out")

    def _asked_of_rows(self) -> str:
        """The option that only rows can satisfy, as a message names it; empty: none."""
        if self.book is not None:
            return f"book {shown(self.book)}"
        return f"join {shown(self.join)}" if self.join != "lines" else ""


@dataclass(frozen=True, slots=True)
class TokenStream:
    tokens: np.ndarray
    """int64 (n)."""
    label: str
    digest: str
    """sha256 of the token ids."""
    bos: bool = False
    """Whether it begins with what the tokenizer puts before every text, at whatever offset."""


def load_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> TokenStream:
    """Reads and tokenizes; `tokenizer` is needed unless the source is token ids.

    Raises TextError for unreadable, empty or foreign input."""

    source.check()
    if source.token_ids is not None:
        return _stream(source, _read_ids(source.token_ids), 0, vocabulary)
    if tokenizer is None:
        raise TextError(_NO_TOKENIZER)
    ids = _ids(tokenizer, _read_text(source), source)
    return _stream(source, ids, _lead(tokenizer, ids), vocabulary)


def check_text(
    source: TextSource, tokenizer: Callable[[], PreTrainedTokenizerBase | None], vocabulary: int | None
) -> None:
    """Raises what `load_tokens` would, of a text that need not be downloaded. No more of it is tokenized than tells
    whether it is long enough. vocabulary: None where it is not known yet."""
    source.check()
    vocabulary = sys.maxsize if vocabulary is None else vocabulary
    if source.token_ids is not None:
        load_tokens(source, None, vocabulary)
        return
    if source.dataset_name is not None and local_data(source.dataset_name) is None:
        return
    text, able = _read_text(source), tokenizer()
    if able is None:
        raise TextError(_NO_TOKENIZER)
    for part in (text[: _CHARACTERS * (source.offset + _CHARACTERS)], text):
        ids = _ids(able, part, source)
        lead = _lead(able, ids)
        if len(ids) >= lead + source.offset + 2:
            break
    _stream(source, ids, lead, vocabulary)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, source: TextSource) -> list[int]:
    """Raises TextError."""
    try:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    except BaseException as error:  # of a broken tokenizer: anything, and Rust's panic
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise TextError(
            f"text {shown(source.label)}: the model's tokenizer fails on it ({reason_of(error)})"
        ) from error
    return ids


def _stream(source: TextSource, ids: list[int], lead: int, vocabulary: int) -> TokenStream:
    """The part of the text's token ids that is asked for. Raises TextError."""
    import numpy as np

    chosen = (ids[:lead] + ids[lead + source.offset :])[: source.max_eval_tokens]
    foreign = next((token for token in chosen if not 0 <= token < vocabulary), None)
    if foreign is not None:
        raise TextError(
            f"text {shown(source.label)}: token id {shown(foreign)}, the model knows 0 .. {vocabulary - 1}; "
            f"give its own"
        )
    if len(chosen) < 2:
        raise TextError(
            f"text {shown(source.label)}: {len(chosen)} of its {len(ids)} tokens are left after offset "
            f"{source.offset}, at least 2 are needed; lower offset or give a longer text"
        )
    tokens = np.array(chosen, dtype=np.int64)
    return TokenStream(tokens, source.label, hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(), lead > 0)


def _why_no_file(path: Path) -> str:
    if is_folder(path):
        return "not a file, but a folder; give a file in it"
    with suppress(OSError, ValueError):
        if path.exists():
            return "not a file, but a device or a pipe, which cannot be read again; copy what is in it to one"
    return "no such file; give one, or leave it out for the embedded text"


def _lead(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """How many special tokens the tokenizer put before the text: what it begins with that an empty one begins with."""
    empty = tokenizer("", verbose=False)["input_ids"]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, empty, strict=False)))


def file_digest(source: TextSource) -> str | None:
    """sha256 of the file that the text is read from; None of a data set that comes from the hub or is a folder."""
    path = source.text or source.token_ids or (TEXT_FILE if source.dataset_name is None else None)
    if path is None:
        path = local_data(str(source.dataset_name))
    if path is None or not is_file(path):
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_ids(path: Path) -> list[int]:
    what = f"token ids {shown(str(path))}"
    try:
        ids = json.loads(_decoded(path, what))
    except (ValueError, RecursionError) as error:  # of a number of thousands of digits too
        if isinstance(error, TextError):
            raise
        raise TextError(f"{what}: not JSON ({reason_of(error, 100)}); give a list as [17, 4, 256]") from error
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise TextError(f"{what}: must be one JSON list of whole numbers, as [17, 4, 256]")
    return ids


def _decoded(path: Path, what: str) -> str:
    """A file of UTF-8; a byte-order mark is no part of it. Raises TextError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{what}: not UTF-8 ({error.reason} in byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise TextError(f"{what}: cannot be read ({error.strerror}); let yourself read it") from error


def _read_text(source: TextSource) -> str:
    if source.dataset_name is not None:
        text = _read_dataset(source)
    else:
        path = source.text or TEXT_FILE
        text = _read_file(path, f"text {shown(str(path))}", source)
    if "\0" in text:
        raise TextError(f"text {shown(source.name)}: not a text, or not in UTF-8: it has NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name what is none
        bad = f"{text[error.start]!r} (character {error.start})"
        raise TextError(f"text {shown(source.name)}: not a text: it has half a character, {bad}; mend it") from None
    return text


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _read_file(path: Path, what: str, source: TextSource) -> str:
    if _is_table(path):
        return text_of(file_rows(path, what), source.row, source.join)
    if asked := source._asked_of_rows():
        raise TextError(f"{asked}: is for texts in rows, and {what} is one plain text ({path.name}); leave it out")
    return _decoded(path, what)


def hub_name(source: TextSource) -> tuple[str, str | None]:
    """Hub id or folder, and configuration."""
    given = str(source.dataset_name)
    name, config = HUB_DATASETS.get(given, (given, None))
    if source.dataset_config in (None, given):  # the source documents write `--dataset-config pg19`, which has none
        return name, config
    return name, source.dataset_config


def _read_dataset(source: TextSource) -> str:
    """The `text` column of a split: one book, or all rows joined."""
    what = f"data set {shown(source.dataset_name)}"
    name, config = hub_name(source)
    local = local_data(str(source.dataset_name))
    if local is not None and not local.is_dir():
        if source.split != "test":
            raise TextError(
                f"split {shown(source.split)}: {what} is the one file {str(local)!r}; leave split out, or put a folder "
                f"in the hub's layout there"
            )
        return _read_file(local, what, source)
    if local is not None:
        part = local / config if config is not None and (local / config).is_dir() else local
        name, config = str(part), None
    return text_of(dataset_rows(name, config, source.split, what, source.row is not None), source.row, source.join)


def local_data(name: str) -> Path | None:
    """Where the folder that `STREAMLLM_DATA` names has the data set: NAME.txt, .jsonl, .parquet, or a folder NAME in
    the hub's layout. None if it does not, or the variable is not set. Raises TextError if that is no folder."""
    root = os.environ.get("STREAMLLM_DATA")
    if not root or Path(name).name != name:
        return None
    what = f"STREAMLLM_DATA {shown(root)}"
    if not is_folder(Path(root)):
        raise TextError(f"{what}: no such folder; it is to hold data sets as NAME.txt or NAME.parquet")
    try:
        there = {path.with_suffix(path.suffix.lower()).name: path for path in sorted(Path(root).iterdir())}
    except OSError as error:
        raise TextError(f"{what}: cannot be read ({error.strerror}); let yourself read it") from error
    candidates = (f"{name}{suffix}" for suffix in (".txt", ".jsonl", ".parquet", ""))
    return next((there[candidate] for candidate in candidates if candidate in there), None)
