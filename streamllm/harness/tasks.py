"""Tasks found, filled with requests and run: by the harness' own code, kept quiet, and under a name for our store."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partialmethod
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from ..errors import UsageError, reason_of, shown
from .model import chat_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .model import StreamingLM

_ELSEWHERE = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")
"""Parts of a task's configuration that say where its documents are: these are part of its requests."""
SEEDS = (0, 1234, 1234, 1234)
"""Of random, numpy, torch, and for drawing examples: the harness' own."""
_BOOTSTRAPS = 100_000
"""For standard errors that have no formula: the harness' own number."""
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
"""Parts of the harness' results that its table is made of, and that do not depend on when and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """How tasks are put, by the harness' names. Raises UsageError."""

    folder: Path | None = None
    """Of task files, besides those of the harness."""
    num_fewshot: int | None = None
    """None: as the task says."""
    limit: float | None = None
    """Documents of a task, below 1 a share of them; None: all."""
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    """With a chat template: examples are turns of their own."""
    system_instruction: str | None = None
    seeds: tuple[int, int, int, int] = SEEDS
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    """Over the `generation_kwargs` of tasks."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """For tasks that generate their documents, such as `max_seq_lengths`."""

    def __post_init__(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise UsageError(
                f"tasks_folder {shown(str(self.folder))}: no such folder; give one with .yaml files of tasks"
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"num_fewshot {self.num_fewshot}: must be a whole number >= 0")
        if self.limit is not None and (self.limit <= 0 or (self.limit > 1 and self.limit % 1)):
            raise UsageError(f"limit {self.limit}: must be a whole number of documents, or a share of them below 1")


@dataclass(frozen=True)
class PreparedTask:
    """A task, or a group of them, with its requests built: all but the model."""

    name: str
    found: dict[str, Any]
    """As the harness' `TaskManager.load` gives it."""
    options: TaskOptions
    digest: str
    """Of the requests, documents and all of the configuration that determines a score."""
    requests: int
    writes: bool
    """Whether some of them are to be answered in writing."""

    def key(self) -> dict[str, Any]:
        """All that determines the result besides the model and its policy."""
        tasks = self.found["tasks"].values()
        return {
            "task": self.name,
            "task_digest": self.digest,
            "task_versions": {task.task_name: task.VERSION for task in tasks},
            "num_fewshot": {task.task_name: task.get_config("num_fewshot") for task in tasks},
            "limit": self.options.limit,
            "seeds": list(self.options.seeds),
            "chat_template": self.options.apply_chat_template,
            "lm_eval": version("lm_eval"),
        }

    def run(self, model: StreamingLM) -> dict[str, Any]:
        """The harness' results, with `seconds` and the number of `requests`."""
        started = time.perf_counter()
        _seed(self.options.seeds)
        # Its pool for standard errors would fork this process, with all of its threads and signal handlers: Ray's hang.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        with quiet():
            results = evaluator.evaluate(
                model, self.found, limit=self.options.limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
            )
        assert results is not None
        kept = {name: results[name] for name in _KEPT if name in results}
        return json.loads(json.dumps(kept, default=float)) | {
            "seconds": round(time.perf_counter() - started, 1),
            "requests": self.requests,
        }


