"""Pass@K: the batched table against the HumanEval formula in a Python loop, side by side in one run.

    pytest bench/bench_passk.py

Prints the ratio of the medians of interleaved rounds and, for both, the largest relative error against exact
fractions. It asserts no time: machines are shared. 1,000 items, n = 256 samples, every k from 1 to 256; the
loop takes a sample of the items, and its time is scaled up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medbridge.support import mean_curve, pass_at_k

ITEMS, LOOP_ITEMS, SAMPLES, ROUNDS = 1000, 10, 256, 5


def counts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    chance = generator.beta(0.4, 0.8, ITEMS)
    return np.full(ITEMS, SAMPLES), generator.binomial(SAMPLES, chance), np.arange(1, SAMPLES + 1)


def human_eval(n: int, c: int, k: int) -> float:
    """The estimator as the HumanEval paper (arXiv 2107.03374, figure 3) gives it."""
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def human_eval_table(n: np.ndarray, c: np.ndarray, ks: np.ndarray) -> np.ndarray:
    return np.array([[human_eval(int(a), int(b), int(k)) for k in ks] for a, b in zip(n, c, strict=True)])


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def largest_error(table: np.ndarray, n: np.ndarray, c: np.ndarray, ks: np.ndarray) -> float:
    worst = 0.0
    for row, a, b in zip(table, n.tolist(), c.tolist(), strict=True):
        for value, k in zip(row.tolist(), ks.tolist(), strict=True):
            exact = 1 - Fraction(comb(a - b, k), comb(a, k))
            if exact:
                worst = max(worst, float(abs(Fraction(value) - exact) / exact))
    return worst


def test_against_the_loop(save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]) -> None:
    n, c, ks = counts()
    few = slice(LOOP_ITEMS)
    batched, loop, mean = [], [], []
    for _ in range(ROUNDS):
        batched.append(seconds(lambda: pass_at_k(n, c, ks)))
        loop.append(seconds(lambda: human_eval_table(n[few], c[few], ks)) * ITEMS / LOOP_ITEMS)
        mean.append(seconds(lambda: mean_curve(n, c, ks)))
    found = {
        "pass_at_k": (
            statistics.median(batched),
            largest_error(pass_at_k(n[few], c[few], ks), n[few], c[few], ks),
        ),
        "HumanEval loop": (
            statistics.median(loop),
            largest_error(human_eval_table(n[few], c[few], ks), n[few], c[few], ks),
        ),
    }
    save(
        "passk",
        "pytest bench/bench_passk.py -s",
        {
            "items": ITEMS,
            "samples": SAMPLES,
            "milliseconds": {name: round(1e3 * median, 3) for name, (median, _) in found.items()},
            "largest_relative_error": {name: error for name, (_, error) in found.items()},
            "mean_curve_milliseconds": round(1e3 * statistics.median(mean), 3),
            "ratio": round(found["HumanEval loop"][0] / found["pass_at_k"][0]),
        },
    )
    with capsys.disabled():
        print(f"\n{ITEMS} items, n = {SAMPLES}, k = 1..{SAMPLES}, median of {ROUNDS} interleaved rounds")
        for name, (median, error) in found.items():
            ratio = found["HumanEval loop"][0] / median
            print(f"  {name:<15} {1e3 * median:10.2f} ms  {ratio:8.0f} x  largest relative error {error:.1e}")
        print(f"  {'mean_curve':<15} {1e3 * statistics.median(mean):10.2f} ms  (the mean over items alone)")
    assert found["pass_at_k"][1] <= 1e-15


@pytest.mark.benchmark(group="Pass@K table")
def test_pass_at_k(benchmark: Callable[..., object]) -> None:
    benchmark(pass_at_k, *counts())


@pytest.mark.benchmark(group="Pass@K table, 10 of the items")
def test_human_eval_loop(benchmark: Callable[..., object]) -> None:
    n, c, ks = counts()
    benchmark.pedantic(human_eval_table, (n[:LOOP_ITEMS], c[:LOOP_ITEMS], ks), rounds=3)


@pytest.mark.benchmark(group="Pass@K mean curve")
def test_mean_curve(benchmark: Callable[..., object]) -> None:
    benchmark(mean_curve, *counts())
