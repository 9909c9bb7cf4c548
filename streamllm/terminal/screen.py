"""A terminal that shows texts while they are written, side by side, with what they hold in memory beneath."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..engine.device import used_memory
from ..explain.writing import Writer

_FRAME_SEC = 0.1
_MOST_LINES = 20
_FRAME = 4
"""Columns that a panel takes around its text."""


class Screen:
    """Redraws at most ten times a second, and never in the background: that would take time from the model."""

    def __init__(self, writers: dict[str, Writer], console: Console | None = None) -> None:
        self.writers = writers
        self.console = console or Console()
        self.texts = dict.fromkeys(writers, "")
        self.live = Live(console=self.console, auto_refresh=False)
        self.drawn = 0.0

    def __enter__(self) -> Screen:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.update(self._page(), refresh=True)
        self.live.__exit__(kind, error, trace)

    def add(self, title: str, text: str) -> None:
        self.texts[title] = (self.texts[title] + text)[-_MOST_LINES * self.console.width :]
        if time.monotonic() - self.drawn > _FRAME_SEC:
            self.live.update(self._page(), refresh=True)
            self.drawn = time.monotonic()

    def _page(self) -> Group:
        columns = Table.grid(expand=True)
        for _ in self.writers:
            columns.add_column(ratio=1)
        columns.add_row(*(self._panel(title, writer) for title, writer in self.writers.items()))
        memory = used_memory(next(iter(self.writers.values())).loaded.device)
        return Group(columns, Text(f"memory {memory:,.0f} MiB in all; Ctrl-C ends", style="dim"))

    def _panel(self, title: str, writer: Writer) -> Panel:
        width = max(self.console.width // len(self.writers) - _FRAME, 10)
        rows = max(min(self.console.height - 7, _MOST_LINES), 3)
        text = Text(self.texts[title].expandtabs(4))
        lines = text.wrap(self.console, width)[-rows:]
        lines.extend([Text()] * (rows - len(lines)))
        held, done = writer.status
        bar = Text("─" * width, style="dim")
        size = Text(held, style="bold red" if writer.overgrown else "bold green")
        return Panel(Group(*lines, bar, size, Text(done, no_wrap=True)), title=title, title_align="left")
