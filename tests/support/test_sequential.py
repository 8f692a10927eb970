"""Evidence at any time: its mean under the null is 1 by full enumeration, it rarely ever misleads, and it is quick."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medbridge.support import sequential
from medbridge.support.sequential import MeanTest, confidence_sequence, log_e_values

Floats = NDArray[np.float64]

quick = settings(deadline=None, max_examples=50)
# Multiples of 1/64 are exact, so that rounding can't blur a comparison.
grid_values = st.lists(st.integers(0, 64).map(lambda i: i / 64), max_size=12)
grid_threshold = st.integers(1, 63).map(lambda i: i / 64)


def e_values(values: object, threshold: object, population: int | None = None) -> tuple[Floats, Floats]:
    """Running e-values on the range 0..1."""
    above, below = log_e_values(values, 0, 1, threshold, population)
    return np.exp(above), np.exp(below)


def assert_means_are_one(above: Floats, below: Floats, weights: Floats) -> None:
    """Expectation 1 at all times, less the little that the slack takes."""
    for side in (above, below):
        means = weights @ side
        assert np.all(means <= 1 + 1e-12)
        np.testing.assert_allclose(means, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("support", "shares"), [((0, 1), (0.3, 0.7)), ((0, 0.25, 1), (0.5, 0.25, 0.25)), ((0.4, 0.5, 0.8), (0.5, 0.3, 0.2))]
)
def test_independent_values_mean_one_by_enumeration(support: tuple[float, ...], shares: tuple[float, ...]) -> None:
    runs = np.array(list(itertools.product(range(len(support)), repeat=6)))
    mean = float(np.dot(support, shares))
    above, below = e_values(np.array(support)[runs], mean)
    assert_means_are_one(above, below, np.array(shares)[runs].prod(axis=1))
    inside, _ = e_values(np.array(support)[runs], mean + 0.05)
    assert np.all(np.array(shares)[runs].prod(axis=1) @ inside < 1)


@pytest.mark.parametrize(
    "population",
    [(0, 0, 1, 1, 1, 1), (0, 0, 0, 0, 0, 1), (0, 0.25, 0.25, 1, 1, 1), (0.1, 0.2, 0.3, 0.5, 0.8, 1), (0.5,) * 6],
)
def test_draws_without_replacement_mean_one_by_enumeration(population: tuple[float, ...]) -> None:
    runs = np.array(list(itertools.permutations(population)), dtype=float)
    above, below = e_values(runs, float(np.mean(population)), population=6)
    assert np.isfinite(above).all()
    assert np.isfinite(below).all()
    assert_means_are_one(above, below, np.full(len(runs), 1 / len(runs)))


def test_bettors_hold_likelihood_ratios_of_finite_populations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean believed to be 8/10 where the null has 5/10: the odds of the two urns at every draw."""
    draws = [1, 1, 0, 1, 1, 1]
    believed, null, odds = 8, 5, 1.0
    ratios = []
    for seen, draw in enumerate(draws):
        ones = sum(draws[:seen])
        held = [(total - ones) / (10 - seen) for total in (believed, null)]
        odds *= held[0] / held[1] if draw else (1 - held[0]) / (1 - held[1])
        ratios.append(odds)
    monkeypatch.setattr(sequential, "_FRACTIONS", np.array([(0.8 - 0.5) / 0.5]))
    monkeypatch.setattr(sequential, "_LOG_WEIGHTS", np.zeros(1))
    above, _ = e_values(draws, 0.5, population=10)
    np.testing.assert_allclose(above, ratios, rtol=1e-6)


@quick
@given(grid_values, grid_threshold, st.lists(st.integers(0, 12), max_size=4), st.sampled_from([None, 12, 40]))
def test_calls_can_be_split_anywhere(
    values: list[float], threshold: float, cuts: list[int], population: int | None
) -> None:
    whole, parts = MeanTest(0, 1, threshold, population), MeanTest(0, 1, threshold, population)
    whole.update(values)
    for part in np.split(np.array(values), sorted(min(cut, len(values)) for cut in cuts)):
        parts.update(part)
    assert (parts.count, parts.above, parts.below) == (whole.count, whole.above, whole.below)
    above, below = log_e_values([values, values], 0, 1, threshold, population)
    if values:
        with np.errstate(over="ignore"):
            assert whole.above == pytest.approx(np.exp(above[1, -1]), rel=1e-13)
            assert whole.below == pytest.approx(np.exp(below[0, -1]), rel=1e-13)


