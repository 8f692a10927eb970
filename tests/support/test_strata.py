"""Many strata: procedures equal to their definitions, error rates and coverage kept in simulation."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.stats import chi2, norm

from medbridge.support import strata
from medbridge.support.sequential import log_e_values
from medbridge.support.strata import Control, adjusted, critical_value, pool, reject, reject_e

Floats = NDArray[np.float64]

quick = settings(deadline=None, max_examples=100)
CONTROLS: tuple[Control, ...] = ("fdr", "fwer", "none")
# Multiples of 1/64 are exact, so that ties with a bound are compared as such.
p_lists = st.lists(st.integers(0, 64).map(lambda i: i / 64), max_size=8)
e_lists = st.lists(st.integers(0, 256).map(lambda i: i / 4) | st.just(math.inf), max_size=8)
alphas = st.integers(1, 31).map(lambda i: i / 64)


def rejected_by_definition(p_values: Sequence[float], alpha: float, control: Control) -> list[bool]:
    """Step-up and step-down as first published, in exact arithmetic."""
    p, level, size = [Fraction(value) for value in p_values], Fraction(alpha), len(p_values)
    if control == "none":
        return [value <= level for value in p]
    if control == "fdr":
        passed = [k for k in range(1, size + 1) if sum(value <= k * level / size for value in p) >= k]
        return [value <= max(passed, default=0) * level / size and bool(passed) for value in p]
    taken: set[int] = set()
    for index in sorted(range(size), key=lambda i: p[i]):
        if p[index] > level / (size - len(taken)):
            break
        taken.add(index)
    # Equal p-values are rejected together: the later one faces the milder bound.
    return [index in taken for index in range(size)]


@quick
@given(p_lists, alphas, st.sampled_from(CONTROLS))
def test_reject_follows_the_definitions(p_values: list[float], alpha: float, control: Control) -> None:
    assert reject(p_values, alpha, control).tolist() == rejected_by_definition(p_values, alpha, control)


@quick
@given(e_lists, st.sampled_from([1 / 4, 1 / 8, 1 / 16]))
def test_reject_e_follows_the_definitions(e_values: list[float], alpha: float) -> None:
    size = len(e_values)
    passed = [k for k in range(1, size + 1) if sum(e * k * alpha >= size for e in e_values) >= k]
    kept = [bool(passed) and e * max(passed) * alpha >= size for e in e_values]
    # 1 / e is rounded, so that a value within rounding of a bound may fall on either side.
    ties = [any(e == size / (k * alpha) for k in range(1, size + 1)) for e in e_values]
    found = reject_e(e_values, alpha, "fdr").tolist()
    assert any(ties) or found == kept
    assert reject_e(e_values, alpha, "none").tolist() == [e >= 1 / alpha for e in e_values]
    order = sorted(range(size), key=lambda i: -e_values[i])
    steps = itertools.takewhile(lambda rank: e_values[order[rank]] * alpha >= size - rank, range(size))
    holm = {order[rank] for rank in steps}
    near = [any(e * alpha == rank for rank in range(1, size + 1)) for e in e_values]
    assert any(near) or set(np.flatnonzero(reject_e(e_values, alpha, "fwer"))) == holm


def test_adjusted_by_hand() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(adjusted(p_values, "fdr"), [0.02, 0.04, 0.04, 0.02])
    np.testing.assert_allclose(adjusted(p_values, "fwer"), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(adjusted(p_values, "none"), p_values)
    np.testing.assert_array_equal(adjusted([0.9, 1.0, 0.8], "fwer"), [1, 1, 1])


@quick
@given(p_lists, st.sampled_from(CONTROLS), st.randoms())
def test_adjusted_is_the_smallest_alpha(p_values: list[float], control: Control, shuffle: random.Random) -> None:
    found = adjusted(p_values, control)
    for index, level in enumerate(found):
        if level < 1:
            assert rejected_by_definition(p_values, level * (1 + 1e-12) + 1e-300, control)[index]
        if level > 0:
            assert not rejected_by_definition(p_values, level * (1 - 1e-12), control)[index]
    order = list(range(len(p_values)))
    shuffle.shuffle(order)
    np.testing.assert_array_equal(adjusted([p_values[i] for i in order], control), found[order])


@quick
@given(e_lists, st.lists(st.floats(0, 1e6) | st.just(math.nan), min_size=8, max_size=8), alphas)
def test_frozen_strata_keep_their_verdict(before: list[float], fresh: list[float], alpha: float) -> None:
    """Whatever becomes of the others, up or down, the set that was rejected together is rejected again."""
    for control in CONTROLS:
        frozen = reject_e(before, alpha, control)
        after = np.where(frozen, before, fresh[: len(before)])
        assert np.all(reject_e(after, alpha, control)[frozen])


def test_untested_strata_count_but_are_never_rejected() -> None:
    p_values, e_values = [0.02, math.nan, math.nan], [50.0, math.nan, math.nan]
    assert reject(p_values, 0.05, "none").tolist() == [True, False, False]
    assert reject_e(e_values, 0.05, "none").tolist() == [True, False, False]
    for control in ("fdr", "fwer"):
        assert not reject(p_values, 0.05, control).any()
        assert reject(p_values, 0.06, control).tolist() == [True, False, False]
        assert not reject_e(e_values, 0.05, control).any()
        assert reject_e([math.inf, math.nan], 1e-9, control).tolist() == [True, False]
    for control in CONTROLS:
        assert reject([], 0.05, control).shape == reject_e([], 0.05, control).shape == (0,)


def test_error_rates_in_simulation() -> None:
    generator = np.random.default_rng(0)
    runs, alpha, false = 2000, 0.1, np.arange(20) < 8
    p_values = norm.sf(generator.standard_normal((runs, 20)) + 3 * false)
    rates = {}
    for control in CONTROLS:
        found = np.array([reject(row, alpha, control) for row in p_values])
        wrong, all_found = (found & ~false).sum(axis=1), found.sum(axis=1)
        rates[control] = ((wrong / np.maximum(all_found, 1)).mean(), (wrong > 0).mean(), found[:, false].mean())
    noise = 3 * math.sqrt(alpha / runs)
    assert 0.6 * 0.1 - noise < rates["fdr"][0] < 0.6 * 0.1 + noise  # Benjamini and Hochberg's own: alpha times 12 / 20
    assert rates["fwer"][1] < alpha + noise
    assert rates["none"][1] > 0.5
    assert rates["fwer"][2] < rates["fdr"][2] < rates["none"][2]


def test_e_values_keep_the_fdr_under_any_dependence() -> None:
    generator = np.random.default_rng(1)
    runs, alpha, false = 2000, 0.1, np.arange(10) < 3
    common, own = generator.standard_normal((runs, 1)), generator.standard_normal((runs, 10))
    for share in (0.0, 0.7, 1.0):
        z = math.sqrt(share) * common + math.sqrt(1 - share) * own + 3 * false
        found = np.array([reject_e(row, alpha, "fdr") for row in np.exp(2 * z - 2)])
        wrong = (found & ~false).sum(axis=1) / np.maximum(found.sum(axis=1), 1)
        assert wrong.mean() < alpha + 3 * math.sqrt(alpha / runs)
        assert found[:, false].mean() > 0.3


def test_strata_that_stop_on_rejection_stay_rejected() -> None:
    """A look after each item, a rejected stratum draws no more: the false discovery rate holds at the end."""
    generator = np.random.default_rng(2)
    runs, steps, alpha, false = 200, 60, 0.1, np.arange(8) < 3
    values = (generator.random((runs, 8, steps)) < np.where(false, 0.9, 0.5)[:, None]).astype(float)
    running = np.exp(log_e_values(values, 0, 1, 0.5)[0])
    shares, power = [], []
    for run in running:
        frozen, held = np.zeros(8, dtype=bool), np.ones(8)
        for look in range(steps):
            held = np.where(frozen, held, run[:, look])
            found = reject_e(held, alpha, "fdr")
            assert np.all(found[frozen])
            frozen = found
        shares.append((frozen & ~false).sum() / max(1, frozen.sum()))
        power.append(frozen[false].mean())
    assert np.mean(shares) < alpha + 3 * math.sqrt(alpha / runs)
    assert np.mean(power) > 0.95


@pytest.mark.parametrize("alpha", [0.005, 0.025, 0.05, 0.3])
@pytest.mark.parametrize("second_moment", [0.01, 0.25, 1.0, 4.0])
def test_critical_value_against_linear_programming(second_moment: float, alpha: float) -> None:
    """The worst distribution of the bias is found over a fine grid of its squares: at c it misses 2 alpha."""
    c = critical_value(second_moment, alpha)
    squares = np.unique(np.r_[0.0, second_moment, np.linspace(0, 1, 400) ** 2 * (c + 6) ** 2, 1e4])
    miss = norm.cdf(np.sqrt(squares) - c) + norm.cdf(-np.sqrt(squares) - c)
    worst = linprog(-miss, A_eq=np.vstack([np.ones_like(squares), squares]), b_eq=[1, second_moment])
    assert -worst.fun == pytest.approx(2 * alpha, rel=2e-4)
    assert -worst.fun <= 2 * alpha * (1 + 1e-9)


def test_critical_value_in_its_limits() -> None:
    assert critical_value(0, 0.025) == pytest.approx(norm.ppf(0.975), rel=1e-12)
    assert critical_value(4, 0.025) == pytest.approx(7.216351, abs=1e-6)
    assert critical_value(1e8, 0.025) == pytest.approx(math.sqrt((1 + 1e8) / 0.05), rel=1e-3)
    values = [critical_value(moment, 0.05) for moment in np.geomspace(1e-8, 1e12, 60)]
    assert np.all(np.diff(values) > 0)
    assert critical_value(1.0, 0.01) > critical_value(1.0, 0.05) > critical_value(1.0, 0.4)


def test_strata_far_apart_are_left_alone() -> None:
    values, errors = np.array([-50.0, 0.0, 80.0, 10.0]), np.array([0.1, 0.2, 0.3, 0.05])
    found = pool(values, errors, 0.05)
    np.testing.assert_allclose(found.weights, 1, atol=1e-4)
    np.testing.assert_allclose(found.value, values, atol=1e-2)
    np.testing.assert_allclose(found.high - found.value, 1.644854 * errors, rtol=1e-2)
    assert found.between_sd == pytest.approx(values.std(ddof=1), rel=1e-3)
    assert found.between_sd_high > found.between_sd


def test_equal_strata_are_pooled_whole() -> None:
    errors = np.array([0.1, 0.2, 0.05, 0.4])
    found = pool(np.full(4, 0.3), errors, 0.05)
    mean_error = (errors**-2.0).sum() ** -0.5
    assert found.between_sd == found.between_sd_high == 0
    np.testing.assert_array_equal(found.weights, 0)
    np.testing.assert_allclose(found.value, 0.3)
    np.testing.assert_allclose(found.high - found.low, 2 * 1.644854 * mean_error, rtol=1e-6)


def test_pool_follows_its_formulas() -> None:
    generator = np.random.default_rng(3)
    errors = generator.uniform(0.5, 1.5, 12)
    values = generator.standard_normal(12) * np.hypot(1.5, errors)
    found = pool(values, errors, 0.05)

    def cochran(spread: float) -> float:
        precision = 1 / (spread**2 + errors**2)
        return float(precision @ (values - np.average(values, weights=precision)) ** 2)

    assert cochran(found.between_sd) == pytest.approx(11)
    assert cochran(found.between_sd_high) == pytest.approx(chi2.ppf(0.05, 11))
    spread = found.between_sd_high**2
    precision = 1 / (spread + errors**2)
    # The estimates as one matrix times the values.
    matrix = np.diag(found.weights) + np.outer(1 - found.weights, precision / precision.sum())
    np.testing.assert_allclose(found.value, matrix @ values)
    sd = np.sqrt(np.diag(matrix @ np.diag(errors**2) @ matrix.T))
    moments = (1 - found.weights) ** 2 * spread / sd**2
    half = [critical_value(moment, 0.05) * error for moment, error in zip(moments, sd, strict=True)]
    np.testing.assert_allclose(found.high - found.value, half)
    np.testing.assert_allclose(found.value - found.low, half)

    order, scale = generator.permutation(12), 1e-5
    moved = pool(3 + scale * values[order], scale * errors[order], 0.05)
    np.testing.assert_allclose((moved.low - 3) / scale, found.low[order], rtol=1e-6, atol=1e-6)
    assert moved.mean == pytest.approx(3 + scale * found.mean)
    assert moved.between_sd_high == pytest.approx(scale * found.between_sd_high)


@pytest.mark.parametrize("size", [3, 6, 20])
@pytest.mark.parametrize("truth", ["normal", "two points", "one outlier", "alike"])
def test_average_coverage(size: int, truth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nominal on average over strata at every shape of the truth, up to noise; few strata cost at most 0.02."""
    moments = np.geomspace(1e-4, 1e4, 200)
    table = [critical_value(moment, 0.05) for moment in moments]
    monkeypatch.setattr(strata, "critical_value", lambda moment, _: np.interp(moment, moments, table))
    generator = np.random.default_rng(size)
    runs = 250
    errors = np.geomspace(0.5, 2, size)
    shapes = {
        "normal": lambda: generator.standard_normal(size),
        "two points": lambda: generator.choice([-1.0, 1.0], size),
        "one outlier": lambda: math.sqrt(size) * (np.arange(size) == generator.integers(size)),
        "alike": lambda: np.zeros(size),
    }
    covered, length = [], []
    for _ in range(runs):
        true = shapes[truth]()
        found = pool(true + errors * generator.standard_normal(size), errors, 0.05)
        covered.append(((found.low <= true) & (true <= found.high)).mean())
        length.append(((found.high - found.low) / (2 * 1.644854 * errors)).mean())
    noise = 3 * np.std(covered) / math.sqrt(runs)
    assert np.mean(covered) >= 0.9 - noise - (0.02 if size < 5 else 0)
    assert np.mean(length) < (1.0 if size < 5 else 0.97 if size < 10 else 0.9)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"p_values\[1\] = 1\.5, must be from 0 to 1"):
        reject([0.1, 1.5], 0.05, "fdr")
    with pytest.raises(ValueError, match=r"e_values\[0\] = -1\.0, must be at least 0"):
        reject_e([-1, 2], 0.05, "fdr")
    with pytest.raises(ValueError, match="p_values has 2 axes"):
        adjusted([[0.1]], "fdr")
    with pytest.raises(ValueError, match="control = 'fwe', must be one of fdr, fwer, none"):
        adjusted([0.1], "fwe")  # type: ignore[arg-type]
    for alpha in (0, 1, math.nan):
        with pytest.raises(ValueError, match="must be above 0 and below 1"):
            reject([0.1], alpha, "none")
    for values, errors, message in [
        ([1, 2], [1, 1], "values has 2 strata: the spread between strata needs at least 3"),
        ([1, 2, 3], [1, 1], "standard_errors has 2 values for 3 strata"),
        ([1, math.nan, 3], [1, 1, 1], r"values\[1\] = nan, must be finite"),
        ([1, 2, 3], [1, 1, 0], r"standard_errors\[2\] = 0\.0, must be finite and above 0"),
        ([1, 2, 3], [1, math.inf, 1], r"standard_errors\[1\] = inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool(values, errors, 0.05)
    with pytest.raises(ValueError, match=r"alpha = 0\.5, must be above 0 and below 0\.5"):
        pool([1, 2, 3], [1, 1, 1], 0.5)
    with pytest.raises(ValueError, match="second_moment = -1, must be finite"):
        critical_value(-1, 0.05)
