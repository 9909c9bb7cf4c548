"""The token stream a policy is evaluated on, pinned by a digest."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .testbed import TEXT_FILE

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

HUB_DATASETS = {"wikitext": ("Salesforce/wikitext", "wikitext-103-v1"), "pg19": ("emozilla/pg19", None)}
"""Short names -> hub id and default configuration. Script data sets are gone from `datasets`: these are parquet."""


class TextError(UsageError):
    """No such text, or too little of it; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where tokens come from: a text file (plain, JSON lines or parquet), a JSON list of token ids, a data set, or (all
    None) the embedded text."""

    text: Path | None = None
    token_ids: Path | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    split: str = "test"
    offset: int = 0
    """Tokens to skip."""
    max_eval_tokens: int | None = None

    @property
    def label(self) -> str:
        """A short name for tables and tags."""
        if self.dataset_name is not None:
            return Path(self.dataset_name).name
        file = self.text or self.token_ids
        return file.stem if file is not None else "testbed"

    def check(self) -> None:
        """Raises TextError for what can be seen to be wrong without reading anything."""
        given = [value for value in (self.text, self.token_ids, self.dataset_name) if value is not None]
        if len(given) > 1:
            raise TextError("give one of --text, --token-ids and --dataset-name, not several")
        for path in (self.text, self.token_ids):
            if path is not None and not path.is_file():
                raise TextError(f"text {str(path)!r}: {'not a file' if path.exists() else 'no such file'}")
        if self.offset < 0:
            raise TextError(f"offset {self.offset}: must be >= 0 tokens")
        if self.max_eval_tokens is not None and self.max_eval_tokens < 2:
            raise TextError(f"max_eval_tokens {self.max_eval_tokens}: must be >= 2 (one token to predict another)")


@dataclass(frozen=True, slots=True)
class TokenStream:
    tokens: np.ndarray
    """int64 (n)."""
    label: str
    digest: str
    """sha256 of the token ids."""


def load_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> TokenStream:
    """Reads and tokenizes; `tokenizer` is needed unless the source is token ids.

    Raises TextError for unreadable, empty or foreign input."""
    import numpy as np

    source.check()
    if source.token_ids is not None:
        ids = _read_ids(source.token_ids)
    elif tokenizer is None:
        raise TextError("this model has no tokenizer; give --token-ids FILE.json")
    else:
        ids = tokenizer(_read_text(source), verbose=False)["input_ids"]
    chosen = ids[source.offset :][: source.max_eval_tokens]
    foreign = next((token for token in chosen if not 0 <= token < vocabulary), None)
    if foreign is not None:
        raise TextError(f"text {source.label!r}: token id {foreign}, the model knows 0 .. {vocabulary - 1}")
    tokens = np.array(chosen, dtype=np.int64)
    if len(tokens) < 2:
        raise TextError(
            f"text {source.label!r}: {len(tokens)} of its {len(ids)} tokens are left after offset {source.offset}, "
            f"at least 2 are needed"
        )
    return TokenStream(tokens, source.label, hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest())


def file_digest(source: TextSource) -> str | None:
    """sha256 of the file that the text is read from; None of a data set that comes from the hub or is a folder."""
    path = source.text or source.token_ids or (TEXT_FILE if source.dataset_name is None else None)
    if path is None:
        path = local_data(str(source.dataset_name))
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_ids(path: Path) -> list[int]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise TextError(f"token ids {str(path)!r}: not JSON ({error})") from error
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise TextError(f"token ids {str(path)!r}: must be one JSON list of whole numbers, as [17, 4, 256]")
    return ids


def _read_text(source: TextSource) -> str:
    if source.dataset_name is not None:
        return _read_dataset(source)
    path = source.text or TEXT_FILE
    return _read_file(path, f"text {str(path)!r}")


def _read_file(path: Path, what: str, rows: int | None = None) -> str:
    """All rows of a table, or the first so many."""
    return _read_table(path, what, rows) if path.suffix.lower() in _TABLES else _read_plain(path)


def _read_plain(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        raise TextError(f"text {str(path)!r}: not UTF-8 ({error.reason})") from error
    if "\0" in text:
        raise TextError(f"text {str(path)!r}: not a text, or not in UTF-8: it has NUL characters")
    return text


_TABLES = (".jsonl", ".json", ".parquet")
"""Suffixes, of whatever case, of files that have a column `text`; any other file is plain text."""


def _read_table(path: Path, what: str, count: int | None) -> str:
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        rows = _parquet_rows(path, count) if is_parquet else _json_rows(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # pyarrow raises a dozen kinds for what is damaged
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TextError(f"{what}: not readable as {path.suffix} ({reason[:200]})") from error
    lacking = next((row for row in rows if not isinstance(row, dict) or "text" not in row), None)
    if not rows:
        raise TextError(f"{str(path)!r}: no rows")
    if lacking is not None:
        columns = ", ".join(map(str, lacking)) if isinstance(lacking, dict) else ""
        raise TextError(f"{str(path)!r}: no column 'text' among {columns or 'none'}")
    return _joined([row["text"] for row in rows[:count]], str(path))


def _parquet_rows(path: Path, count: int | None) -> list[Any]:
    """Of a long file with a column `text` that column alone and, where only the first rows count, no more of it."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        columns = ["text"] if "text" in file.schema_arrow.names else None
        batches = file.iter_batches(batch_size=count or 4096, columns=columns)
        return [row for batch in islice(batches, 1 if count else None) for row in batch.to_pylist()]