@quick
@given(grid_values, st.sampled_from([None, 12, 40]))
def test_evidence_falls_along_the_thresholds(values: list[float], population: int | None) -> None:
    thresholds = np.arange(-8, 73) / 64
    above, below = log_e_values(values, 0, 1, thresholds, population)
    for lower, higher in ((above[:-1], above[1:]), (below[1:], below[:-1])):
        rounding = 1e-9 * (1 + np.abs(np.where(np.isfinite(lower), lower, 0.0)))
        assert np.all(higher <= lower + rounding)


@quick
@given(grid_values, grid_threshold, st.sampled_from([None, 12, 40]))
def test_the_two_sides_mirror_each_other(values: list[float], threshold: float, population: int | None) -> None:
    above, below = log_e_values(values, 0, 1, threshold, population)
    mirrored = log_e_values(1 - np.array(values), 0, 1, 1 - threshold, population)
    np.testing.assert_allclose(mirrored[0], below, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(mirrored[1], above, rtol=1e-6, atol=1e-6)
    scaled = log_e_values(3 * np.array(values) - 2, -2, 1, 3 * threshold - 2, population)
    np.testing.assert_allclose(scaled[0], above, rtol=1e-6, atol=1e-6)


@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 48), st.randoms())
def test_a_population_seen_whole_leaves_no_doubt(quarters: list[int], total: int, shuffle: random.Random) -> None:
    """Sums are compared as integers: threshold = total / (4 N)."""
    shuffle.shuffle(quarters)
    values = np.array(quarters) / 4
    test = MeanTest(0, 1, total / (4 * len(values)), population=len(values))
    test.update(values)
    assert math.isinf(test.above) == (sum(quarters) > total)
    assert math.isinf(test.below) == (sum(quarters) < total)


def test_evidence_is_infinite_as_soon_as_the_null_is_impossible() -> None:
    above, below = log_e_values([1, 1, 1, 0, 0], 0, 1, 0.4, population=5)
    np.testing.assert_array_equal(np.isinf(above) & (above > 0), [False, False, True, True, True])
    assert np.all(below < np.inf)


RUNS, STEPS, ALPHA = 1500, 150, 0.05


def _population(values: list[float], counts: list[int], generator: np.random.Generator) -> Floats:
    return generator.permuted(np.tile(np.repeat(values, counts).astype(float), (RUNS, 1)), axis=1)


@pytest.mark.parametrize(
    "truth", ["even", "rare", "three scores", "nearly constant", "finite", "finite scores", "finite all alike"]
)
def test_ville(truth: str) -> None:
    """At the threshold itself, each side ever reaches 1 / alpha in at most alpha of the runs, up to their noise."""
    generator = np.random.default_rng(list(truth.encode()))
    scores = [-1 / 3, 0.2, 1.0]
    draw = {
        "even": lambda: (generator.random((RUNS, STEPS)) < 0.5).astype(float),
        "rare": lambda: (generator.random((RUNS, STEPS)) < 0.03).astype(float),
        "three scores": lambda: generator.choice(scores, p=[0.3, 0.2, 0.5], size=(RUNS, STEPS)),
        "nearly constant": lambda: np.where(generator.random((RUNS, STEPS)) < 0.02, 1.0, 0.5),
        "finite": lambda: _population([0, 1], [50, 50], generator),
        "finite scores": lambda: _population(scores, [60, 40, 100], generator),
        "finite all alike": lambda: _population([0.5], [60], generator),
    }
    mean = {"even": 0.5, "rare": 0.03, "three scores": 0.44, "nearly constant": 0.51}.get(truth)
    values = draw[truth]()
    sides = log_e_values(
        values, -1 / 3, 1, values[0].mean() if mean is None else mean, None if mean else values.shape[1]
    )
    for side in sides:
        misled = int((side.max(axis=1) >= -math.log(ALPHA)).sum())
        assert misled <= ALPHA * RUNS + 3 * math.sqrt(ALPHA * (1 - ALPHA) * RUNS)


