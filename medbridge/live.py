"""What is seen of a training stage while it runs: a live table on a terminal, now and then a line in a log."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from medbridge.metrics import METRICS, PHASES, label

LINE_EVERY_S = 10.0
"""Seconds between two lines where stderr is no terminal: a stage of an hour writes 360 lines, whatever its steps."""

_WINDOW = 20
"""Steps of the mean beside the newest value: one step of RL is noise."""

_ROWS = (
    "reward", "accuracy", "held_out_accuracy", "format", "loss", "sft_loss", "kl", "entropy", "gradient_norm",
    "clip_low", "clip_high", "signal", "groups_without_signal", "completion_length", "truncated", "skipped",
    "tokens_per_second", "trained_tokens_per_second", "mfu", "memory_gb",
)  # fmt: skip
"""Metrics of the table, where a stage has them; the times of its phases follow."""

_LINE = ("reward", "accuracy", "held_out_accuracy", "loss", "sft_loss", "kl", "entropy", "signal", "tokens_per_second")
"""Metrics of a line in a log."""


class TrainingView:
    """One stage's steps as they come."""

    def __init__(self, console: Console, progress: Progress, description: str, steps: int, live: Live | None) -> None:
        self._console = console
        self._progress = progress
        self._task = progress.add_task(description, total=steps, unit="steps", note="")
        self._description = description
        self._steps = steps
        self._live = live
        self._seen: dict[str, deque[float]] = {}
        self._said = -math.inf

    def begin(self, step: int) -> None:
        """The stage goes on behind `step`."""
        self._progress.update(self._task, completed=step)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self._progress.update(self._task, completed=step)
        for name, value in metrics.items():
            self._seen.setdefault(name, deque(maxlen=_WINDOW)).append(value)
        if self._live is not None:
            self._live.update(Group(self._progress, self._table()))
        elif step == self._steps or time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            self._console.print(self._line(step, metrics), highlight=False, markup=False, soft_wrap=True)

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        shown = [f"{_inside(label(name))} {figure(name, metrics[name])}" for name in _LINE if name in metrics]
        return f"{self._description} {step}/{self._steps}: {', '.join(shown + self._phases(metrics))}"

    def _phases(self, metrics: Mapping[str, float]) -> list[str]:
        return [f"{phase} {metrics[name]:.3g} s" for phase, name in PHASES.items() if metrics.get(name)]

    def _table(self) -> Table:
        table = Table("", "now", f"mean of {_WINDOW}", "", "now", f"mean of {_WINDOW}", box=None, padding=(0, 1))
        for column in (1, 2, 4, 5):
            table.columns[column].justify = "right"
        rows = [(name, label(name)) for name in _ROWS if name in self._seen]
        rows += [(name, f"Seconds: {phase}") for phase, name in PHASES.items() if name in self._seen]
        half = -(-len(rows) // 2)
        for at in range(half):
            pair = [rows[at], *rows[at + half : at + half + 1]]
            table.add_row(*[cell for row in pair for cell in self._cells(*row)])
        return table

    def _cells(self, name: str, shown: str) -> tuple[str, str, str]:
        """The newest value, which of some metrics isn't this step's, and the mean."""
        seen = self._seen[name]
        return shown, figure(name, seen[-1]), figure(name, sum(seen) / len(seen))


@contextmanager
def training_view(console: Console, progress: Progress, description: str, steps: int) -> Iterator[TrainingView]:
    """Show a stage of so many steps; `progress` is its bar. The table stays on the screen when it ends."""
    if not console.is_terminal:
        yield TrainingView(console, progress, description, steps, None)
        return
    with Live(progress, console=console, refresh_per_second=4, vertical_overflow="crop") as live:
        yield TrainingView(console, progress, description, steps, live)


def _inside(text: str) -> str:
    """A label within a sentence; "KL" and the like stay."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def figure(name: str, value: float) -> str:
    """A metric's value, short: shares as percentages, counts and rates with separators."""
    if not math.isfinite(value):
        return str(value)
    if name == "mfu" or (name in METRICS and METRICS[name].label.startswith(("Clipped", "Cut-off completions"))):
        return f"{100 * value:.3g} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