class Tasks:
    """Tasks by their names, those of a folder before those of the harness."""

    def __init__(
        self, names: Sequence[str], options: TaskOptions, tokenizer: PreTrainedTokenizerBase, model: str
    ) -> None:
        """model: where tasks that generate documents of a length in tokens find the tokenizer. Raises UsageError for
        names that no task has."""
        if not names:
            raise UsageError("tasks: none given; name some, separated by commas")
        self.options, self.tokenizer = options, tokenizer
        metadata = {"pretrained": model, "tokenizer": model} | options.metadata
        with quiet():
            self.manager = self._manager(names, metadata)
        for name in names:
            if name not in self.manager.task_index and not Path(name).is_file():
                raise UsageError(f"task {shown(name)}: {self._known(name)}")

    def _manager(self, names: Sequence[str], metadata: dict[str, Any]) -> TaskManager:
        """Reading the harness' thousands of files takes a while: where the folder has all of them, only that."""
        if self.options.folder is not None:
            folder = str(self.options.folder)
            own = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
            if set(names) <= set(own.all_subtasks):
                return own
            return TaskManager(include_path=folder, metadata=metadata)
        return TaskManager(metadata=metadata)

    def _known(self, name: str) -> str:
        near = [known for known in self.manager.all_tasks if name.lower()[:4] in known.lower()][:8]
        where = f"no such task in the harness{' or the folder' * (self.options.folder is not None)}, and no file"
        return f"{where}; near it are {', '.join(near)}" if near else f"{where}; `lm_eval ls tasks` lists them"

    def prepared(self, name: str) -> PreparedTask:
        """Reads the documents and builds the requests. Raises UsageError where the task cannot be had."""
        options = self.options
        _seed(options.seeds)
        with quiet():
            try:
                found = self.manager.load([name])
                for task in found["tasks"].values():
                    self._configure(task)
                    self._build(task)
            except UsageError:
                raise
            except Exception as error:  # of files that cannot be had or are mistyped, the harness raises anything
                raise UsageError(f"task {shown(name)}: cannot be had ({reason_of(error)})") from error
        instances = [instance for task in found["tasks"].values() for instance in task.instances]
        writes = any(instance.request_type == "generate_until" for instance in instances)
        return PreparedTask(name, found, options, self._digest(found["tasks"]), len(instances), writes)

    def _configure(self, task: Any) -> None:
        """As the harness' `simple_evaluate` does. Raises UsageError for a task that runs code that a model wrote."""
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(
                f"task {task.task_name!r}: runs code that the model wrote; `python -m streamllm.harness run` can"
            )
        if self.options.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=self.options.gen_kwargs, update=True)
        asked, said = self.options.num_fewshot, task.get_config("num_fewshot")
        if said != 0 and (asked is not None or said is None):
            task.set_config(key="num_fewshot", value=asked or 0)
        task.set_fewshot_seed(seed=self.options.seeds[3])

    def _build(self, task: Any) -> None:
        options = self.options

        def template(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return chat_text(self.tokenizer, history, add_generation_prompt)

        task.build_all_requests(
            limit=evaluator.get_sample_size(task, options.limit),
            system_instruction=options.system_instruction,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn and options.apply_chat_template,
            chat_template=template if options.apply_chat_template else None,
        )
        task.build_all_requests = _built  # these are the requests that have a digest: others would draw other examples

    def _digest(self, tasks: dict[str, Any]) -> str:
        digest = hashlib.sha256()
        for name, task in tasks.items():
            config = {key: value for key, value in task.dump_config().items() if key not in _ELSEWHERE}
            digest.update(_written([name, config, self._code(name)]))
            for instance in task.instances:
                digest.update(_written([instance.request_type, instance.doc_id, instance.args, instance.doc]))
        return digest.hexdigest()[:16]

    def _code(self, name: str) -> str:
        """Of the Python files beside a task's own, which it may call. Those of the harness are in its version."""
        entry = self.manager.task_index.get(name)
        if entry is None or entry.yaml_path is None or _SHIPPED in Path(entry.yaml_path).parents:
            return ""
        files = sorted(Path(entry.yaml_path).parent.glob("*.py"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


_SHIPPED = Path(evaluator.__file__).parent


def _built(**_: Any) -> None:
    """In the place of building them again."""


def _written(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _seed(seeds: tuple[int, int, int, int]) -> None:
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the harness' and its libraries' remarks to itself, and what it prints."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "absl")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), _without_bars():  # noqa: PTH123  # no path
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Ours are shown instead. The environment's TQDM_DISABLE counts only before the first import of tqdm."""
    from tqdm import tqdm

    made = tqdm.__init__
    tqdm.__init__ = partialmethod(made, disable=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = made  # type: ignore[method-assign]


def table(results: dict[str, Any]) -> str:
    """The harness' own, with standard errors."""
    from lm_eval.utils import make_table

    parts = [make_table(results)] + ([make_table(results, "groups")] if "groups" in results else [])
    return "\n".join(str(part).rstrip() for part in parts)
