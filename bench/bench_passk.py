"""Pass@K: the batched table and its mean curve against their peers, side by side in one run.

    pytest bench/bench_passk.py -s

Peers: numpy at its best (cumulative log1p over the distinct counts, then a gather or a weighted mean), the formula of
HumanEval in a Python loop, and scorio where it is installed. Prints the median and the fastest of interleaved rounds,
the ratios of both, and the largest relative error of each against exact fractions. It asserts accuracy and no time:
machines are shared.
10,000 items, n = 256 samples, every k from 1 to 256; what takes long runs on a share of the work, scaled up.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from medbridge.support import mean_curve, pass_at_k

ITEMS, SAMPLES, ROUNDS = 10_000, 256, 21
LOOP_ITEMS = 5  # of the loop, 3,000 times as slow as numpy
SCORIO_KS = 2  # of scorio, which evaluates one k at a time
CHECKED_ITEMS = 40
CHECKED_KS = 16  # of the means


class Times(NamedTuple):
    """Seconds."""

    median: float
    fastest: float


def counts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    chance = generator.beta(0.4, 0.8, ITEMS)
    return np.full(ITEMS, SAMPLES), generator.binomial(SAMPLES, chance), np.arange(1, SAMPLES + 1)


def numpy_rows(c: np.ndarray) -> np.ndarray:
    """Pass@k of SAMPLES samples with c correct, for every k: 1 - exp(cumulative sum of log1p(-c / (n - i)))."""
    with np.errstate(divide="ignore"):
        rows = np.log1p(-np.minimum(c[:, None] / np.arange(SAMPLES, 0, -1), 1.0))
    np.cumsum(rows, axis=1, out=rows)
    np.expm1(rows, out=rows)
    return np.negative(rows, out=rows)


def numpy_table(c: np.ndarray) -> np.ndarray:
    """Counting finds the distinct c faster than np.unique, and take with mode="clip" writes without a buffer."""
    present = np.flatnonzero(np.bincount(c))
    row = np.empty(SAMPLES + 1, dtype=np.intp)
    row[present] = np.arange(present.size)
    return np.take(numpy_rows(present), row[c], axis=0, out=np.empty((c.size, SAMPLES)), mode="clip")


def numpy_mean(c: np.ndarray) -> np.ndarray:
    weight = np.bincount(c)
    present = np.flatnonzero(weight)
    mean: np.ndarray = weight[present] @ numpy_rows(present) / c.size
    return mean


def human_eval(n: int, c: int, k: int) -> float:
    """The estimator as the HumanEval paper (arXiv 2107.03374, figure 3) gives it."""
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def human_eval_table(n: np.ndarray, c: np.ndarray, ks: np.ndarray) -> np.ndarray:
    return np.array([[human_eval(int(a), int(b), int(k)) for k in ks] for a, b in zip(n, c, strict=True)])


def scorio_mean() -> Callable[[np.ndarray, int], float] | None:
    """scorio's Pass@k of a matrix of outcomes, or None where it isn't installed."""
    try:
        function: Callable[[np.ndarray, int], float] = importlib.import_module("scorio.eval").pass_at_k
    except ImportError:
        return None
    return function


def timed(calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, share: float = 1.0) -> dict[str, Times]:
    """Times of each call over interleaved rounds, after one that isn't counted; a call does `share` of the work."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) / share)
    return {name: Times(statistics.median(times[1:]), min(times[1:])) for name, times in taken.items()}


def exact(c: int, k: int) -> Fraction:
    return 1 - Fraction(comb(SAMPLES - c, k), comb(SAMPLES, k))


def largest_error(found: np.ndarray, expected: list[Fraction]) -> float:
    pairs = zip(found.ravel().tolist(), expected, strict=True)
    return max(float(abs(Fraction(value) - true) / true) if true else abs(value) for value, true in pairs)


