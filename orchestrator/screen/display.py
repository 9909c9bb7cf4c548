"""The user's view of a running sweep: live on a terminal, one line per event elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dashboards.pareto import rich_table
from streamllm.measuring.jobs import Job
from streamllm.measuring.reference_time import ReferencePool
from streamllm.results.front import hypervolume, pareto_front
from streamllm.results.schema import FIELDS, OBJECTIVES, Row, is_score, told_name, unusual_words
from streamllm.results.study import BASELINE, STRICT
from streamllm.terminal.printing import discard
from streamllm.terminal.progress import LINE_SEC, regularly, spoken

from ..workers.messages import WorkerDescription
from .plot import Plot
from .workers import SHOWN, Doings, described

_FRONT_ROWS = 5
_LINE_SEC = 10.0
"""Seconds between lines about one and the same thing, where there is no live view."""


class Backlog(Protocol):
    """How far MLflow is behind."""

    @property
    def backlog(self) -> int: ...

    @property
    def problem(self) -> str | None: ...


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more: the sweep goes on."""
        discard(sys.stderr)

    def __exit__(self, *error: Any) -> None:
        """All that is written is written here. So does it where the terminal is gone or the disk of the log is full."""
        try:
            super().__exit__(*error)
        except OSError:
            discard(sys.stderr)


class Display:
    """An observer of the sweep. Use as a context manager; everything goes to stderr, so that stdout is the result's."""

    def __init__(
        self,
        trials: int,
        rows: Sequence[Row],
        objectives: tuple[str, ...],
        tracking: Backlog,
        console: Console | None = None,
        until: float = math.inf,
    ) -> None:
        """`until`: when all should be finished, by the monotonic clock."""
        self.console = console or _Console(stderr=True, highlight=False)
        self._total = trials
        self._until = until
        self._resumed = len(rows)
        self._objectives = {name: OBJECTIVES[name] for name in objectives}
        self._done = self._failed = self._reused = 0
        self._times = ReferencePool()
        self._complete: list[Row] = []
        self._front: list[Row] = []
        for row in rows:
            self._count(row)
        self._tracking = tracking
        self._doings = Doings()
        self._started = time.monotonic()
        self._confirming: tuple[int, int] | None = None
        """Measurements that confirming takes, and how many have been started."""
        self._round = 0
        self._fixed: dict[str, str] = {}
        """Messages already given about reference and baseline."""
        self._said = self._noted = 0.0
        self._lines = ExitStack()
        self._live = Live(console=self.console, get_renderable=self.view, refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        else:
            self._lines.enter_context(regularly(self._say_where, LINE_SEC))
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._live.stop()

    def _say_where(self) -> None:
        """Says that the sweep goes on, where there is no live view and nothing else has been said for a while."""
        if time.monotonic() - self._noted > LINE_SEC / 2:
            self.note(f"{self._so_far()}; {self._doings}")

    def note(self, message: str) -> None:
        self._noted = time.monotonic()
        self.console.print(Text(message), soft_wrap=True)

    def worker_ready(self, worker: int, description: WorkerDescription) -> None:
        self._doings.set(worker)
        self.note(f"worker {worker}: {described(description)}")

    def worker_idle(self, worker: int) -> None:
        self._doings.set(worker)

    def job_started(self, worker: int, job: Job) -> None:
        if self._confirming is not None:
            total, started = self._confirming
            self._confirming = total, started + 1
            if job.run > self._round:
                self._round = job.run
                self.note(f"confirming: round {job.run}")
        self._doings.set(worker, str(job))

    def trial_finished(self, row: Row) -> None:
        if row["trial"] in _FIXED:
            self._times.add(row)
            row = self._times.with_time(row)
            tokens = row["n_sink"] + row["window_size"]
            sample = f" by a sample of {row['sampled_tokens']}" if "sampled_tokens" in row else ""
            said = (
                f"{_FIXED[row['trial']].format(tokens=tokens)}: {row['tpot_ms']:.2f} ms/token, "
                f"PPL {row['perplexity']:.2f} [{row['perplexity_low']:.2f}, {row['perplexity_high']:.2f}]{sample}"
            )
            if said != self._fixed.get(row["trial"]):
                self._fixed[row["trial"]] = said
                self.note(f"{said}{' (from the store)' * row['reused']}")
            return
        self._count(row)
        outcome = _outcome(self._times.with_time(row))
        self.note(f"[{self._done:>{len(str(self._total))}}/{self._total}] {outcome}")

    def confirming(self, candidates: int, rounds: int) -> None:
        """The search is over; now come `rounds` rounds of `candidates` measurements, the baseline's included."""
        self._confirming = candidates * rounds, 0
        self._started = time.monotonic()
        others, more = f"{candidates - 1} candidate{'s' * (candidates > 2)}", f"{rounds} round{'s' * (rounds > 1)}"
        self.note(f"confirming: {others} and the baseline, {more}")

    def searching_on(self) -> None:
        """What was confirmed may leave more to find."""
        self._confirming = None
        self._resumed, self._started = self._done, time.monotonic()

    def draining(self, backlog: int) -> None:
        """Called again and again while MLflow catches up at the end."""
        now = time.monotonic()
        if backlog and now - self._said > _LINE_SEC:
            self._said = now
            self.note(self._mlflow() or f"MLflow: {backlog} more runs to log")

    def view(self) -> Group:
        """The live view."""
        parts: list[RenderableType] = [self._progress(), self._doings.table()]
        if (plot := self._plot()) is not None:
            parts.append(plot)
        front = [self._times.with_time(row) for row in self._front[:_FRONT_ROWS]]
        parts.append(rich_table(front, self._title(), self._objectives))
        if (mlflow := self._mlflow()) is not None:
            parts.append(Text(mlflow, style="yellow" if self._tracking.problem else "dim"))
        return Group(*parts)

    def _steps(self) -> tuple[int, int, int, str]:
        """Those done, those done in this run, those there are, and what they are."""
        if self._confirming is None:
            return self._done, self._done - self._resumed, self._total, "trials"
        total, started = self._confirming
        done = max(started - 1, 0)
        return done, done, total, "confirmations"

    def _so_far(self) -> str:
        done, here, total, what = self._steps()
        now = time.monotonic()
        elapsed = now - self._started
        left = min(elapsed / here * max(total - done, 0) if here else math.inf, max(self._until - now, 0))
        ending = f", about {spoken(left)} left" if left < math.inf else ""
        return f"{done}/{total} {what} ({self._failed} failed, {self._reused} reused), {spoken(elapsed)}{ending}"

    def _progress(self) -> Table:
        done, _, total, _ = self._steps()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=max(total, 1), completed=min(done, total), width=40), self._so_far())
        return bar

    def _plot(self) -> Plot | None:
        """The first two objectives of all complete trials, where the terminal has room for it."""
        x, y = list(self._objectives)[:2]
        height = min(12, self.console.height - min(len(self._doings), SHOWN) - _FRONT_ROWS - 12)
        if not self._complete or height < 5:
            return None
        points, front = ([(row[x], row[y]) for row in map(self._times.with_time, rows)]
                         for rows in (self._complete, self._front))  # fmt: skip
        return Plot(points, front, _LABELS.get(x, x), _LABELS.get(y, y), height)

    def _title(self) -> str:
        title = f"front so far: {len(self._front)} of {self._done} trials"
        if not self._front:
            return title
        rows, front = ([self._times.with_time(row) for row in rows] for rows in (self._complete, self._front))
        worst = {
            name: (max if direction == "minimize" else min)(row[name] for row in rows)
            for name, direction in self._objectives.items()
        }
        return f"{title}, hypervolume up to the worst trial {hypervolume(front, self._objectives, worst):.4g}"

    def _count(self, row: Row) -> None:
        self._done += 1
        self._failed += row["state"] == "failed"
        self._reused += bool(row.get("reused"))
        self._times.add(row)
        told = {told_name(name): direction for name, direction in self._objectives.items()}
        if row["state"] == "complete" and all(math.isfinite(row.get(name, math.nan)) for name in told):
            self._complete.append(row)
        self._front = pareto_front([*self._front, row], told)

    def _mlflow(self) -> str | None:
        backlog, problem = self._tracking.backlog, self._tracking.problem
        if problem is not None:
            return f"MLflow: {backlog} runs behind, still trying: {problem}"
        return f"MLflow: {backlog} runs behind" if backlog else None