def _json_rows(content: str) -> list[Any]:
    """A list of objects, or an object per line."""
    try:
        whole = json.loads(content)
    except json.JSONDecodeError:
        return [json.loads(line) for line in content.split("\n") if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def hub_name(source: TextSource) -> tuple[str, str | None]:
    """Hub id or folder, and configuration."""
    given = str(source.dataset_name)
    name, config = HUB_DATASETS.get(given, (given, None))
    if source.dataset_config in (None, given):  # the source documents write `--dataset-config pg19`, which has none
        return name, config
    return name, source.dataset_config


def _read_dataset(source: TextSource) -> str:
    """The `text` column of a split: WikiText's lines joined, of PG19 the first book."""
    what = f"data set {source.dataset_name!r}"
    name, config = hub_name(source)
    local = local_data(str(source.dataset_name))
    is_books = Path(str(source.dataset_name)).name == "pg19"
    if local is None:
        rows = _load(what, name, name=config, split=source.split)
    elif local.is_dir():
        part = local / config if config is not None and (local / config).is_dir() else local
        rows = _load(what, str(part), split=source.split)
    else:
        return _read_file(local, what, 1 if is_books else None)
    if is_books:
        rows = rows.select(range(min(len(rows), 1)))
    if "text" not in rows.column_names:
        raise TextError(f"{str(source.dataset_name)!r}: no column 'text' among {', '.join(rows.column_names)}")
    return _joined(list(rows["text"]), str(source.dataset_name))


def local_data(name: str) -> Path | None:
    """Where the folder that `STREAMLLM_DATA` names has the data set: NAME.txt, .jsonl, .parquet, or a folder NAME in
    the hub's layout. None if it does not, or the variable is not set. Raises TextError if that is no folder."""
    root = os.environ.get("STREAMLLM_DATA")
    if not root or Path(name).name != name:
        return None
    if not Path(root).is_dir():
        raise TextError(f"STREAMLLM_DATA {root!r}: no such folder; it is to hold data sets as NAME.txt or NAME.parquet")
    there = {path.with_suffix(path.suffix.lower()).name: path for path in sorted(Path(root).iterdir())}
    candidates = (f"{name}{suffix}" for suffix in (".txt", ".jsonl", ".parquet", ""))
    return next((there[candidate] for candidate in candidates if candidate in there), None)


def _load(what: str, *arguments: Any, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # `datasets` raises a dozen kinds for a name, a split or a network that is not there
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TextError(f"{what}: {reason[:200]}; give a cached hub id, a local folder or --text FILE") from error


def _joined(texts: list[Any], name: str) -> str:
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise TextError(f"{name!r}: 'text' of row {number} is {text!r}, not a string; mend or remove that row")
    return "".join(texts) if texts and texts[0].endswith("\n") else "\n".join(texts)