def report(title: str, times: dict[str, Times], errors: dict[str, float]) -> dict[str, dict[str, float]]:
    own = next(iter(times.values()))
    print(f"\n{title}: {ITEMS} items, n = {SAMPLES}, k = 1..{SAMPLES}; ms and times ours, median and fastest round")
    figures = {}
    for name, found in times.items():
        figures[name] = {
            "median_milliseconds": round(1e3 * found.median, 4),
            "fastest_milliseconds": round(1e3 * found.fastest, 4),
            "ratio_of_medians": round(found.median / own.median, 2),
            "ratio_of_fastest": round(found.fastest / own.fastest, 2),
            "largest_relative_error": errors[name],
        }
        line = "".join(f"{value:12.3f}" for value in list(figures[name].values())[:4])
        print(f"  {name:<16}{line}   largest relative error {errors[name]:.1e}")
    return figures


def test_side_by_side(save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]) -> None:
    n, c, ks = counts()
    loop_items, checked = slice(LOOP_ITEMS), slice(CHECKED_ITEMS)
    table_times = timed({"medbridge": lambda: pass_at_k(n, c, ks), "numpy": lambda: numpy_table(c)})
    loop = {"HumanEval loop": lambda: human_eval_table(n[loop_items], c[loop_items], ks)}
    table_times |= timed(loop, rounds=3, share=LOOP_ITEMS / ITEMS)
    true_table = [exact(int(b), int(k)) for b in c[checked] for k in ks]
    table_errors = {
        "medbridge": largest_error(pass_at_k(n, c, ks)[checked], true_table),
        "numpy": largest_error(numpy_table(c)[checked], true_table),
        "HumanEval loop": largest_error(
            human_eval_table(n[loop_items], c[loop_items], ks), true_table[: LOOP_ITEMS * SAMPLES]
        ),
    }

    mean_times = timed({"medbridge": lambda: mean_curve(n, c, ks), "numpy": lambda: numpy_mean(c)}, 10 * ROUNDS)
    some = ks[:: SAMPLES // CHECKED_KS]
    weight = np.bincount(c).tolist()
    true_mean = [sum((w * exact(b, int(k)) for b, w in enumerate(weight)), Fraction()) / ITEMS for k in some]
    mean_errors = {
        "medbridge": largest_error(mean_curve(n, c, some), true_mean),
        "numpy": largest_error(numpy_mean(c)[some - 1], true_mean),
    }
    peer = scorio_mean()
    if peer is not None:
        outcomes = (np.arange(SAMPLES) < c[:, None]).astype(np.int64)
        values: list[float] = []
        calls = {"scorio": lambda: values.extend(peer(outcomes, int(k)) for k in some[:SCORIO_KS])}
        mean_times |= timed(calls, rounds=3, share=SCORIO_KS / SAMPLES)
        mean_errors["scorio"] = largest_error(np.array(values[:SCORIO_KS]), true_mean[:SCORIO_KS])

    with capsys.disabled():
        figures = {
            "table": report("Table", table_times, table_errors),
            "mean curve": report("Mean curve", mean_times, mean_errors),
        }
        if peer is None:
            print("  scorio isn't installed: its row is left out")
    save("passk", "pytest bench/bench_passk.py -s", {"items": ITEMS, "samples": SAMPLES, **figures})
    assert table_errors["medbridge"] <= 1e-15
    assert mean_errors["medbridge"] <= 1e-15


@pytest.mark.benchmark(group="Pass@K table")
def test_pass_at_k(benchmark: Callable[..., object]) -> None:
    benchmark(pass_at_k, *counts())


@pytest.mark.benchmark(group="Pass@K table")
def test_numpy_table(benchmark: Callable[..., object]) -> None:
    benchmark(numpy_table, counts()[1])


@pytest.mark.benchmark(group="Pass@K mean curve")
def test_mean_curve(benchmark: Callable[..., object]) -> None:
    benchmark(mean_curve, *counts())


@pytest.mark.benchmark(group="Pass@K mean curve")
def test_numpy_mean(benchmark: Callable[..., object]) -> None:
    benchmark(numpy_mean, counts()[1])
