"""Progress on the terminal: a bar with rate and time left for what takes longer than a moment, on stderr.

What a training stage shows beside its bar stands in `live`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from medbridge.live import TrainingView, training_view


class Meter:
    """One running task."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units done; `note` is shown beside the bar."""
        self._progress.update(self._task, advance=count, note=note)  # type: ignore[arg-type]

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` units are done."""
        self._progress.update(self._task, completed=done, total=total)  # type: ignore[arg-type]


class _Rate(ProgressColumn):
    """Units done per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None and task.completed and task.elapsed:
            speed = task.completed / task.elapsed  # one update only: no interval to measure between two
        return Text("" if speed is None else f"{speed:.3g} {task.fields['unit']}/s", style="cyan")


class Reporter:
    """Where a run says what it does. `console` is stderr, so that `--json` output stays clean."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def task(self, description: str, total: int | None, unit: str) -> Iterator[Meter]:
        """A bar for `total` units of work (None: not known yet); where stderr is no terminal, one line when it ends."""
        with self._bar() as progress:
            yield Meter(progress, progress.add_task(description, total=total, unit=unit, note=""))

    @contextmanager
    def training(self, description: str, steps: int) -> Iterator[TrainingView]:
        """A bar and a live table for a training stage; where stderr is no terminal, a line now and then."""
        with training_view(self.console, self._bar(), description, steps) as view:
            yield view

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), _Rate(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=self.console, refresh_per_second=4,
        )  # fmt: skip
