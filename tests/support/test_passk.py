"""Pass@K against exact rational arithmetic, and its refusals."""

from __future__ import annotations

import json
from fractions import Fraction
from math import comb, prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medbridge.support import mean_curve, pass_at_k

EXACT = json.loads((Path(__file__).parent / "exact_values.json").read_text())
BUDGET = 1e-15


def exact_pass_at_k(n: int, c: int, k: int) -> Fraction:
    a, b = min(c, k), max(c, k)
    if a + b > n:
        return Fraction(1)
    return 1 - Fraction(prod(range(n - b - a + 1, n - b + 1)), prod(range(n - a + 1, n + 1)))


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
    items = 20_000  # enough for both loops of the extension to use threads
    n = generator.integers(0, 150, items)
    c = (n * generator.random(items)).astype(np.int64)
    ks = np.arange(1, 129)
    together = pass_at_k(n, c, ks)
    for i in range(0, items, 397):
        np.testing.assert_array_equal(together[i], pass_at_k(n[i : i + 1], c[i : i + 1], ks)[0])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"])
def test_every_integer_dtype(dtype: str) -> None:
    n, c, ks = (np.array(values, dtype=dtype) for values in ([120, 7], [100, 0], [1, 100]))
    np.testing.assert_array_equal(pass_at_k(n, c, ks), pass_at_k([120, 7], [100, 0], [1, 100]))


def test_strided_and_read_only_input() -> None:
    n = np.arange(40)[::4]
    n.flags.writeable = False
    np.testing.assert_array_equal(pass_at_k(n, n // 2, [2]), pass_at_k(n.copy(), n // 2, [2]))


def test_empty_input() -> None:
    assert pass_at_k([], [], [1, 2]).shape == (0, 2)
    assert pass_at_k([3], [1], []).shape == (1, 0)
    assert np.isnan(mean_curve([], [], [1, 2])).all()


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
    for function in (pass_at_k, mean_curve):
        with pytest.raises(ValueError, match=message):
            function(n, c, ks)


@settings(max_examples=60, deadline=None)
@given(st.lists(counts(60), min_size=1, max_size=30), st.data())
def test_mean_curve_is_the_mean_of_the_table(items: list[tuple[int, int]], data: st.DataObject) -> None:
    n, c = np.array(items).T
    ks = np.arange(1, 65)
    np.testing.assert_allclose(mean_curve(n, c, ks), pass_at_k(n, c, ks).mean(axis=0), rtol=1e-14)
    weights = np.array(data.draw(st.lists(st.floats(0, 1e3), min_size=len(n), max_size=len(n))))
    if weights.sum() > 0:
        counted = weights > 0
        expected = np.average(pass_at_k(n, c, ks)[counted], axis=0, weights=weights[counted])
        np.testing.assert_allclose(mean_curve(n, c, ks, weights), expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], r"weights\[1\] = -1"),
        ([float("nan"), 1.0], r"weights\[0\] = nan"),
        ([1.0, float("inf")], r"weights\[1\] = inf"),
        ([0.0, 0.0], r"all weights are 0"),
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
