"""The distribution of success probabilities: its optimum against direct maximisation, what is read from it against
known truths, and its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from medbridge import _native
from medbridge.support import mean_curve
from medbridge.support.spectra import (
    MAX_RELIABLE_K,
    TIE_WIDTH,
    Spectrum,
    bootstrap_posterior,
    cover_interval,
    default_grid,
    majority_values,
    posterior_weights,
    reached_values,
    spectrum,
)

Floats = NDArray[np.float64]
SMALL_GRID = np.array([0.0, 0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 0.95, 1.0])
UNIT = Spectrum(np.array([0.5]), np.array([1.0]), 200, 16, 16, 0.0, True, 0.0)


def likelihoods(n: NDArray[np.int64], c: NDArray[np.int64], grid: Floats) -> Floats:
    return grid ** c[:, None] * (1 - grid) ** (n - c)[:, None]


def log_likelihood(n: NDArray[np.int64], c: NDArray[np.int64], grid: Floats, mass: Floats) -> float:
    return float(np.log(likelihoods(n, c, grid) @ mass).sum())


@st.composite
def items(draw: st.DrawFn, most: int = 12) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n = draw(st.lists(st.integers(1, most), min_size=1, max_size=12))
    c = [draw(st.integers(0, value)) for value in n]
    return np.array(n), np.array(c)


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


# --- the fit ---


@settings(max_examples=60, deadline=None)
@given(items())
def test_no_distribution_is_likelier(counts: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
    """Against SLSQP from the optimum found and from the uniform distribution."""
    n, c = counts
    table = likelihoods(n, c, SMALL_GRID)
    table /= table.max(axis=1, keepdims=True)
    fit = spectrum(n, c, grid=SMALL_GRID, tolerance=1e-9)
    assert fit.log_likelihood == pytest.approx(log_likelihood(n, c, SMALL_GRID, fit.weights), rel=1e-12, abs=1e-12)
    for start in (fit.weights, np.full(SMALL_GRID.size, 1 / SMALL_GRID.size)):
        direct = minimize(
            lambda mass: -np.log(np.maximum(table @ mass, 1e-300)).mean(),
            start,
            jac=lambda mass: -(table / np.maximum(table @ mass, 1e-300)[:, None]).mean(axis=0),
            bounds=[(0, 1)] * SMALL_GRID.size,
            constraints={"type": "eq", "fun": lambda mass: mass.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        best = np.maximum(direct.x, 0) / np.maximum(direct.x, 0).sum()
        assert log_likelihood(n, c, SMALL_GRID, best) <= fit.log_likelihood + 1e-8 * n.size


@settings(max_examples=60, deadline=None)
@given(items(400), st.integers(1, 12))
def test_the_gap_is_lindsays_and_bounds_the_loss(
    counts: tuple[NDArray[np.int64], NDArray[np.int64]], steps: int
) -> None:
    n, c = counts
    points = np.linspace(0.05, 0.95, 40)
    best = spectrum(n, c, grid=points, tolerance=1e-10)
    mass, gap, reached = _native.fit_spectra(*distinct(n, c), points, 1e-10, steps)
    log_table = c[:, None] * np.log(points) + (n - c)[:, None] * np.log1p(-points)
    table = np.exp(log_table - log_table.max(axis=1, keepdims=True))
    derivative = (table / (table @ mass[0])[:, None]).mean(axis=0)
    assert gap[0] == pytest.approx(derivative.max() - 1, rel=1e-6, abs=1e-12)
    assert reached[0] <= best.log_likelihood + 1e-7
    assert best.log_likelihood - reached[0] <= n.size * (gap[0] + 1e-9) * (1 + 1e-9)


def distinct(
    n: NDArray[np.int64], c: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    rows_n, rows_c, row_of = _native.distinct_counts(n, c)
    return rows_n, rows_c, np.bincount(row_of).astype(np.float64)[None]


@settings(max_examples=40, deadline=None)
@given(items(30))
def test_it_is_the_fixed_point_of_em(counts: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
    """The mean posterior is the distribution itself: sum_j G_j |derivative_j - 1| is at most twice the gap."""
    fit = spectrum(*counts, 0.25)
    assert fit.gap <= 1e-6
    moved = np.abs(fit.posterior(*counts).mean(axis=0) - fit.weights).sum()
    assert moved <= 2 * fit.gap + 1e-12


def test_more_steps_never_end_worse() -> None:
    generator = np.random.default_rng(0)
    n, c, weights = distinct(np.full(300, 16), generator.binomial(16, generator.beta(0.5, 0.7, 300)))
    gaps = [_native.fit_spectra(n, c, weights, default_grid(), 1e-12, steps)[1][0] for steps in range(1, 20)]
    assert all(later <= earlier for earlier, later in pairwise(gaps))
    assert gaps[-1] <= 1e-10


@pytest.mark.parametrize("n", [1, 2, 8, 16, 64, 1000, 10_000])
@pytest.mark.parametrize("truth", ["guess", "two", "beta", "none", "all", "split"])
def test_every_shape_of_data_converges(n: int, truth: str) -> None:
    generator = np.random.default_rng(n)
    draw = {
        "guess": lambda size: np.full(size, 0.25),
        "two": lambda size: np.where(generator.random(size) < 0.5, 0.25, 0.9),
        "beta": lambda size: generator.beta(0.3, 0.3, size),
        "none": np.zeros,
        "all": np.ones,
        "split": lambda size: np.arange(size) % 2 * 1.0,
    }[truth]
    for count in (1, 3, 200):
        fit = spectrum(np.full(count, n), generator.binomial(n, draw(count)), 0.25)
        assert fit.converged and fit.gap <= 1e-6
        assert fit.weights.sum() == pytest.approx(1, abs=1e-12)
        assert (fit.weights > 0).all() and np.isfinite(fit.log_likelihood)


def test_fits_that_never_converged_with_longer_steps() -> None:
    """Two histograms of n = 16 at which steps of 0.9995 of the way circled round the optimum."""
    for histogram in (
        [0, 1, 4, 6, 4, 4, 2, 1, 2, 0, 0, 0, 1, 4, 6, 9, 6],
        [1, 1, 2, 5, 7, 12, 8, 5, 5, 2, 1, 0, 1, 0, 0, 0, 0],
    ):
        assert spectrum(np.full(50, 16), np.repeat(np.arange(17), histogram), 0.25).converged


def test_two_points_are_found() -> None:
    generator = np.random.default_rng(0)
    items = 50_000
    fit = spectrum(np.full(items, 16), generator.binomial(16, np.where(generator.random(items) < 0.3, 0.25, 0.9)), 0.25)
    assert fit.weights[np.abs(fit.grid - 0.25) < 0.05].sum() == pytest.approx(0.3, abs=0.02)
    assert fit.weights[np.abs(fit.grid - 0.9) < 0.03].sum() == pytest.approx(0.7, abs=0.02)
    assert fit.weights @ fit.grid == pytest.approx(0.3 * 0.25 + 0.7 * 0.9, abs=0.005)


def test_not_converged_is_said() -> None:
    n, c = np.full(50, 16), np.arange(50) % 17
    with pytest.warns(RuntimeWarning, match="the spectrum's gap is .* above 1e-06"):
        fit = spectrum(n, c, max_iterations=1)
    assert not fit.converged
    assert fit.gap > 1e-6


def test_weights_count_as_repetition() -> None:
    n, c, times = np.array([4, 8, 8, 3, 0]), np.array([1, 8, 2, 0, 0]), np.array([3, 1, 2, 5, 4])
    repeated = spectrum(np.repeat(n, times), np.repeat(c, times))
    weighted = spectrum(n, c, weights=times)
    np.testing.assert_allclose(weighted.weights, repeated.weights, atol=1e-12)
    assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood)
    assert (weighted.items, weighted.n_min, weighted.n_max) == (4, 3, 8)
    assert spectrum(n, c, weights=[1, 1, 1, 0, 0]).n_min == 4


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_any_integers_in_any_order_of_memory(dtype: type) -> None:
    n, c = np.array([5, 9, 9, 3, 7]), np.array([0, 9, 4, 3, 1])
    table = np.stack([n, c], axis=1).astype(dtype)
    found = spectrum(table[:, 0], table[:, 1])
    np.testing.assert_array_equal(found.weights, spectrum(n.tolist(), c.tolist()).weights)
    np.testing.assert_allclose(found.weights, spectrum(n[::-1], c[::-1]).weights, atol=1e-14)


def test_the_grid_holds_the_ends_and_every_floor() -> None:
    grid = spectrum([4, 4, 4], [1, 2, 3], [0.0, 1 / 3, 0.2]).grid
    assert {0.0, 0.2, 1 / 3, 1.0} <= set(grid.tolist())
    assert (np.diff(grid) > 0).all()
    assert grid.size == default_grid().size + 2


THREADS = """
import numpy as np
from medbridge.support.spectra import cover_interval, spectrum
generator = np.random.default_rng(0)
n = generator.integers(1, 60, 1500)
c = generator.binomial(n, generator.beta(0.5, 0.5, 1500))
fit = spectrum(n, c, 0.25)
n, c, clusters = n[:60], c[:60], [str(i) for i in range(60)]
interval = cover_interval(n, c, 0.25, fit, clusters=clusters, alpha=0.05, seed=1, replicates=40)
print(fit.weights.tobytes().hex(), interval.low.tobytes().hex(), interval.high.tobytes().hex())
"""


def test_the_number_of_threads_changes_no_bit() -> None:
    def output(threads: int) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert output(1) == output(2)


# --- Pass@k and how far it can be told ---


def test_up_to_n_the_prediction_is_the_unbiased_estimate() -> None:
    generator = np.random.default_rng(0)
    n = np.full(20_000, 16)
    c = generator.binomial(16, generator.beta(0.4, 0.8, n.size))
    ks = np.arange(1, 17)
    np.testing.assert_allclose(spectrum(n, c).pass_at_k(ks), mean_curve(n, c, ks), atol=0.002)


def test_beyond_n_it_rises_and_its_limit_is_the_share_that_is_ever_right() -> None:
    fit = spectrum([8] * 40, [0] * 20 + [3] * 20)
    curve = fit.pass_at_k([1, 8, 9, 100, 10**6, 2**62])
    assert (np.diff(curve) >= 0).all()
    assert curve[-1] == pytest.approx(1 - fit.weights[0], abs=1e-9)
    assert fit.pass_at_k(3) == fit.pass_at_k([3])


def test_reached_values_are_exact_at_the_ends() -> None:
    np.testing.assert_array_equal(reached_values(np.array([0.0, 1.0]), [1, 7]), [[0, 1], [0, 1]])
    assert reached_values(np.array([1e-12]), [3])[0, 0] == pytest.approx(3e-12, rel=1e-9)


@pytest.mark.parametrize(("items", "tolerance", "k"), [(384, 0.05, 0), (385, 0.05, 1), (96, 0.1, 0), (97, 0.1, 1)])
def test_one_sample_tells_its_mean_as_a_proportion_is_told(items: int, tolerance: float, k: int) -> None:
    """n = k = 1: the error is 1.96 / (2 sqrt(items))."""
    assert min(1, replace(UNIT, n_min=1, items=items).reliable_k(tolerance)) == k


def test_more_items_and_samples_reach_further() -> None:
    by_items = [replace(UNIT, items=items).reliable_k(0.1) for items in (5, 200, 10**6, 10**9)]
    by_samples = [replace(UNIT, n_min=n).reliable_k(0.1) for n in (1, 4, 8, 16, 32)]
    by_tolerance = [UNIT.reliable_k(tolerance) for tolerance in (0.01, 0.05, 0.1, 0.4)]
    for reached in (by_items, by_samples, by_tolerance):
        assert all(earlier <= later for earlier, later in pairwise(reached))
    assert 0 == by_items[0] < 16 < by_items[1] < by_items[-1] < 16**2
    assert UNIT.reliable_k(0.1, confidence=0.99) < UNIT.reliable_k(0.1, confidence=0.5)
    assert replace(UNIT, n_min=10_000, items=10**9).reliable_k(0.4) == MAX_RELIABLE_K


@pytest.mark.parametrize(("n", "items", "tolerance"), [(16, 200, 0.1), (8, 100, 0.15), (16, 1000, 0.05)])
def test_predictions_within_reach_are_right(n: int, items: int, tolerance: float) -> None:
    """Truths made to deceive: success that is just rare enough to be missed in n samples, and seen by k."""
    generator = np.random.default_rng(n)
    k = replace(UNIT, n_min=n, items=items).reliable_k(tolerance)
    truths = [
        lambda: np.where(generator.random(items) < 0.5, 1 / k, 0.0),
        lambda: np.full(items, 1 / k),
        lambda: np.full(items, 0.5 / k),
        lambda: generator.choice([0.0, 0.4 / n, 2 / n, 0.5], items, p=[0.4, 0.3, 0.2, 0.1]),
        lambda: generator.choice([0.15 / n, 1 / n, 3 / n], items, p=[0.3, 0.4, 0.3]),
        lambda: generator.beta(0.1, 1.0, items),
        lambda: generator.beta(0.3, 10.0, items),
    ]
    for truth in truths:
        errors = []
        for _ in range(40):
            p = truth()
            found = spectrum(np.full(items, n), generator.binomial(n, p), tolerance=1e-4).pass_at_k([k])[0]
            errors.append(found - (1 - (1 - p) ** k).mean())
        # 95 % are promised; of 40, fewer than 34 within is then rarer than 1 in 1,000.
        assert (np.abs(errors) <= tolerance).sum() >= 34


# --- posterior, cover, majority ---


@settings(max_examples=40, deadline=None)
@given(items(20))
def test_the_posterior_is_bayes_rule(counts: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
    n, c = counts
    fit = spectrum(n, c, grid=SMALL_GRID)
    joint = likelihoods(n, c, SMALL_GRID) * fit.weights
    np.testing.assert_allclose(fit.posterior(n, c), joint / joint.sum(axis=1, keepdims=True), atol=1e-12)


def test_the_posterior_of_nothing_is_the_spectrum() -> None:
    fit = spectrum([4, 4], [1, 3])
    np.testing.assert_allclose(fit.posterior([0, 4], [0, 1])[0], fit.weights)
    assert fit.posterior(np.array([], dtype=int), np.array([], dtype=int)).shape == (0, fit.grid.size)


def test_many_samples_leave_a_sharp_posterior() -> None:
    fit = spectrum([10_000, 10_000, 1_000_000], [3, 7_000, 999_999])
    means = fit.posterior([10_000, 10_000, 1_000_000], [3, 7_000, 999_999]) @ fit.grid
    np.testing.assert_allclose(means, [0.0003, 0.7, 1.0], atol=0.005)


def test_cover_counts_each_item_against_its_own_floor() -> None:
    n = np.full(300, 400)
    p = np.repeat([0.1, 0.4, 0.4], 100)
    floors = np.repeat([0.0, 0.25, 0.5], 100)
    c = np.round(p * n).astype(int)
    fit = spectrum(n, c, floors)
    assert fit.cover(n, c, floors, 0.02) == pytest.approx(2 / 3, abs=0.01)
    assert fit.cover(n[:100], c[:100], 0.0, 0.02) == pytest.approx(1, abs=0.01)
    assert fit.cover(n[200:], c[200:], 0.5, 0.02) == pytest.approx(0, abs=0.01)


def test_cover_includes_its_threshold() -> None:
    grid = np.array([0.25, 0.325, 0.55, 1.0])
    fit = spectrum([1000] * 4, [250, 325, 550, 1000], grid=grid)
    assert fit.cover([1000] * 4, [250, 325, 550, 1000], 0.25, 0.1) == pytest.approx(0.75, abs=0.01)
    assert fit.cover([1000] * 4, [250, 325, 550, 1000], 0.5, 0.1) == pytest.approx(0.5, abs=0.01)


def test_items_without_samples_or_room_do_not_cover() -> None:
    n, c, floors = [8, 8, 0, 8], [8, 0, 0, 8], [0.25, 0.25, 0.25, 1.0]
    fit = spectrum(n, c, floors)
    assert fit.cover(n, c, floors) == pytest.approx(fit.cover(n[:2], c[:2], 0.25))
    assert np.isnan(fit.cover([8], [8], 1.0))
    assert np.isnan(fit.cover([0], [0], 0.0))


def test_the_mode_wins_where_it_beats_its_rival() -> None:
    grid = np.array([0.1, 0.2, 0.25, 0.4, 0.5, 0.6])
    even = majority_values(grid, [1 / 3], 1)[0]
    np.testing.assert_allclose(even, [0, 0, 0.25, 1, 1, 1])
    alone = majority_values(grid, [1.0], 1)[0]
    np.testing.assert_allclose(alone, [0, 0, 0, 0, 0.5, 1])
    np.testing.assert_allclose(majority_values(grid, [[1 / 3, 1.0]], 1)[0], (even + alone) / 2)
    np.testing.assert_allclose(majority_values(np.array([0.0, TIE_WIDTH + 1e-3]), [0.0], 1), [[0, 1]])


def test_majority_reads_each_items_rival() -> None:
    n, c = [1000] * 3, [400, 400, 600]
    fit = spectrum(n, c)
    assert fit.majority(n, c, [1 / 3, 1.0, 1.0]) == pytest.approx(2 / 3, abs=0.01)
    assert np.isnan(fit.majority([0], [0], [1.0]))


# --- intervals ---


@pytest.mark.parametrize(("share", "skill"), [(0.5, 0.9), (0.2, 0.6), (0.9, 0.7)])
def test_intervals_hold_the_truth(share: float, skill: float) -> None:
    generator = np.random.default_rng(0)
    items, cases = 60, 40
    n = np.full(items, 16)
    missed = np.zeros(2)
    for case in range(cases):
        c = generator.binomial(n, np.where(generator.random(items) < share, skill, 0.25))
        fit = spectrum(n, c, 0.25)
        found = cover_interval(n, c, 0.25, fit, clusters=names(items), alpha=0.05, seed=case, replicates=80)
        assert found.low[0] <= found.value[0] <= found.high[0]
        missed += [found.low[0] > share, found.high[0] < share]
    # 5 % for each end are promised; more than 7 of 40 are then rarer than 1 in 500.
    assert (missed <= 7).all()


@pytest.mark.parametrize(("p", "share"), [(0.25, 0.0), (1.0, 1.0)])
def test_intervals_at_the_ends_have_width_and_reach_them(p: float, share: float) -> None:
    generator = np.random.default_rng(0)
    for seed in range(10):
        c = generator.binomial(16, p, 100)
        fit = spectrum(np.full(100, 16), c, 0.25)
        found = cover_interval(np.full(100, 16), c, 0.25, fit, clusters=names(100), alpha=0.05, seed=seed)
        assert found.low[0] - 0.02 <= share <= found.high[0] + 0.02
        assert found.high[0] - found.low[0] > 0.02


def test_items_of_one_cluster_count_as_one() -> None:
    generator = np.random.default_rng(0)
    n, c = np.full(120, 16), generator.binomial(16, np.repeat(generator.choice([0.25, 0.9], 30), 4))
    fit = spectrum(n, c, 0.25)
    single = cover_interval(n, c, 0.25, fit, clusters=names(120), alpha=0.05, seed=0)
    grouped = cover_interval(n, c, 0.25, fit, clusters=[str(i // 4) for i in range(120)], alpha=0.05, seed=0)
    assert grouped.value == pytest.approx(single.value)
    assert grouped.high - grouped.low > 1.5 * (single.high - single.low)


def test_intervals_depend_on_the_seed_only() -> None:
    n, c = np.full(30, 8), np.arange(30) % 9
    fit = spectrum(n, c, 0.25)
    first, again, other = (
        cover_interval(n, c, 0.25, fit, clusters=names(30), alpha=0.05, seed=seed, replicates=50) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.low, again.low)
    assert first.low != other.low


def test_functions_share_their_refits_and_read_the_items_that_count() -> None:
    n, c = np.array([8, 0, 8, 4, 8]), np.array([3, 0, 8, 0, 6])
    fit = spectrum(n, c)
    both = bootstrap_posterior([fit.grid, 1 - fit.grid], n, c, fit, clusters=names(5), alpha=0.1, seed=0, replicates=64)
    assert both.value.sum() == pytest.approx(1)
    np.testing.assert_allclose(both.low, 1 - both.high[::-1], atol=1e-12)
    assert both.value[0] == pytest.approx(fit.weights @ fit.grid, abs=1e-5)


# --- refusals ---


@pytest.mark.parametrize(
    ("n", "c", "options", "message"),
    [
        ([], [], {}, "no items: none of 0"),
        ([0, 0], [0, 0], {}, "no items: none of 2"),
        ([4], [1], {"weights": [0.0]}, "no items: none of 1"),
        ([4, 4], [1, 5], {}, r"c\[1\] = 5 is above n\[1\] = 4"),
        ([4, -1], [1, 0], {}, r"n\[1\] = -1 is negative"),
        ([4, 4], [1, -2], {}, r"c\[1\] = -2 is negative"),
        ([2**31], [1], {}, r"n\[0\] = 2147483648 is above the largest"),
        ([4.0, float("nan")], [1, 1], {}, r"n must hold integers, .* n\[1\] = nan"),
        ([4, 4], [1], {}, "must have one value per item"),
        ([[4]], [[1]], {}, "n must have one dimension"),
        ([4, 4], [1, 1], {"weights": [1.0, float("nan")]}, r"weights\[1\] = nan"),
        ([4, 4], [1, 1], {"weights": [1.0, -1.0]}, r"weights\[1\] = -1.0"),
        ([4, 4], [1, 1], {"weights": [1.0]}, "weights has 1 values for 2 items"),
        ([4, 4], [1, 1], {"floor": [0.25, 1.5]}, r"floor\[1\] = 1.5"),
        ([4, 4], [1, 1], {"floor": [0.25]}, "floor has 1 values for 2 items"),
        ([4, 4], [1, 1], {"floor": float("nan")}, r"floor\[0\] = nan"),
        ([4, 4], [1, 1], {"grid": []}, "grid is empty"),
        ([4, 4], [1, 1], {"grid": [0.1, 0.1]}, r"grid\[1\] = 0.1"),
        ([4, 4], [1, 1], {"grid": [0.1, 1.1]}, r"grid\[1\] = 1.1"),
        ([4, 4], [1, 1], {"grid": [float("nan")]}, r"grid\[0\] = nan"),
        ([4, 4], [1, 1], {"grid": ["a"]}, "grid must be real numbers"),
        ([4, 4], [4, 1], {"grid": [0.0, 1.0]}, "no point that could give 1 correct of 4"),
        ([4, 4], [1, 1], {"tolerance": 0.0}, "tolerance = 0.0"),
        ([4, 4], [1, 1], {"max_iterations": 0}, "max_iterations = 0"),
    ],
)
def test_bad_input_is_named(n: list, c: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectrum(n, c, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda fit: fit.pass_at_k([2, 0]), r"ks\[1\] = 0"),
        (lambda fit: fit.pass_at_k([1.5]), "ks must be integers"),
        (lambda fit: fit.reliable_k(0.0), "tolerance = 0.0"),
        (lambda fit: fit.reliable_k(0.1, 1.0), "confidence = 1.0"),
        (lambda fit: fit.cover([4], [1], 0.25, 0.0), "margin = 0.0"),
        (lambda fit: fit.cover([4], [5], 0.25), r"c\[0\] = 5"),
        (lambda fit: fit.majority([4], [1], [1.5]), r"rival\[0\]"),
        (lambda fit: fit.majority([4], [1], [float("nan")]), r"rival\[0\]"),
        (lambda fit: fit.majority([4], [1], [0.5, 0.5]), "rival has shape"),
        (lambda fit: posterior_weights([4], [1], np.array([0.0, 0.5]), np.array([1.0, 0.0])), "1 correct of 4"),
        (lambda fit: cover_interval([4], [1], 0.0, fit, clusters=[], alpha=0.05, seed=0), "clusters has 0"),
        (lambda fit: cover_interval([4], [1], 1.0, fit, clusters=["a"], alpha=0.05, seed=0), "no items"),
        (lambda fit: cover_interval([4], [1], 0.0, fit, clusters=["a"], alpha=0.5, seed=0), "alpha = 0.5"),
        (lambda fit: cover_interval([4], [1], 0.0, fit, clusters=["a"], alpha=0.1, seed=0, replicates=0), "replicates"),
    ],
)
def test_bad_questions_are_named(call: object, message: str) -> None:
    fit = spectrum([4, 4], [1, 3])
    with pytest.raises(ValueError, match=message):
        call(fit)  # type: ignore[operator]
