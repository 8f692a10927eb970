"""Running one function over a grid of truths, and writing what comes out as tables."""

from __future__ import annotations

import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from gate_studies.truths import Unskilled

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How a study is to run."""

    quick: bool = False
    runs: int | None = None
    jobs: int = 1

    def runs_or(self, full: int) -> int:
        """Simulated data sets per truth."""
        return self.runs or (max(20, full // 10) if self.quick else full)


def spread(function: Callable[..., Any], cells: Sequence[Any], plan: Plan, label: str) -> list[Any]:
    """``function(cell, generator)`` for each cell, on `jobs` processes, with a seed of its own for each cell."""
    study = zlib.crc32(label.encode())
    tasks = [(function, cell, (study, i)) for i, cell in enumerate(cells)]
    results: list[Any] = []
    begun = time.monotonic()

    def gather(outcomes: Iterable[Any]) -> list[Any]:
        for outcome in outcomes:
            results.append(outcome)
            seconds = time.monotonic() - begun
            print(f"\r{label}: {len(results)}/{len(cells)} truths, {seconds:.0f} s", end="", file=sys.stderr)
        print(file=sys.stderr)
        return results

    if plan.jobs == 1:
        return gather(map(_one, tasks))
    with get_context("fork").Pool(plan.jobs) as pool:
        return gather(pool.imap(_one, tasks, chunksize=1))


def _one(task: tuple[Callable[..., Any], Any, tuple[int, int]]) -> Any:
    function, cell, seed = task
    return function(cell, np.random.default_rng(seed))


def kinds(options: tuple[int, ...]) -> tuple[Unskilled, ...]:
    """What an unskilled model may do: on open answers a guess is wrong, so only "wrong" and "faint" remain."""
    return ("wrong", "faint") if set(options) == {0} else ("fresh", "repeat", "wrong")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}".rstrip("0").rstrip(".") if value < 0.1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def option_name(options: Sequence[int]) -> str:
    """As the tables say it: "4", "open", "2 and open"."""
    return " and ".join("open" if m == 0 else str(m) for m in options)


def mean(values: Iterable[float]) -> float:
    """Mean, rounded to what the Monte Carlo error leaves; NaN of nothing."""
    found = list(values)
    return round(sum(found) / len(found), 4) if found else math.nan
