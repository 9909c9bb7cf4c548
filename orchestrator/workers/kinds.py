"""Who may measure for a study: workers that have its model, whose times compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from streamllm.errors import UsageError
from streamllm.measuring.reference_time import WORKER
from streamllm.results.schema import Row

from .messages import WorkerDescription

Kind = tuple[tuple[str, object], ...]
"""A kind of worker: names and values of `reference_time.WORKER`."""


def kind_of(of: Mapping[str, Any]) -> Kind:
    """The kind in a worker's conditions, or in a row."""
    return tuple((name, of.get(name)) for name in WORKER)


def unquantized(digest: str) -> str:
    """The digest of the weights that were loaded, from that of a model in memory, in which its quantization follows."""
    return digest.partition(" ")[0]


class Kinds:
    """Of a study's workers."""

    def __init__(self, rows: Iterable[Row], note: Callable[[str], None], counts_energy: bool = False) -> None:
        """rows: what the study has measured; note: is told of workers whose times do not compare with those;
        counts_energy: whether each has to."""
        known = list(rows)
        self._counts_energy = counts_energy
        self._note = note
        self.first: Kind | None = next((kind_of(row) for row in known if "device" in row), None)
        """That of the workers when the study began; in a new study, the first one's."""
        self._model = next((unquantized(row["model_digest"]) for row in known if "model_digest" in row), None)
        """Digest of the weights, whatever became of them; in a new study, the first worker's."""

    def check(self, worker: int, description: WorkerDescription) -> bool:
        """A study is of one model, whoever measures and whenever; tables tell the kinds apart, and one confirms. Raises
        UsageError."""
        conditions, uncounted = description["conditions"], description["uncounted"]
        if self._counts_energy and uncounted is not None:
            raise UsageError(f"{description['host']}: {uncounted}")
        found = unquantized(conditions.model_digest)
        self._model = self._model or found
        if found != self._model:
            raise UsageError(
                f"model on {description['host']}: {found:.12}..., the study's is {self._model:.12}...; its files have "
                f"been changed; put them back, or give another --study"
            )
        kind = kind_of(conditions.kind)
        self.first = self.first or kind
        differ = "; ".join(
            f"{name} {value}, then {was or 'not known'}"
            for (name, value), (_, was) in zip(kind, self.first, strict=True)
            if value != was and was is not None  # an older study does not say with which versions
        )
        if differ:
            self._note(f"warning: worker {worker} is of another kind than when the study began: {differ}")
        return True

    def to_confirm(self, members: Mapping[Kind, Mapping[str, Sequence[int]]]) -> Kind:
        """The kind whose workers confirm: the study's or, where none is of it any more, that of most of them."""
        if self.first is not None and self.first in members:
            return self.first
        counts = {kind: sum(map(len, hosts.values())) for kind, hosts in members.items()}
        return max(counts, key=counts.__getitem__, default=())
