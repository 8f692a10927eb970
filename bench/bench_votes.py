"""Majority accuracy: the exact table against Monte Carlo in numpy, side by side in one run.

    pytest bench/bench_votes.py

Prints the medians of interleaved rounds and the largest errors against exact fractions. It asserts no time: machines
are shared. 10,000 distinct items, 5 options, n = 64 samples, every k from 1 to 64; Monte Carlo takes 1,000 draws of a
few of the items, and its time is scaled up.
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

from medbridge.support.votes import majority_at_k

ITEMS, FEW, OPTIONS, SAMPLES, DRAWS, ROUNDS = 10_000, 10, 5, 64, 1000, 5
KS = np.arange(1, SAMPLES + 1)


def votes() -> np.ndarray:
    """Random votes with the right option in column 0, no two items alike up to the order of the wrong options."""
    generator = np.random.default_rng(0)
    rows = np.zeros((0, OPTIONS), dtype=np.int64)
    while len(rows) < ITEMS:
        chances = generator.dirichlet(np.full(OPTIONS, 2.0), ITEMS)
        more = generator.multinomial(SAMPLES, chances)
        more[:, 1:] = np.sort(more[:, 1:], axis=1)
        rows = np.unique(np.concatenate([rows, more]), axis=0)
    return generator.permutation(rows)[:ITEMS]


def monte_carlo(rows: np.ndarray) -> np.ndarray:
    """The same table from random orders of each item's samples; the first k of an order are a draw of k."""
    generator = np.random.default_rng(1)
    samples = np.repeat(np.tile(np.arange(OPTIONS), len(rows)), rows.reshape(-1)).reshape(len(rows), 1, SAMPLES)
    drawn = generator.permuted(np.broadcast_to(samples, (len(rows), DRAWS, SAMPLES)), axis=2)
    counts = np.cumsum(drawn[..., None] == np.arange(OPTIONS), axis=2, dtype=np.int16)
    most = counts == counts.max(axis=3, keepdims=True)
    return (most[..., 0] / most.sum(axis=3)).mean(axis=1)


def exact(row: np.ndarray) -> list[Fraction]:
    """The table of one item by polynomials with whole coefficients, for every k."""
    right, *wrong = row.tolist()
    wins = [Fraction(0)] * (SAMPLES + 1)
    for x in range(1, right + 1):
        ties = {0: np.array([comb(right, x)], dtype=object)}  # number of ties -> polynomial, times z^(x (ties + 1))
        for v in wrong:
            fewer = np.array([comb(v, y) for y in range(min(x, v + 1))], dtype=object)
            grown: dict[int, np.ndarray] = {}
            for t, polynomial in ties.items():
                for more, factor in ((0, fewer), (1, np.array([comb(v, x)], dtype=object))):
                    product = np.convolve(polynomial, factor)
                    other = grown.get(t + more, np.zeros(0, dtype=object))
                    total = np.zeros(max(len(product), len(other)), dtype=object)
                    total[: len(product)] += product
                    total[: len(other)] += other
                    grown[t + more] = total
            ties = grown
        for t, polynomial in ties.items():
            for degree, coefficient in enumerate(polynomial):
                if coefficient:
                    wins[degree + x * (t + 1)] += Fraction(int(coefficient), t + 1)
    return [wins[k] / comb(SAMPLES, k) for k in KS.tolist()]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_against_monte_carlo(
    save: Callable[[str, str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = votes()
    few, correct = rows[:FEW], np.zeros(ITEMS, dtype=np.int64)
    table, drawn = [], []
    for _ in range(ROUNDS):
        table.append(seconds(lambda: majority_at_k(rows, correct, KS)))
        drawn.append(seconds(lambda: monte_carlo(few)) * ITEMS / FEW)
    truth = [exact(row) for row in few]
    found = majority_at_k(few, correct[:FEW], KS)
    relative = max(
        float(abs(Fraction(value) - value_exact) / value_exact)
        for row, row_exact in zip(found.tolist(), truth, strict=True)
        for value, value_exact in zip(row, row_exact, strict=True)
        if value_exact
    )
    absolute = {
        "majority_at_k": float(np.abs(found - np.array(truth, dtype=np.float64)).max()),
        "Monte Carlo": float(np.abs(monte_carlo(few) - np.array(truth, dtype=np.float64)).max()),
    }
    medians = {"majority_at_k": statistics.median(table), "Monte Carlo": statistics.median(drawn)}
    save(
        "votes",
        "pytest bench/bench_votes.py -s",
        {
            "items": ITEMS,
            "options": OPTIONS,
            "samples": SAMPLES,
            "draws": DRAWS,
            "milliseconds": {name: round(1e3 * median, 1) for name, median in medians.items()},
            "largest_absolute_error": absolute,
            "largest_relative_error_of_majority_at_k": relative,
            "ratio": round(medians["Monte Carlo"] / medians["majority_at_k"]),
        },
    )
    with capsys.disabled():
        print(f"\n{ITEMS} items, {OPTIONS} options, n = {SAMPLES}, k = 1..{SAMPLES}, {ROUNDS} interleaved rounds")
        for name, median in medians.items():
            print(f"  {name:<14} {1e3 * median:10.1f} ms  largest absolute error {absolute[name]:.1e}")
        print(f"  majority_at_k's largest relative error {relative:.1e}")
    assert relative <= 1e-13


@pytest.mark.benchmark(group="Majority accuracy")
def test_majority_at_k(benchmark: Callable[..., object]) -> None:
    benchmark(majority_at_k, votes(), np.zeros(ITEMS, dtype=np.int64), KS)
