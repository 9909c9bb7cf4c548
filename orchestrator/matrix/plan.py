"""A matrix's plan: every cell with its policy, its text and its file; and which cells are finished already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal, TypedDict, cast

from search_spaces import Cell, Matrix, load_matrix
from streamllm.errors import UsageError
from streamllm.measuring.text import TextSource
from streamllm.policy import WORDS, EvictionPolicy, for_chunks, with_derived_window
from streamllm.results.schema import AnyRow, knobs_in_short
from streamllm.terminal.output import check_folder

from ..configuration import WorkerSettings, check_whole, total_kv
from ..study_name import check_study_name, model_label, study_name
from ..workers.messages import Variant


class Outcome(TypedDict, total=False):
    """What became of a cell."""

    state: Literal["complete", "unavailable", "failed"]
    reason: str
    """Why it is not complete: then there is nothing else."""
    backend: str
    dataset: str
    protocol: str
    baseline: AnyRow
    streaming: AnyRow
    """Not in the baseline's own cell; nor is the speedup."""
    speedup: float


class Document(Outcome, total=False):
    """A cell's file."""

    cell: str
    settings: dict[str, object]
    rounds: int
    """In which all was taken again."""
    measured_sec: float
    finished_at: float
    """Seconds since 1970."""
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRequest:
    """What a user asks of a matrix. Raises UsageError for a number of rounds that cannot be."""

    space: str
    """Its name or file."""
    model: str
    source: TextSource
    names_text: bool
    """Whether the text was named, and so replaces the matrix' own data sets."""
    dtype: str
    quantization: str
    backends: Sequence[str]
    """Instead of the matrix' own, if there are any."""
    cap: int | None
    """Total KV; None: the matrix', or the trained length."""
    workers: WorkerSettings
    rounds: int
    """In which all times are taken again."""
    study: str | None
    output: Path | None
    copy: str | None = None
    """The URL of one that is kept."""

    def __post_init__(self) -> None:
        check_whole(0, confirm=self.rounds)
        if self.study is not None:
            check_study_name(self.study)


@dataclass(frozen=True)
class Planned:
    """A cell, ready to be measured."""

    cell: Cell
    model: str
    source: TextSource
    policy: EvictionPolicy
    baseline: str
    file: Path

    @property
    def variant(self) -> Variant:
        return Variant(self.cell.dtype, self.cell.quantization)

    @property
    def settings(self) -> dict[str, object]:
        """Everything that the command says about the result."""
        cell = asdict(replace(self.cell, dataset=None, total_kv=None, window_size=None))
        for word in WORDS:  # which the policy says where they are unusual: older files say nothing of them
            del cell[word]
        settings = {"model": self.model, "dataset": self.source.label, "baseline": self.baseline}
        settings |= {name: value for name, value in cell.items() if value is not None} | self.policy.named
        return dict(json.loads(json.dumps(settings | {"source": asdict(self.source)}, default=str)))


@dataclass(frozen=True)
class MatrixPlan:
    name: str
    folder: Path
    matrix: Matrix
    cap: int
    """Total KV, in tokens."""
    cells: Sequence[Planned]
    """In the order of the table."""
    model: str
    trained_length: int | None
    vocabulary: int | None
    """Its size; None of a model from the hub."""
    workers: WorkerSettings
    rounds: int

    @property
    def store(self) -> Path:
        """Shared with the sweeps beside it."""
        return self.folder.parent / ".store"

    def is_finished(self, planned: Planned, documents: Mapping[Path, Document], rounds: int | None = None) -> bool:
        """Whether a cell is, the rounds included: so many, or all that are wanted."""
        document = documents.get(planned.file)
        wanted = self.rounds if rounds is None else rounds
        return document is not None and document["state"] == "complete" and document.get("rounds", 0) >= wanted

    def documents(self) -> dict[Path, Document]:
        """What the files say that there are. Raises UsageError if a finished one was made under other settings."""
        found = {planned.file: _read(planned.file) for planned in self.cells}
        for planned in self.cells:
            document = found[planned.file]
            if document is not None and document["state"] == "complete":
                _check_settings(planned, document)
        return {file: document for file, document in found.items() if document is not None}


