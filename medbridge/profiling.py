"""A profile of some training steps: a trace for chrome://tracing or Perfetto, and a table of where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from medbridge.metrics import PHASES

OPERATORS = 25
"""Operators in the table: those that take the most time by themselves."""

_NAME = 46
"""Characters of a name, so that a line fits 80 columns."""


class Profiler:
    """Follows the steps behind the first one, which warms up; then writes `trace.json.gz` and `time.txt`."""

    def __init__(self, folder: Path, steps: int, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._steps = steps
        self._say = say
        self._profile: profile | None = None
        self._began = 0.0
        self._seconds: dict[str, float] = {}
        self._done = -1  # the first step is not among them
        self._ended = False

    def start(self) -> None:
        """Before the first step."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile = profile(activities=activities, acc_events=True)

    def step(self, metrics: Mapping[str, float]) -> None:
        """A step is done, with these metrics."""
        if self._ended or self._profile is None:
            return
        self._done += 1
        if self._done == 0:
            self._profile.__enter__()
            self._began = time.perf_counter()
            return
        for phase, name in PHASES.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + metrics.get(name, 0.0)
        if self._done == self._steps:
            self.close()

    def close(self) -> None:
        """Write what was seen; nothing where it was written, or where no step came behind the first."""
        if self._ended or self._profile is None:
            return
        self._ended = True
        if self._done < 0:
            return
        seconds = time.perf_counter() - self._began
        self._profile.__exit__(None, None, None)
        if self._done == 0:
            self._say("profile: the stage has one step, which only warms up; nothing was written")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / "trace.json.gz"))
        text = self._table(seconds)
        (self._folder / "time.txt").write_text(text, encoding="utf-8")
        self._say(f"{text}profile: {self._folder / 'trace.json.gz'} (chrome://tracing or ui.perfetto.dev)")

    def _table(self, seconds: float) -> str:
        """Seconds by phase and by operator."""
        lines = [f"profile of {self._done} steps, {seconds:.3g} s (the profiler itself slows them down)", ""]
        phases = {phase: taken for phase, taken in self._seconds.items() if taken and phase != "loss"}
        for phase, taken in {**phases, "other": max(0.0, seconds - sum(phases.values()))}.items():
            lines.append(_line(phase, taken, seconds))
            if phase == "training" and self._seconds["loss"]:
                lines.append(_line("  loss", self._seconds["loss"], seconds))
        assert self._profile is not None
        on_gpu = torch.cuda.is_available()
        found = [
            ((row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1e6, row.count, row.key)
            for row in self._profile.key_averages()
        ]
        total = sum(taken for taken, _, _ in found) or 1.0
        lines += ["", f"operators by their own time{' on the GPU' if on_gpu else ''}, and calls"]
        for taken, calls, name in sorted(found, reverse=True)[:OPERATORS]:
            lines.append(f"{_line(name, taken, total)} {calls:>8,}")
        return "\n".join(lines) + "\n"


def _line(name: str, seconds: float, total: float) -> str:
    return f"{name[:_NAME]:<{_NAME}}{seconds:>10.4f} s {100 * seconds / total:>6.1f} %"
