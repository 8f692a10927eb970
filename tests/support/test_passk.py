"""Pass@K and its relatives against exact rational arithmetic, enumerated subsets and scipy, and their refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from math import comb, nextafter, prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from medbridge.support.passk import g_pass_at_k, mean_curve, pass_at_k, pass_hat_k, reached_at_k

EXACT = json.loads((Path(__file__).parent / "exact_values.json").read_text())
BUDGET = 1e-15
# Every function of n, c and ks, its further arguments put to something harmless.
TABLES: dict[str, Callable[..., np.ndarray]] = {
    "pass_at_k": pass_at_k,
    "pass_hat_k": pass_hat_k,
    "g_pass_at_k": lambda n, c, ks: g_pass_at_k(n, c, ks, 0.5),
    "reached_at_k": lambda n, c, ks: reached_at_k(n, c, ks, [0.25] * len(c)),
}
tables = pytest.mark.parametrize("function", TABLES.values(), ids=TABLES)


def exact_pass_at_k(n: int, c: int, k: int) -> Fraction:
    a, b = min(c, k), max(c, k)
    if a + b > n:
        return Fraction(1)
    return 1 - Fraction(prod(range(n - b - a + 1, n - b + 1)), prod(range(n - a + 1, n + 1)))


def chances(n: int, c: int, k: int) -> list[Fraction]:
    """P(X = x) for x = 0 .. k correct among k drawn without replacement."""
    return [Fraction(comb(c, x) * comb(n - c, k - x), comb(n, k)) for x in range(k + 1)]


def exact_score(f: Fraction, k: int) -> list[Fraction]:
    """The scores of x = 0 .. k correct that give a guesser f: 1 above t, g at t, 0 below."""
    if f == 1:
        return [Fraction(1)] * (k + 1)
    above = Fraction(0)
    for t in range(k, -1, -1):
        at = comb(k, t) * f**t * (1 - f) ** (k - t)
        if t == 0 or above + at > f:
            return [Fraction(0)] * t + [(f - above) / at] + [Fraction(1)] * (k - t)
        above += at
    raise AssertionError


def exact_reached(n: int, c: int, k: int, f: Fraction) -> Fraction:
    return sum((p * a for p, a in zip(chances(n, c, k), exact_score(f, k), strict=True)), Fraction(0))


def successes(tau: float, k: int) -> int:
    return next(m for m in range(1, k + 1) if m / k >= tau)


def relative_error(found: float, exact: Fraction) -> float:
    return float(abs(Fraction(found) - exact) / exact) if exact else abs(found)


@st.composite
def counts(draw: st.DrawFn, most: int = 400) -> tuple[int, int]:
    n = draw(st.integers(0, most))
    return n, draw(st.integers(0, n))


@pytest.mark.parametrize(("n", "c", "k", "value"), EXACT["pass_at_k"])
def test_stored_values(n: int, c: int, k: int, value: float | None) -> None:
    found = pass_at_k([n], [c], [k])[0, 0]
    if value is None:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(value, rel=BUDGET, abs=0)


@settings(max_examples=150, deadline=None)
@given(st.lists(counts(), min_size=1, max_size=6), st.lists(st.integers(1, 420), min_size=1, max_size=8))
def test_tables_equal_exact_fractions(items: list[tuple[int, int]], ks: list[int]) -> None:
    table = pass_at_k([n for n, _ in items], [c for _, c in items], ks)
    assert table.shape == (len(items), len(ks))
    for row, (n, c) in zip(table, items, strict=True):
        for found, k in zip(row, ks, strict=True):
            if k > n:
                assert np.isnan(found)
            else:
                exact = 1 - Fraction(comb(n - c, k), comb(n, k))
                assert relative_error(float(found), exact) <= BUDGET


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_accuracy_up_to_100_000_samples(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 100_000))
    c = data.draw(st.integers(0, n))
    # a short product, so that the exact value stays cheap
    k = data.draw(st.integers(1, min(n, 300)) | st.integers(1, n).filter(lambda k: min(k, c) <= 300))
    exact = exact_pass_at_k(n, c, k)
    alone = pass_at_k([n], [c], [k])[0, 0]
    among_others = pass_at_k([n], [c], range(1, k + 1) if k <= 300 else [k])[0, -1]  # by the sweep over all k
    assert relative_error(float(alone), exact) <= BUDGET
    assert relative_error(float(among_others), exact) <= BUDGET


@pytest.mark.parametrize("k", [1, 2, 7, 300])
def test_tiny_and_nearly_certain_results_keep_their_digits(k: int) -> None:
    for n, c in ((100_000, 1), (100_000, 2), (100_000, 50_000), (100_000, 99_000), (2**31 - 1, 1)):
        found = float(pass_at_k([n], [c], [k])[0, 0])
        assert relative_error(found, exact_pass_at_k(n, c, k)) <= BUDGET


@settings(max_examples=60, deadline=None)
@given(counts())
def test_symmetry_and_order(item: tuple[int, int]) -> None:
    n, c = item
    ks = list(range(1, n + 1))
    row = pass_at_k([n], [c], ks)[0]
    assert np.all(np.diff(row) >= 0)
    assert np.all((row >= 0) & (row <= 1))
    if c:
        np.testing.assert_allclose(row, pass_at_k([n] * n, ks, [c])[:, 0], rtol=2 * BUDGET)


def test_ks_in_any_order_and_repeated() -> None:
    np.testing.assert_array_equal(
        pass_at_k([9, 4], [3, 1], [5, 1, 5, 9]), pass_at_k([9, 4], [3, 1], [1, 5, 9])[:, [1, 0, 1, 2]]
    )


def test_many_items_in_parallel_equal_one_at_a_time() -> None:
    generator = np.random.default_rng(0)
    items = 70_000  # enough for both loops of the extension to use threads
    n = generator.integers(0, 400, items)
    c = (n * generator.random(items)).astype(np.int64)
    ks = np.arange(1, 129)
    together = pass_at_k(n, c, ks)
    for i in range(0, items, 1397):
        np.testing.assert_array_equal(together[i], pass_at_k(n[i : i + 1], c[i : i + 1], ks)[0])


THREADS = """
import hashlib, sys
import numpy as np
from medbridge._native import g_pass_at_k, mean_curve, pass_at_k, pass_hat_k, reached_at_k