def _stops(values: Floats, threshold: float, population: int | None = None) -> Floats:
    above, _ = log_e_values(values, 0, 1, threshold, population)
    reached = above >= -math.log(ALPHA)
    assert reached.any(axis=1).all()
    return reached.argmax(axis=1) + 1.0


@pytest.mark.parametrize(("p", "steps", "most"), [(0.9, 150, 1.5), (0.7, 500, 1.5), (0.6, 1500, 1.6)])
def test_power_is_near_that_of_the_best_test(p: float, steps: int, most: float) -> None:
    """Wald's test, which knows p, needs log(1 / alpha) / KL values on average, before overshoot."""
    values = (np.random.default_rng(0).random((300, steps)) < p).astype(float)
    stops = _stops(values, 0.5)
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    best = -math.log(ALPHA) / divergence
    assert best * 0.7 < stops.mean() < most * best
    assert np.median(stops) < 1.3 * best


def test_power_on_even_values_and_on_finite_populations() -> None:
    generator = np.random.default_rng(0)
    even = _stops(generator.beta(30, 20, (200, 100)), 0.5)
    coins = _stops((generator.random((200, 1200)) < 0.6).astype(float), 0.5)
    assert np.median(even) < 30 < 0.5 * np.median(coins)
    urn = _population([0, 1], [80, 120], generator)[:200]
    assert np.median(_stops(urn, 0.5, population=200)) < 0.75 * np.median(coins)


def test_confidence_sequence_inverts_the_tests() -> None:
    generator = np.random.default_rng(4)
    values, thresholds = generator.choice([-1.0, 0.5, 3.0], size=40), np.linspace(-1, 3, 333)
    for population in (None, 90):
        lows, highs = confidence_sequence(values, -1, 3, 0.1, population)
        above, below = (
            np.maximum.accumulate(side, axis=1) >= math.log(10)
            for side in log_e_values(values, -1, 3, thresholds, population)
        )
        step = 4 / 1000
        for row, threshold in enumerate(thresholds):
            assert np.all(above[row][threshold <= lows - 1e-7])
            assert not np.any(above[row][threshold > lows + step])
            assert np.all(below[row][threshold >= highs + 1e-7])
            assert not np.any(below[row][threshold < highs - step])


@pytest.mark.parametrize("population", [None, 30])
def test_confidence_sequence_covers_at_all_times(population: int | None) -> None:
    generator = np.random.default_rng(5)
    runs, alpha = 80, 0.2
    urn = np.repeat([0.0, 0.5, 1.0], 10)
    missed = np.zeros(2)
    for _ in range(runs):
        values = generator.permutation(urn) if population else generator.choice(urn, size=30)
        lows, highs = confidence_sequence(values, 0, 1, alpha, population)
        assert np.all(np.diff(lows) >= 0)
        assert np.all(np.diff(highs) <= 0)
        missed += [lows[-1] > 0.5, highs[-1] < 0.5]
    assert np.all(missed <= alpha * runs + 3 * math.sqrt(alpha * (1 - alpha) * runs))


def test_confidence_sequence_at_its_ends() -> None:
    values = np.random.default_rng(6).random(25)
    lows, highs = confidence_sequence(values, 0, 1, 0.05, population=25)
    assert lows[-1] == pytest.approx(values.mean(), abs=1e-8)
    assert highs[-1] == pytest.approx(values.mean(), abs=1e-8)
    shorter = confidence_sequence(values[:9], 0, 1, 0.05, population=25)
    np.testing.assert_array_equal(shorter, [lows[:9], highs[:9]])
    empty = confidence_sequence([], 0, 1, 0.05)
    assert empty[0].shape == empty[1].shape == (0,)
    one_low, one_high = confidence_sequence([1.0], 0, 1, 0.05)
    assert 0 <= one_low[0] < 0.1
    assert one_high[0] == 1
    np.testing.assert_array_equal(confidence_sequence([0.3, 0.3], 0.3, 0.3, 0.05), np.full((2, 2), 0.3))


