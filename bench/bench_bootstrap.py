"""Bootstrap of the Pass@K curve: the extension against two ways in numpy, side by side in one run.

    pytest bench/bench_bootstrap.py -s

10,000 items, n = 256 samples, every k from 1 to 256, 10,000 replicates, 95 % intervals. The peers are the
usual resampling of rows of the Pass@K table, `table[rng.integers(...)].mean(0)`, timed on some replicates and
scaled up, and multinomial weights of the distinct c times their table. Both are measured with and without
their quantiles (`np.quantile`); the extension always computes percentile and BCa intervals. Prints the medians
of interleaved rounds, and how far the standard errors and the percentile ends are apart in units of their Monte
Carlo errors. It asserts no time: machines are shared. OMP_NUM_THREADS sets the threads of the extension,
OPENBLAS_NUM_THREADS those of numpy's product; each number has its own file of results.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medbridge.support import pass_at_k
from medbridge.support.bootstrap import bootstrap_curve

ITEMS, SAMPLES, REPLICATES, ROW_REPLICATES, ROUNDS = 10_000, 256, 10_000, 20, 7
ENDS = [0.025, 0.975]


def counts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    chance = generator.beta(0.4, 0.8, ITEMS)
    return np.full(ITEMS, SAMPLES), generator.binomial(SAMPLES, chance), np.arange(1, SAMPLES + 1)


def by_rows(generator: np.random.Generator, table: np.ndarray) -> np.ndarray:
    """Some replicates by drawing rows of the table of all items."""
    return np.array([table[generator.integers(0, ITEMS, ITEMS)].mean(axis=0) for _ in range(ROW_REPLICATES)])


def by_weights(generator: np.random.Generator, n: np.ndarray, c: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """All replicates by multinomial weights of the distinct c."""
    distinct, items = np.unique(c, return_counts=True)
    table = pass_at_k(n[: distinct.size], distinct, ks)
    return generator.multinomial(ITEMS, items / ITEMS, size=REPLICATES) @ table / ITEMS


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def test_against_numpy(save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]) -> None:
    n, c, ks = counts()
    generator = np.random.default_rng(1)
    table = pass_at_k(n, c, ks)
    ours, rows, weights, quantiles = [], [], [], []
    for _ in range(ROUNDS):
        spent, found = timed(lambda: bootstrap_curve(n, c, ks, replicates=REPLICATES))
        ours.append(spent)
        rows.append(timed(lambda: by_rows(generator, table))[0] * REPLICATES / ROW_REPLICATES)
        spent, replicates = timed(lambda: by_weights(generator, n, c, ks))
        weights.append(spent)
        quantiles.append(timed(lambda peer=replicates: np.quantile(peer, ENDS, axis=0))[0])
    ours_s, rows_s, weights_s, quantiles_s = map(statistics.median, (ours, rows, weights, quantiles))

    # Each standard error has a relative Monte Carlo error of 1 / sqrt(2 R): their difference has 1 / sqrt(R).
    errors = replicates.std(axis=0, ddof=1)
    unit = found.standard_error / REPLICATES**0.5
    deviation = float(np.max(np.abs(errors - found.standard_error) / unit))
    # An end of the interval is a quantile at 0.025: its error is some 2.7 standard errors / sqrt(R), here twice.
    ends = np.quantile(replicates, ENDS, axis=0) - [found.percentile_low, found.percentile_high]
    ends_deviation = float(np.max(np.abs(ends) / (2.7 * 2**0.5 * unit)))

    threads = os.environ.get("OMP_NUM_THREADS")
    ratios = {
        "rows with quantiles": (rows_s + quantiles_s) / ours_s,
        "rows without": rows_s / ours_s,
        "weights with quantiles": (weights_s + quantiles_s) / ours_s,
        "weights without": weights_s / ours_s,
    }
    name, command = "bootstrap", "pytest bench/bench_bootstrap.py -s"
    if threads:
        name, command = f"{name}_{threads}", f"OMP_NUM_THREADS={threads} OPENBLAS_NUM_THREADS={threads} {command}"
    save(
        name,
        command,
        {
            "items": ITEMS,
            "samples": SAMPLES,
            "replicates": REPLICATES,
            "threads": threads or "all",
            "milliseconds": {
                "bootstrap_curve with percentile and BCa intervals": round(1e3 * ours_s, 2),
                "numpy rows, scaled up": round(1e3 * rows_s),
                "numpy multinomial weights": round(1e3 * weights_s, 1),
                "numpy quantiles": round(1e3 * quantiles_s, 1),
            },
            "best_milliseconds": round(1e3 * min(ours), 2),
            "ratios": {name: round(ratio, 1) for name, ratio in ratios.items()},
            "largest_deviation_in_monte_carlo_errors": {
                "standard error": round(deviation, 2),
                "percentile ends": round(ends_deviation, 2),
            },
        },
    )
    with capsys.disabled():
        print(f"\n{ITEMS} items, n = {SAMPLES}, k = 1..{SAMPLES}, {REPLICATES} replicates, median of {ROUNDS} rounds")
        print(f"  bootstrap_curve            {1e3 * ours_s:10.1f} ms  (best {1e3 * min(ours):.1f} ms)")
        for peer, spent in (("rows", rows_s), ("weights", weights_s)):
            for what, extra in (("without", 0.0), ("with quantiles", quantiles_s)):
                ratio = ratios[f"{peer} {what}"]
                print(f"  numpy {peer:<7} {what:<14} {1e3 * (spent + extra):9.1f} ms  {ratio:8.1f} x")
        print(f"  apart by at most {deviation:.2f} (standard errors), {ends_deviation:.2f} (ends) Monte Carlo errors")
    assert deviation < 5 and ends_deviation < 5


@pytest.mark.benchmark(group="bootstrap of the curve")
def test_bootstrap_curve(benchmark: Callable[..., object]) -> None:
    benchmark(bootstrap_curve, *counts())


@pytest.mark.benchmark(group="bootstrap of the curve")
def test_bootstrap_curve_by_cluster(benchmark: Callable[..., object]) -> None:
    benchmark.pedantic(bootstrap_curve, (*counts(), np.arange(ITEMS) // 2), rounds=3)
