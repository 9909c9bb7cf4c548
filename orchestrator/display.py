"""What the user sees while a sweep runs: a live view on a terminal, one line per event elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dashboards.front import pareto_front
from dashboards.pareto import rich_table
from search_spaces import OBJECTIVES

from .results import BASELINE
from .trial import TrialSpec

_FRONT_ROWS = 8


class Display:
    """An observer of the sweep. Use as a context manager; everything goes to stderr, so that stdout is the result's."""

    def __init__(self, trials: int, rows: list[dict[str, Any]], objectives: tuple[str, ...]) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._total = trials
        self._rows = list(rows)
        self._resumed = len(rows)
        self._objectives = {name: OBJECTIVES[name] for name in objectives}
        self._doing: dict[int, str] = {}
        self._started = time.monotonic()
        self._live = Live(console=self.console, get_renderable=self._view, refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, message: str) -> None:
        self.console.print(Text(message), soft_wrap=True)

    def worker_ready(self, worker: int, description: dict[str, Any]) -> None:
        where = f"GPU {description['visible_devices']}, " if description["visible_devices"] else ""
        cores = ",".join(map(str, description["cores"])) or "all"
        self._doing[worker] = "idle"
        self.note(f"worker {worker}: {where}{description['device']}, cores {cores}, {description['n_tokens']} tokens")

    def trial_started(self, worker: int, spec: TrialSpec) -> None:
        policy = spec.policy
        self._doing[worker] = (
            f"{spec.method} {spec.attn_backend} S={policy.n_sink} R={policy.compress_every} "
            f"slack={policy.cache_slack} drop={policy.max_drop}"
        )

    def trial_finished(self, row: dict[str, Any]) -> None:
        if row["trial"] == BASELINE:
            self.note(
                f"baseline: re-computing the last {row['n_sink'] + row['window_size']} tokens: "
                f"{row['tpot_ms']:.2f} ms/token, PPL {row['perplexity']:.2f}{' (from the store)' * row['reused']}"
            )
            return
        self._rows.append(row)
        self._doing[row["worker"]] = "idle"
        self.note(f"[{len(self._rows):>{len(str(self._total))}}/{self._total}] {_outcome(row)}")

    def _view(self) -> Group:
        done, elapsed = len(self._rows), time.monotonic() - self._started
        here = done - self._resumed
        left = f", about {elapsed / here * (self._total - done) / 60:.1f} min left" if here else ""
        failed = sum(row["state"] == "failed" for row in self._rows)
        reused = sum(bool(row.get("reused")) for row in self._rows)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=max(self._total, 1), completed=done, width=40),
            f"{done}/{self._total} trials ({failed} failed, {reused} reused), {elapsed / 60:.1f} min{left}",
        )
        workers = Table.grid(padding=(0, 2))
        for worker, doing in sorted(self._doing.items()):
            workers.add_row(f"worker {worker}", doing)
        front = pareto_front(self._rows, self._objectives)
        return Group(bar, workers, rich_table(front[:_FRONT_ROWS], f"front so far: {len(front)} trials"))


def _outcome(row: dict[str, Any]) -> str:
    what = (
        f"{row['method']:4} {row['backend_requested']:5} S={row['n_sink']:<3} W={row['window_size']:<4} "
        f"R={row['compress_every']:<3} slack={row['cache_slack']:<2} drop={row['max_drop']:<2}"
        f"{'' if row.get('execution', 'eager') == 'eager' else ' ' + row['execution']}"
    )
    if row["state"] == "failed":
        return f"{what} failed: {row['reason']}"
    return (
        f"{what} {row['tpot_ms']:6.2f} ms/token  {row['speedup']:5.1f}x  PPL {row['perplexity']:6.2f} "
        f"({row['ppl_increase_percent']:+.1f}%){'  (from the store)' * row['reused']}"
    )