def test_nothing_seen_is_no_evidence() -> None:
    for population in (None, 5):
        test = MeanTest(-1, 1, 0, population)
        test.update([])
        assert (test.count, test.above, test.below) == (0, 1.0, 1.0)
        above, below = log_e_values(np.empty((3, 0)), -1, 1, 0, population)
        assert above.shape == below.shape == (3, 0)
    assert log_e_values(np.empty((0, 4)), 0, 1, 0.5)[0].shape == (0, 4)


def test_thresholds_at_and_past_the_ends() -> None:
    beyond = MeanTest(0, 1, -0.5)
    assert (beyond.above, beyond.below) == (math.inf, 1.0)
    beyond.update([0.3, 0.9])
    assert math.isinf(beyond.above)
    assert beyond.below <= 1
    at_low = MeanTest(0, 1, 0)
    at_low.update([0, 0, 0, 1e-12])
    assert at_low.above <= 1
    at_low.update([0.5])
    assert at_low.above > 1e5
    alike = MeanTest(0.3, 0.3, 0.3)
    alike.update([0.1 + 0.2] * 50)
    assert alike.above <= 1
    assert alike.below <= 1
    apart = MeanTest(0.3, 0.3, 0.2, population=9)
    assert (apart.above, apart.below) == (math.inf, 1.0)


def test_very_long_runs_stay_in_range() -> None:
    test = MeanTest(0, 1, 0.5)
    test.update(np.ones(20_000))
    assert test.above == math.inf
    assert 0 <= test.below < 1e-80
    urn = MeanTest(0, 1, 0.5, population=100_000)
    urn.update(np.tile([0.0, 1.0], 20_000))
    assert 0 < urn.above < 1


def test_any_numeric_array_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).integers(0, 2, (9, 14))
    expected = log_e_values(values.astype(float), 0, 1, 0.4, 20)
    for other in (values.astype(bool), values.astype(np.float32), np.asfortranarray(values), values.tolist()):
        np.testing.assert_array_equal(log_e_values(other, 0, 1, 0.4, 20), expected)
    doubled = np.repeat(values, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(log_e_values(doubled, 0, 1, 0.4, 20), expected)
    stacked = log_e_values(values.reshape(3, 3, 14), 0, 1, np.full(3, 0.4), 20)
    np.testing.assert_array_equal(np.reshape(stacked, (2, 9, 14)), expected)
    monkeypatch.setattr(sequential, "_CHUNK_BYTES", 1)
    np.testing.assert_array_equal(log_e_values(values, 0, 1, 0.4, 20), expected)


def test_refusals() -> None:
    test = MeanTest(0, 1, 0.5, population=3)
    test.update([1.0])
    before = (test.count, test.above, test.below)
    for values, message in [
        ([0.5, math.nan], r"values\[1\] = nan, must be from 0 to 1"),
        ([1.001], r"values\[0\] = 1\.001, must be from 0 to 1"),
        ([0.1, 0.2, 0.3], "4 values from a population of 3"),
        ([[0.1]], "values has 2 axes, must have one"),
    ]:
        with pytest.raises(ValueError, match=message):
            test.update(values)
        assert (test.count, test.above, test.below) == before
    with pytest.raises(ValueError, match=r"values\[1, 0\] = -2"):
        log_e_values([[0, 1], [-2, 0]], 0, 1, 0.5)
    with pytest.raises(ValueError, match="low = 1 and high = 0"):
        MeanTest(1, 0, 0.5)
    with pytest.raises(ValueError, match="threshold = nan, must be finite"):
        MeanTest(0, 1, math.nan)
    with pytest.raises(ValueError, match="population = 0, must be at least 1"):
        MeanTest(0, 1, 0.5, population=0)
    with pytest.raises(ValueError, match="alpha = 1, must be above 0"):
        confidence_sequence([0.5], 0, 1, 1)
    with pytest.raises(ValueError, match="5 values from a population of 4"):
        confidence_sequence([0.5] * 5, 0, 1, 0.1, population=4)