def make_plan(request: MatrixRequest) -> MatrixPlan:
    """Checks all that can be checked before anything is loaded. Raises UsageError."""
    matrix, source = load_matrix(request.space), request.source
    named = request.names_text or "dataset" not in matrix.axes
    if named:
        matrix = matrix.with_axis("dataset", source.label)
    elif source.label != source.name:  # STREAMLLM_DATASET, which the matrix' own data sets replace
        raise UsageError("book, split and join: are for one data set, the matrix has several; give --dataset-name too")
    for axis, value, usual in (("dtype", request.dtype, "auto"), ("quantization", request.quantization, "none")):
        if value != usual:
            matrix = matrix.with_axis(axis, value)
    if request.backends:
        matrix = matrix.with_axis("attn_backend", *request.backends)

    from streamllm.engine.loading import check_files, trained_length

    vocabulary, trained = check_files(request.model), trained_length(request.model)
    cap = total_kv(request.cap, matrix.cap, trained)
    more = [*request.backends, *([] if request.cap is None else [str(request.cap)])]
    usual = study_name(model_label(request.model), *([source.label] if named else []), matrix.name, *more)
    name = usual if request.study is None else request.study
    folder = request.output or Path("sweeps") / name
    check_folder("output", folder)
    cells = []
    for cell in matrix.cells():
        text = source if named else replace(source, text=None, token_ids=None, dataset_name=cell.dataset)
        if text.max_eval_tokens is None:
            text = replace(text, max_eval_tokens=matrix.tokens_of(text.name))
        file = folder / "results" / f"{matrix.stem(cell)}.json"
        cells.append(Planned(cell, request.model, text, policy_of(cell, cap), matrix.baseline, file))
    wide = next((one for one in cells if one.cell.window_size and one.policy.kept + one.policy.cache_slack > cap), None)
    if wide is not None and request.cap is not None:
        raise UsageError(
            f"cap {cap}: a cell of the matrix has its own window of {wide.cell.window_size} tokens, "
            f"{wide.policy.kept + wide.policy.cache_slack} with sinks and slack; leave --cap out"
        )
    return MatrixPlan(
        name, folder, matrix, cap, cells, request.model, trained, vocabulary, request.workers, request.rounds
    )


def policy_of(cell: Cell, cap: int) -> EvictionPolicy:
    """Its window is what the total leaves, unless it is given; of a chunk, half the prefill is the total."""
    policy = EvictionPolicy(
        n_sink=cell.n_sink,
        window_size=cell.window_size or 1,
        compress_every=cell.compress_every,
        cache_slack=cell.cache_slack,
        max_drop=cell.max_drop,
        **{word: getattr(cell, word) for word in WORDS},
    )
    total = min(cell.total_kv or cap, cap)
    if cell.protocol == "chunked":
        policy, total = for_chunks(policy, total), max(total // 2, 1)
    return policy if cell.window_size else with_derived_window(policy, total)


def describe(plan: MatrixPlan) -> str:
    """`--dry-run`: the cells and what they may cost."""
    documents = plan.documents()
    lines = [
        f"{plan.name}: {plan.matrix.description}",
        f"{_cells(len(plan.cells))}, total KV {plan.cap}, {plan.folder}",
    ]
    for planned in plan.cells:
        policy, most = planned.policy, planned.source.max_eval_tokens
        cell = planned.cell
        execution = "" if cell.execution == "eager" else f" {cell.execution}"
        lines.append(
            f"  {documents.get(planned.file, {}).get('state', 'open'):12}{planned.file.stem:36} {cell.protocol:11} "
            f"{cell.method} {cell.attn_backend}{execution} {cell.dtype} {knobs_in_short(asdict(policy))}, "
            f"{'all' if most is None else most} tokens of {planned.source.label}"
        )
    left = [planned for planned in plan.cells if not plan.is_finished(planned, documents)]
    return "\n".join([*lines, f"left: {cost(left, documents)}"])


def cost(left: Sequence[Planned], documents: Mapping[Path, Document]) -> str:
    """Estimated time for the remaining cells: from the time per token of finished cells with the same protocol and, if
    there are any, the same method."""
    if not left:
        return "nothing, every cell is finished"
    known = [seconds for planned in left if (seconds := _estimate(planned, documents)) is not None]
    unknown = len(left) - len(known)
    if not known:
        return f"{_cells(unknown)}; what they take is not known until one like them is finished"
    more = f", and {_cells(unknown)} unlike those that are finished" if unknown else ""
    return f"{_cells(len(known))}, about {sum(known) / 60:.1f} min{more}"


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"


def _estimate(planned: Planned, documents: Mapping[Path, Document]) -> float | None:
    """Seconds."""
    now = planned.settings
    finished = [document for document in documents.values() if document["state"] == "complete"]
    alike = [document for document in finished if document["settings"]["protocol"] == now["protocol"]]
    alike = [document for document in alike if document["settings"]["method"] == now["method"]] or alike
    if not alike:
        return None
    tokens = [document["baseline"]["n_tokens"] for document in alike]
    pace = median(document["measured_sec"] / count for document, count in zip(alike, tokens, strict=True))
    return pace * (planned.source.max_eval_tokens or median(tokens))


def _read(file: Path) -> Document | None:
    try:
        document = json.loads(file.read_text())
        settings, _ = document["settings"], document["state"]
        settings["source"] = asdict(TextSource()) | settings["source"]  # an older file has what it lacks as by default
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return cast(Document, document)


def _check_settings(planned: Planned, document: Document) -> None:
    before, now = _flat(document["settings"]), _flat(planned.settings)
    changed = [f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in now | before
               if before.get(name) != now.get(name)]  # fmt: skip
    if changed:
        raise UsageError(
            f"{planned.file} was measured under other settings ({'; '.join(changed)}); repeat those, give another "
            f"--study, or remove the file"
        )


def _flat(settings: Mapping[str, object]) -> dict[str, object]:
    source = settings.get("source")
    return {**settings, **(source if isinstance(source, dict) else {}), "source": None}
