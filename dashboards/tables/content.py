"""What a table says, whatever it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from streamllm.results.schema import AnyRow

from .columns import Column


@dataclass(frozen=True)
class Table:
    title: str
    summary: tuple[str, ...]
    """Lines above the table."""
    columns: tuple[Column, ...]
    rows: Sequence[AnyRow]
    baselines: Sequence[AnyRow] = ()
    """Shown below the rows; no rows of the data formats."""
    notes: tuple[str, ...] = ()
    """Lines below the table."""
    data_columns: tuple[Column, ...] = ()
    """Columns of the data formats, where these have more than `columns`."""
    dispensable: tuple[str, ...] = ()
    """Keys of columns that a terminal too narrow for all can do without, the first first."""

    @cached_property
    def cells(self) -> list[list[str]]:
        return [[column.text(row) for column in self.columns] for row in (*self.rows, *self.baselines)]

    @property
    def keys(self) -> list[str]:
        return [key for column in self.data_columns or self.columns for key in column.keys]
