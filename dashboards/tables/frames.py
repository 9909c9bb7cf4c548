"""Studies as pandas' DataFrames: `dashboards.load_study("NAME").front`.

Columns are the schema's fields, under their names and in its order, each that some row has, with `NAME_low` and
`NAME_high` beside it where there is an interval; `attrs["units"]` says in which unit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamllm.results import study as studies
from streamllm.results.schema import FIELDS, SCORE, Row, dtype_of

from .filters import select

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class StudyFrames:
    """A study's rows. Times are ratios to strict StreamingLLM's in one unit, as in all tables."""

    results: studies.StudyResults

    @property
    def trials(self) -> pd.DataFrame:
        """All finished trials, failed ones included."""
        return frame(self.results.trials, self.results.name)

    def select(self, where: str) -> pd.DataFrame:
        """The trials that meet a condition, such as `front and ppl_increase_percent < 3`: those that the box of the
        report finds. `python -m dashboards.pareto --help` tells the grammar. Raises UsageError."""
        return frame(select(self.results.trials, where, self.results.front), self.results.name)

    @property
    def front(self) -> pd.DataFrame:
        """Best first in the first objective."""
        return frame(self.results.front, self.results.name)

    @property
    def baseline(self) -> pd.DataFrame:
        """Re-computation: one row, or none while it is not known."""
        return frame([row for row in [self.results.baseline] if row is not None], self.results.name)

    @property
    def strict(self) -> pd.DataFrame:
        """Strict StreamingLLM, likewise: the reference."""
        return frame([row for row in [self.results.strict] if row is not None], self.results.name)


def load_study(study: str) -> StudyFrames:
    """A study by name, under `sweeps/` of the working directory, or by the path of its folder. Warns of what cannot be
    read of it. Raises UsageError."""
    results = studies.load_study(study)
    for problem in results.problems:
        warnings.warn(problem, stacklevel=2)
    return StudyFrames(results)


def frame(rows: Sequence[Row], name: str) -> pd.DataFrame:
    import pandas as pd

    ends = ("", "_low", "_high")
    keys = [f"{field}{end}" for field in FIELDS for end in ends if any(f"{field}{end}" in row for row in rows)]
    keys += dict.fromkeys(key for row in rows for key in row if key.startswith(SCORE))
    columns = {
        key: pd.Series([row.get(key) for row in rows], dtype="object").astype(pd.api.types.pandas_dtype(dtype_of(key)))
        for key in keys
    }
    table = pd.DataFrame(columns)
    units = {key: FIELDS[key].unit for key in keys if key in FIELDS}
    table.attrs = {"study": name, "units": {key: unit for key, unit in units.items() if unit}}
    return table