generator = np.random.default_rng(0)
n = generator.integers(0, 600, 70_000)
c = (n * generator.random(n.size)).astype(np.int64)
ks = np.arange(1, 129)
few, floor = slice(200), generator.choice([0, 0.2, 0.25, 0.5, 0.9, 1], 200)
digest = hashlib.sha256()
for values in (
    pass_at_k(n, c, ks),
    pass_hat_k(n, c, ks),
    mean_curve(n + 128, c, ks),
    mean_curve(n + 128, c, ks, generator.random(n.size)),
    g_pass_at_k(n[few], c[few], ks, 0.6),
    reached_at_k(n[few], c[few], ks, floor),
):
    digest.update(values.tobytes())
print(digest.hexdigest())
"""


def test_neither_threads_nor_instructions_change_a_bit() -> None:
    def digest(**environment: str) -> str:
        settings = {**os.environ, **environment}
        done = subprocess.run([sys.executable, "-c", THREADS], env=settings, capture_output=True, text=True, check=True)
        return done.stdout

    one = digest(OMP_NUM_THREADS="1")
    assert one == digest(OMP_NUM_THREADS="2")
    # without vector instructions and fused multiply-add
    assert one == digest(OMP_NUM_THREADS="1", MEDBRIDGE_PORTABLE="1")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"])
@tables
def test_every_integer_dtype(function: Callable[..., np.ndarray], dtype: str) -> None:
    n, c, ks = (np.array(values, dtype=dtype) for values in ([120, 7], [100, 0], [1, 100]))
    np.testing.assert_array_equal(function(n, c, ks), function([120, 7], [100, 0], [1, 100]))


@tables
def test_strided_and_read_only_input(function: Callable[..., np.ndarray]) -> None:
    n, c, ks = np.arange(40)[::4], np.arange(20)[::-2], np.arange(1, 9)[::3]
    c = np.minimum(n, c)
    n.flags.writeable = False
    np.testing.assert_array_equal(function(n, c, ks), function(n.tolist(), c.tolist(), ks.tolist()))


@tables
def test_empty_input(function: Callable[..., np.ndarray]) -> None:
    assert function([], [], [1, 2]).shape == (0, 2)
    assert function([3], [1], []).shape == (1, 0)
    assert function([], [], []).shape == (0, 0)


def test_the_mean_of_nothing_is_undefined() -> None:
    assert np.isnan(mean_curve([], [], [1, 2])).all()
    assert mean_curve([3], [1], []).shape == (0,)


@tables
def test_more_draws_than_samples_are_undefined(function: Callable[..., np.ndarray]) -> None:
    table = function([0, 3, 3, 3], [0, 0, 2, 3], [4, 1, 3])
    np.testing.assert_array_equal(np.isnan(table), [[True] * 3] + [[True, False, False]] * 3)


@pytest.mark.parametrize(
    ("n", "c", "ks", "message"),
    [
        ([4, 4], [1, 5], [1], r"c\[1\] = 5 is above n\[1\] = 4"),
        ([4, -3], [1, 0], [1], r"n\[1\] = -3 is negative"),
        ([4, 4], [-1, -2], [1], r"c\[0\] = -1 is negative"),
        ([4], [1], [1, 0], r"ks\[1\] = 0 is below 1"),
        ([4.0, 5.5], [1, 1], [1], r"n must hold integers, got dtype float64 with n\[1\] = 5.5"),
        ([4, 4], [1.0, float("nan")], [1], r"c must hold integers, got dtype float64 with c\[1\] = nan"),
        ([4.0], [1], [1], r"n\[0\] = 4.0"),
        ([4], [1], [1.0], r"ks must hold integers"),
        ([True], [1], [1], r"n must hold integers, got dtype bool"),
        (["4"], [1], [1], r"n must hold integers"),
        ([2**70], [1], [1], r"n must hold integers, got dtype object"),
        (np.array([4, 2**63], dtype=np.uint64), [1, 1], [1], r"n\[1\] = 9223372036854775808 doesn't fit"),
        ([4, 2**31], [1, 1], [1], r"n\[1\] = 2147483648 is above the largest accepted count"),
        ([4, 4], [1], [1], r"n has shape \(2,\) and c has shape \(1,\)"),
        ([[4]], [1], [1], r"n must have one dimension, got shape \(1, 1\)"),
        (4, [1], [1], r"n must have one dimension, got shape \(\)"),
        ([4], [1], 1, r"ks must have one dimension"),
        ([[4], [4, 4]], [1], [1], r"n can't be read as a numpy array"),
    ],
)
def test_refusals_name_the_first_bad_index(n: object, c: object, ks: object, message: str) -> None:
    for function in (*TABLES.values(), mean_curve):
        with pytest.raises(ValueError, match=message):
            function(n, c, ks)


@settings(max_examples=60, deadline=None)
@given(st.lists(counts(60), min_size=1, max_size=30), st.data())
def test_mean_curve_is_the_mean_of_the_table(items: list[tuple[int, int]], data: st.DataObject) -> None:
    n, c = np.array(items).T
    ks = np.arange(1, 65)
    np.testing.assert_allclose(mean_curve(n, c, ks), pass_at_k(n, c, ks).mean(axis=0), rtol=1e-14)
    weights = np.array(data.draw(st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=len(n), max_size=len(n))))
    if weights.sum() > 0:
        counted = weights > 0
        expected = np.average(pass_at_k(n, c, ks)[counted], axis=0, weights=weights[counted])
        np.testing.assert_allclose(mean_curve(n, c, ks, weights), expected, rtol=1e-13)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(40, 60), st.integers(0, 40), st.floats(1e-3, 1e3)), min_size=1, max_size=30))
def test_mean_curve_equals_exact_fractions(items: list[tuple[int, int, float]]) -> None:
    n, c, weights = (list(column) for column in zip(*items, strict=True))
    ks = [1, 2, 7, 30, 40]
    for found, k in zip(mean_curve(n, c, ks, weights), ks, strict=True):
        total = sum((Fraction(w) * exact_pass_at_k(a, b, k) for a, b, w in items), Fraction(0))
        assert relative_error(float(found), total / sum(map(Fraction, weights))) <= BUDGET


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], r"weights\[1\] = -1"),
        ([float("nan"), 1.0], r"weights\[0\] = nan"),
        ([1.0, float("inf")], r"weights\[1\] = inf"),
        ([0.0, 0.0], r"all weights are 0"),
        ([1e308, 1e308], r"the sum of the weights overflows"),
        ([1.0], r"weights has shape \(1,\)"),
        (["1", "1"], r"weights must hold real numbers"),
    ],
)
def test_bad_weights(weights: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_curve([4, 4], [1, 2], [1], weights)


def test_an_item_without_weight_cannot_void_the_mean() -> None:
    assert np.isnan(mean_curve([4, 1], [1, 1], [2]))[0]
    assert mean_curve([4, 1], [1, 1], [2], [1, 0])[0] == 0.5


@settings(max_examples=80, deadline=None)
@given(st.lists(counts(120), min_size=1, max_size=4), st.lists(st.integers(1, 130), min_size=1, max_size=4), st.data())
def test_relatives_equal_exact_fractions(items: list[tuple[int, int]], ks: list[int], data: st.DataObject) -> None:
    n, c = ([item[part] for item in items] for part in (0, 1))
    tau = data.draw(st.floats(0.01, 1) | st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0]))
    floor = [data.draw(st.floats(1e-6, 1) | st.sampled_from([0.0, 0.2, 0.25, 1 / 3, 0.5, 1.0])) for _ in items]
    found = pass_hat_k(n, c, ks), g_pass_at_k(n, c, ks, tau), reached_at_k(n, c, ks, floor)
    for i, (a, b) in enumerate(items):
        for j, k in enumerate(ks):
            if k > a:
                assert all(np.isnan(table[i, j]) for table in found)
                continue
            p = chances(a, b, k)
            reached = exact_reached(a, b, k, Fraction(floor[i]))
            for table, exact in zip(found, (p[k], sum(p[successes(tau, k) :]), reached), strict=True):
                assert relative_error(float(table[i, j]), Fraction(exact)) <= BUDGET


@pytest.mark.parametrize("n", range(1, 8))
def test_relatives_equal_the_mean_over_all_subsets(n: int) -> None:
    floor, tau = 0.3, 0.6
    ks = range(1, n + 1)
    for c in range(n + 1):
        found = (f([n], [c], ks)[0] for f in (pass_at_k, pass_hat_k))
        any_right, all_right = found
        share = g_pass_at_k([n], [c], ks, tau)[0]
        reached = reached_at_k([n], [c], ks, [floor])[0]
        for k in ks:
            drawn = [sum(subset) for subset in combinations([1] * c + [0] * (n - c), k)]
            score = exact_score(Fraction(floor), k)
            assert any_right[k - 1] == pytest.approx(np.mean([x >= 1 for x in drawn]), rel=BUDGET)
            assert all_right[k - 1] == pytest.approx(np.mean([x == k for x in drawn]), rel=BUDGET)
            assert share[k - 1] == pytest.approx(np.mean([10 * x >= 6 * k for x in drawn]), rel=BUDGET)
            assert reached[k - 1] == pytest.approx(float(sum(score[x] for x in drawn) / len(drawn)), rel=BUDGET)


def test_relatives_equal_scipy() -> None:
    generator = np.random.default_rng(1)
    n = generator.integers(50, 100_000, 30)
    c = (n * generator.random(30)).astype(np.int64)
    ks = np.array([1, 5, 17, 50])
    at = hypergeom(n[:, None], c[:, None], ks[None, :])
    np.testing.assert_allclose(pass_hat_k(n, c, ks), at.pmf(ks[None, :]), rtol=1e-7)
    needed = np.array([successes(0.3, int(k)) for k in ks])
    np.testing.assert_allclose(g_pass_at_k(n, c, ks, 0.3), at.sf(needed[None, :] - 1), rtol=1e-7)


@pytest.mark.parametrize("k", [3, 100, 2_000])
@pytest.mark.parametrize(("n", "c"), [(100_000, 50_001), (100_000, 99_950), (99_991, 700), (30_000, 9_000)])
def test_relatives_keep_their_digits_up_to_100_000_samples(n: int, c: int, k: int) -> None:
    least = max(0, k - (n - c))
    # C(c, x) C(n - c, k - x) by exact steps from the first
    term = comb(c, least) * comb(n - c, k - least)
    terms = [0] * least + [term]
    for x in range(least, min(c, k)):
        term = term * (c - x) * (k - x) // ((x + 1) * (n - c - k + x + 1))
        terms.append(term)
    every = comb(n, k)
    for tau in (1 / k, 0.25, 0.5, min(1.0, 1.1 * c / n), 1.0):
        exact = Fraction(sum(terms[successes(tau, k) :]), every)
        found = float(g_pass_at_k([n], [c], [k], tau)[0, 0])
        if exact > Fraction(1e-300):
            assert relative_error(found, exact) <= BUDGET
        else:
            assert found <= 1e-300
    whole = Fraction(comb(c, k), every)
    if whole == 0 or whole > Fraction(1e-300):
        assert relative_error(float(pass_hat_k([n], [c], [k])[0, 0]), whole) <= BUDGET
    if k > 100:
        return  # exact powers of the floor grow too long
    for floor in (0.25, 0.5, 0.9, c / n):
        score = exact_score(Fraction(floor), k)
        exact = sum((a * t for a, t in zip(score, terms, strict=False) if a), Fraction(0)) / every
        found = float(reached_at_k([n], [c], [k], [floor])[0, 0])
        assert relative_error(found, exact) <= BUDGET if exact > Fraction(1e-300) else found <= 1e-300


@tables
def test_a_row_does_not_depend_on_its_company(function: Callable[..., np.ndarray]) -> None:
    generator = np.random.default_rng(2)
    for ks in ([1, 2, 4, 8, 16], list(range(1, 70)), [300], [5, 1000]):
        n = generator.integers(0, 40, 300) * generator.choice([1, 30], 300)
        c = (n * generator.random(300)).astype(np.int64)
        together = function(n, c, ks)
        for i in range(0, 300, 7):
            np.testing.assert_array_equal(together[i], function(n[i : i + 1], c[i : i + 1], ks)[0])


def test_tails_meet_the_ends() -> None:
    generator = np.random.default_rng(3)
    n = generator.integers(1, 5_000, 50)
    c = (n * generator.random(50)).astype(np.int64)
    ks = np.array([1, 2, 3, 10, 40, 600])
    one_in_k = np.column_stack([g_pass_at_k(n, c, [k], 1 / k)[:, 0] for k in ks])
    np.testing.assert_allclose(one_in_k, pass_at_k(n, c, ks), rtol=4e-16)
    np.testing.assert_allclose(g_pass_at_k(n, c, ks, 1.0), pass_hat_k(n, c, ks), rtol=4e-16)
    np.testing.assert_array_equal(reached_at_k(n, c, ks, np.zeros(50)), pass_at_k(n, c, ks))
    np.testing.assert_array_equal(reached_at_k(n, c, ks, np.full(50, -0.0)), pass_at_k(n, c, ks))
    nothing_to_reach = reached_at_k(n, c, ks, np.ones(50))
    np.testing.assert_array_equal(nothing_to_reach, np.where(ks > n[:, None], np.nan, 1.0))
    # k = 1 is accuracy at every floor
    np.testing.assert_allclose(reached_at_k(n, c, [1], generator.uniform(0, 0.99, 50))[:, 0], c / n, rtol=2e-16)


@tables
def test_certain_results_are_exact(function: Callable[..., np.ndarray]) -> None:
    for n in (1, 7, 256, 100_000, 2**31 - 1):
        ks = [k for k in (1, 2, 5, 100, 99_999, n) if k <= n]
        np.testing.assert_array_equal(function([n], [n], ks), np.ones((1, len(ks))))
        np.testing.assert_array_equal(function([n], [0], ks), np.zeros((1, len(ks))))


@pytest.mark.parametrize(
    ("tau", "k", "needed"),
    [
        (0.1, 10, 1),
        (0.7, 10, 7),
        (0.07, 100, 7),
        (0.28, 25, 7),
        (0.57, 100, 57),
        (1.0, 9, 9),
        (0.5, 9, 5),
        (1 / 3, 9, 3),
        (nextafter(0.7, 1), 10, 8),
        (nextafter(0.7, 0), 10, 7),
        (1e-300, 10, 1),
        (5e-324, 1, 1),
        (nextafter(1, 0), 10, 10),
    ],
)
def test_tau_asks_for_the_least_share_that_reaches_it(tau: float, k: int, needed: int) -> None:
    n, c = 200, 90
    assert g_pass_at_k([n], [c], [k], tau)[0, 0] == pytest.approx(hypergeom(n, c, k).sf(needed - 1), rel=1e-9)


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (0.0, r"tau = 0: the share"),
        (1.5, r"tau = 1.5: the share"),
        (-0.25, r"tau = -0.25"),
        (float("nan"), r"tau = nan"),
        (float("inf"), r"tau = inf"),
        ("a", r"tau must hold real numbers"),
        (None, r"tau must hold real numbers"),
        ([0.5], r"tau must be one number, got shape \(1,\)"),
    ],
)
def test_bad_tau(tau: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        g_pass_at_k([4], [1], [1], tau)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        ([0.5, -0.1], r"floor\[1\] = -0.1: a guessing floor is a probability"),
        ([0.5, 1.25], r"floor\[1\] = 1.25"),
        ([float("nan"), 2.0], r"floor\[0\] = nan"),
        ([0.5], r"floor has shape \(1,\)"),
        (0.5, r"floor must have one dimension"),
        ([[0.5, 0.5]], r"floor must have one dimension"),
        (["a", "b"], r"floor must hold real numbers"),
    ],
)
def test_bad_floor(floor: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reached_at_k([4, 4], [1, 2], [1], floor)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.floats(1e-4, 0.9999) | st.sampled_from([0.2, 0.25, 0.5, 1 / 3]))
def test_every_guesser_reaches_its_floor(n: int, floor: float) -> None:
    f = Fraction(floor)
    ks = range(1, n + 1)
    table = reached_at_k([n] * (n + 1), range(n + 1), ks, [floor] * (n + 1))
    # afresh in each sample: c is binomial; the same guess always: all right on a share f of the items, else all wrong
    afresh = [float(comb(n, c) * f**c * (1 - f) ** (n - c)) for c in range(n + 1)]
    np.testing.assert_allclose(afresh @ table, floor, rtol=1e-13)
    np.testing.assert_array_equal(table[n], 1.0)
    np.testing.assert_array_equal(table[0], 0.0)
    assert np.all(np.diff(table, axis=0) >= -1e-15)  # more right answers reach no less


@pytest.mark.parametrize("k", [1, 3, 5, 99, 1001, 99_999])
def test_ties_of_an_even_chance_are_exact(k: int) -> None:
    # P(B > (k - 1) / 2) is exactly 1/2, so that only a majority counts; beside 1/2 hardly anything changes
    n, c = 100_000, 50_000
    found = reached_at_k([n] * 3, [c] * 3, [k], [0.5, nextafter(0.5, 0), nextafter(0.5, 1)])[:, 0]
    assert found[0] == 0.5
    np.testing.assert_allclose(found, 0.5, rtol=1e-10)
    # X can't pass t = (k - 1) / 2, where the score is g: 0 at the tie, and tiny but right just below it
    assert reached_at_k([2 * k], [k // 2], [k], [0.5])[0, 0] == 0.0
    below = Fraction(nextafter(0.5, 0))
    if 1 < k < 1000:
        g = exact_score(below, k)[k // 2]
        assert 0 < g < 1e-13
        assert relative_error(float(reached_at_k([k], [k // 2], [k], [float(below)])[0, 0]), g) <= 1e-6


@pytest.mark.parametrize("floor", [5e-324, 1e-300, 1e-30])
def test_vanishing_floors_reach_their_limit(floor: float) -> None:
    # two right guesses outweigh such a floor: one counts 1/k
    n, c, k = 40, 6, 8
    p = chances(n, c, k)
    assert relative_error(float(reached_at_k([n], [c], [k], [floor])[0, 0]), sum(p[2:]) + p[1] / k) <= BUDGET


def test_nearly_certain_guesses() -> None:
    floor = nextafter(1, 0)
    n, c, k = 60, 55, 12
    exact = exact_reached(n, c, k, Fraction(floor))
    assert relative_error(float(reached_at_k([n], [c], [k], [floor])[0, 0]), exact) <= BUDGET


def test_the_largest_counts() -> None:
    n = 2**31 - 1
    half = n // 2
    assert g_pass_at_k([n], [half], [half], 0.5)[0, 0] == pytest.approx(0.5, abs=1e-4)
    assert 0.0 < reached_at_k([n], [n // 4], [half], [0.25])[0, 0] < 1.0
    assert (
        relative_error(float(pass_hat_k([n], [n - 2], [half])[0, 0]), Fraction(comb(n - half, 2), comb(n, 2))) <= BUDGET
    )