_FIXED = {
    STRICT: "reference: strict StreamingLLM, {tokens} tokens",
    BASELINE: "baseline: re-computing the last {tokens} tokens",
}

_LABELS = {
    "tpot_ms": "ms/token",
    "ppl_vs_strict_percent": "PPL over strict StreamingLLM %",
    "ppl_increase_percent": "PPL increase %",
    "perplexity": "PPL",
    "peak_memory_mb": "peak memory MB",
    "peak_kv": "peak KV",
    "ttft_ms": "TTFT ms",
    "joules_per_token": "J/token",
}


def _outcome(row: Row) -> str:
    what = (
        f"{row['method']:4} {row['backend_requested']:5} S={row['n_sink']:<3} W={row['window_size']:<4} "
        f"R={row['compress_every']:<3} slack={row['cache_slack']:<2} drop={row['max_drop']:<2}"
        f"{''.join(f' {word}' for word in unusual_words(row))}"
        f"{'' if row.get('execution', 'eager') == 'eager' else ' ' + row['execution']}"
        f"{'' if row.get('quantization', 'none') == 'none' else ' ' + row['quantization']}"
    )
    if row["state"] == "failed":
        return f"{what} failed: {row['reason']}"
    speedup = f"{row['speedup']:5.1f}x" if "speedup" in row else ""  # until the baseline is measured
    scores = "".join(f"  {FIELDS[name].header} {row[name]:.3f}" for name in row if is_score(name))
    return (
        f"{what} {row['tpot_ms']:6.2f} ms/token  {speedup:6}  PPL {row['perplexity']:6.2f} "
        f"({row['ppl_vs_strict_percent']:+.1f}%){scores}{'  (from the store)' * row['reused']}"
    )
