"""What is read off the tallies of one stratum: support by both statistics, its error rates, and what goes with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from medbridge.support import GateSettings, Tally, bootstrap_ratio, item_scores, mean_curve, measure

FAST = GateSettings(replicates=400)
PASS = GateSettings(replicates=400, statistic="pass")


def tallies_of(
    counts: list[tuple[int, int]], floor: float = 0.25, greedy: bool | None = None, per_image: int = 1
) -> list[Tally]:
    return [
        Tally(f"item {i}", f"image {i // per_image}", floor, n, c, greedy_correct=greedy)
        for i, (n, c) in enumerate(counts)
    ]


def exact_reached(n: int, c: int, k: int, floor: Fraction) -> Fraction:
    """The score by enumeration of all subsets, from its definition."""

    def mass(x: int) -> Fraction:
        return math.comb(k, x) * floor**x * (1 - floor) ** (k - x)

    t = next(t for t in range(k + 1) if sum(map(mass, range(t + 1, k + 1))) <= floor)
    share = (floor - sum(map(mass, range(t + 1, k + 1)))) / mass(t) if mass(t) else Fraction(0)
    drawn = [sum(subset) for subset in combinations([1] * c + [0] * (n - c), k)]
    return sum((Fraction(x > t) + share * (x == t) for x in drawn), Fraction(0)) / len(drawn)


# --- item scores ---


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scores_are_those_of_the_definition(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 5))
    n = data.draw(st.integers(k, 8))
    c = data.draw(st.integers(0, n))
    options = data.draw(st.sampled_from([2, 3, 4, 5, None]))
    floor = Fraction(1, options) if options else Fraction(0)
    [tally] = tallies_of([(n, c)], float(floor))

    found = item_scores([tally], FAST, k)
    assert found.top[0] == pytest.approx(float(exact_reached(n, c, k, floor) - floor), abs=1e-12)
    assert (found.bottom[0], found.low[0], found.high[0]) == pytest.approx((1 - floor, -floor, 1 - floor))

    found = item_scores([tally], PASS, k)
    guess = 1 - (1 - floor) ** k
    passed = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert found.top[0] == pytest.approx(float(passed - guess), abs=1e-12)
    assert (found.bottom[0], found.low[0], found.high[0]) == pytest.approx(
        tuple(map(float, (1 - guess, -guess, 1 - guess)))
    )


def test_scores_need_k_samples_of_every_item() -> None:
    with pytest.raises(ValueError, match="item 'item 1': n = 3 samples, k = 4 needs as many"):
        item_scores(tallies_of([(4, 2), (3, 1)]), FAST, 4)
    with pytest.raises(ValueError, match="k = 0"):
        item_scores(tallies_of([(4, 2)]), FAST, 0)
    assert item_scores([], FAST, 4).top.shape == (0,)


@pytest.mark.parametrize("settings", [FAST, PASS])
def test_an_item_that_cannot_be_wrong_says_nothing(settings: GateSettings) -> None:
    one, other = tallies_of([(8, 0)], 1.0), tallies_of([(8, 8)], 1.0)
    for tally in (one, other):
        scores = item_scores(tally, settings, 4)
        assert scores.top[0] == scores.bottom[0] == scores.low[0] == scores.high[0] == 0
    rest = tallies_of([(8, i % 9) for i in range(36)])
    alone, beside = (measure(tallies, settings, seed=0).support for tallies in (rest, rest + one))
    assert alone is not None and beside is not None
    assert beside.value == pytest.approx(alone.value, abs=1e-12)


# --- what the statistics read ---


@pytest.mark.parametrize("options", [2, 3, 4, 5, 11])
@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("stubborn", [0.0, 0.4, 1.0])
def test_every_guesser_reads_nothing(options: int, samples: int, stubborn: float) -> None:
    """A share of the items gets one answer for all samples, the others a fresh guess for each."""
    generator = np.random.default_rng(options)
    items, floor = 4000, 1 / options
    fixed = generator.random(items) < stubborn
    chance = np.where(fixed, generator.random(items) < floor, floor)
    scores = item_scores(tallies_of([(samples, c) for c in generator.binomial(samples, chance)], floor), FAST, samples)
    support = scores.top.sum() / scores.bottom.sum()
    assert abs(support) < 4 * (floor / (1 - floor) / items) ** 0.5


@pytest.mark.parametrize("floor", [0.5, 0.25, 0.2])
def test_a_confidently_wrong_item_costs_what_a_wrong_guess_costs(floor: float) -> None:
    for k in (1, 4, 16):
        scores = item_scores(tallies_of([(16, 0)], floor), FAST, k)
        assert scores.top[0] / scores.bottom[0] == pytest.approx(-floor / (1 - floor))
    # ... where Pass@k lets it weigh down many others.
    scores = item_scores(tallies_of([(16, 0)], 0.25), PASS, 4)
    assert scores.top[0] / scores.bottom[0] == pytest.approx(-((1 - 0.75**4) / 0.75**4))


def test_known_items_are_reached_and_open_answers_read_pass_at_k() -> None:
    known = measure(tallies_of([(16, 12)] * 30), FAST, seed=0)
    assert known.support is not None and known.support.value > 0.98
    counts = [(16, i % 17) for i in range(60)]
    answers = measure(tallies_of(counts, 0.0), FAST, seed=0)
    np.testing.assert_allclose(answers.reached.value, mean_curve(*np.array(counts).T, answers.ks), rtol=1e-12)
    np.testing.assert_allclose(answers.reached.value, answers.above_floor.value, rtol=1e-12)


def test_at_one_sample_it_is_accuracy_above_guessing() -> None:
    estimate = measure(tallies_of([(4, i % 5) for i in range(40)]), GateSettings(k=1, replicates=200), seed=0)
    assert estimate.support is not None and estimate.accuracy is not None
    assert estimate.support.value == pytest.approx((estimate.accuracy.value - 0.25) / 0.75)


def test_mixed_floors_are_one_ratio() -> None:
    closed, answers = (
        tallies_of([(8, 8)] * 10 + [(8, 0)] * 10, 0.5),
        [Tally(f"open {i}", f"open {i}", 0.0, 8, 8 * (i < 5)) for i in range(10)],
    )
    estimate = measure(closed + answers, FAST, seed=0)
    assert estimate.support is not None and estimate.k == 8
    assert estimate.support.value == pytest.approx((10 * 0.5 - 10 * 0.5 + 5) / (20 * 0.5 + 10))
    np.testing.assert_allclose(estimate.floor, (20 * (1 - 0.5 ** np.arange(1, 9))) / 30)


# --- intervals and p-values ---


@pytest.mark.parametrize("per_image", [1, 4])
@pytest.mark.parametrize("items", [20, 64, 200])
@pytest.mark.parametrize("floor", [0.0, 0.25, 0.5])
def test_at_the_threshold_each_side_errs_at_most_alpha(floor: float, items: int, per_image: int) -> None:
    """Half of the images known, the others guessed, in 300 cases: support is 0.5."""
    generator = np.random.default_rng(items + per_image)
    cases, samples, alpha = 300, 16, 0.05
    every = item_scores(tallies_of([(samples, c) for c in range(samples + 1)], floor), FAST, samples)
    # A guesser reaches f of an item, and above it nothing, so that the truth is exactly the share of known images.
    assert binom.pmf(range(samples + 1), samples, floor) @ every.top == pytest.approx(0, abs=1e-12)
    images = [str(i // per_image) for i in range(items)]
    wrong = np.zeros(2)
    for case in range(cases):
        known = np.repeat(generator.random(items // per_image) < 0.5, per_image)
        tops = every.top[generator.binomial(samples, np.where(known, 1.0, floor))]
        found = bootstrap_ratio(
            tops[:, None], 1 - floor, bounds=(-floor, 1 - floor), clusters=images, alpha=alpha, replicates=300,
            seed=case, against=0.5,
        )  # fmt: skip
        wrong += found.p_below[0] <= alpha, found.p_above[0] <= alpha
    assert max(wrong) <= cases * (alpha + 3 * (alpha * (1 - alpha) / cases) ** 0.5)


def test_p_values_and_intervals_say_the_same() -> None:
    counts = [(16, 16)] * 24 + [(16, 0)] * 8
    for threshold in np.arange(0.3, 0.95, 0.05):
        chosen = GateSettings(replicates=300, support_threshold=float(threshold), accuracy_target=float(threshold))
        estimate = measure(tallies_of(counts, 0.1, greedy=True)[:30], chosen, seed=0)
        assert estimate.support is not None and estimate.acc_at_1 is not None
        assert (estimate.p_below <= 0.05) == (estimate.support.high < threshold)
        assert (estimate.p_above <= 0.05) == (estimate.support.low > threshold)
        assert (estimate.p_done <= 0.05) == (estimate.acc_at_1.low > threshold)
        assert (estimate.p_not_done <= 0.05) == (estimate.acc_at_1.high < threshold)


def test_the_standard_error_is_that_of_the_items() -> None:
    generator = np.random.default_rng(0)
    tallies = tallies_of([(16, int(c)) for c in generator.binomial(16, generator.beta(1, 1, 400))])
    estimate = measure(tallies, GateSettings(), seed=0)
    scores = item_scores(tallies, GateSettings(), 16)
    assert estimate.standard_error == pytest.approx(np.std(scores.top) / 0.75 / 20, rel=0.08)
    assert measure(tallies_of([(16, 16)] * 20), FAST, seed=0).standard_error > 0.02


# --- what goes with support ---


def test_curves_are_those_of_the_formulas() -> None:
    counts = [(16, 0), (16, 3), (20, 20), (17, 9)] * 4
    estimate = measure(tallies_of(counts), FAST, seed=0)
    assert estimate.ks == tuple(range(1, 17))
    assert (estimate.n_min, estimate.n_max, estimate.samples) == (16, 20, 276)
    n, c = np.array(counts).T
    np.testing.assert_allclose(estimate.pass_at_k.value, mean_curve(n, c, estimate.ks), rtol=1e-13)
    np.testing.assert_allclose(estimate.floor, 1 - 0.75 ** np.arange(1, 17))
    expected = (estimate.pass_at_k.value - estimate.floor) / (1 - estimate.floor)
    np.testing.assert_allclose(estimate.above_floor.value[:10], expected[:10], atol=1e-12)
    assert np.isnan(estimate.above_floor.value[10:]).all()
    assert estimate.informative_k == 10
    assert not np.isnan(estimate.reached.value).any()
    for k in (1, 7, 16):
        scores = item_scores(tallies_of(counts), FAST, k)
        assert estimate.reached.value[k - 1] == pytest.approx(scores.top.mean() / 0.75)
    for curve in (estimate.pass_at_k, estimate.above_floor, estimate.reached):
        shown = ~np.isnan(curve.value)
        assert np.all(curve.low[shown] <= curve.value[shown])
        assert np.all(curve.high[shown] >= curve.value[shown])
    assert estimate.accuracy is not None
    assert estimate.accuracy.value == pytest.approx(np.mean(c / n))


def test_gap_counts_items_that_have_both() -> None:
    tallies = [
        Tally(f"item {i}", f"image {i}", 0.25, 8, 4, greedy_correct=None if i < 5 else i % 2 == 0) for i in range(25)
    ]
    estimate = measure(tallies, PASS, seed=0)
    assert estimate.greedy_items == 20
    assert estimate.acc_at_1 is not None and estimate.gap is not None and estimate.k == 4
    assert estimate.acc_at_1.value == 0.5
    reached = 1 - 1 / math.comb(8, 4)
    assert estimate.gap.value == pytest.approx(reached - 0.5)
    assert estimate.gap_above_floor == pytest.approx((reached - (1 - 0.75**4)) / 0.75**4 - (0.5 - 0.25) / 0.75)
    by_reached = measure(tallies, FAST, seed=0)
    assert by_reached.support is not None and by_reached.k == 8
    assert by_reached.gap_above_floor == pytest.approx(by_reached.support.value - 1 / 3)
    assert by_reached.efficiency == pytest.approx(0.5)


def test_efficiency_and_k90() -> None:
    nothing = measure(tallies_of([(8, 0)] * 10, greedy=False), FAST, seed=0)
    assert math.isnan(nothing.efficiency) and nothing.k90 is None
    sure = measure(tallies_of([(8, 8)] * 10, greedy=True), FAST, seed=0)
    assert (sure.efficiency, sure.k90) == (1, 1)
    rare = measure(tallies_of([(10, 1)] * 10), FAST, seed=0)  # Pass@k = k / 10
    assert math.isnan(rare.efficiency) and rare.k90 == 9


def test_cover_counts_items_with_skill() -> None:
    generator = np.random.default_rng(0)
    chances = np.where(generator.random(400) < 0.3, 0.9, 0.25)
    estimate = measure(tallies_of([(16, int(c)) for c in generator.binomial(16, chances)]), FAST, seed=0)
    assert estimate.cover == pytest.approx(0.3, abs=0.06)


def spread(generator: np.random.Generator, items: int) -> np.ndarray:
    return generator.beta(1, 1.5, items)


def known_or_guessed(generator: np.random.Generator, items: int) -> np.ndarray:
    return np.where(generator.random(items) < 0.5, 1.0, 0.25)


def alike(generator: np.random.Generator, items: int) -> np.ndarray:
    return np.full(items, 0.4)


@pytest.mark.parametrize("truth", [spread, known_or_guessed, alike])
@pytest.mark.parametrize(("statistic", "k", "off"), [("reached", 4, 0.05), ("pass", 2, 0.05), ("reached", 16, 0.15)])
def test_the_share_between_items_is_that_of_the_truth(
    truth: Callable[[np.random.Generator, int], np.ndarray], statistic: str, k: int, off: float
) -> None:
    generator = np.random.default_rng(0)
    chosen = GateSettings(statistic=statistic, k=k, replicates=100)
    scores = item_scores(tallies_of([(16, c) for c in range(17)]), chosen, k).top
    chances = truth(generator, 3000)
    outcomes = binom.pmf(np.arange(17), 16, chances[:, None])
    expected = outcomes @ scores
    within = (outcomes @ scores**2 - expected**2).mean()
    estimate = measure(tallies_of([(16, int(c)) for c in generator.binomial(16, chances)]), chosen, seed=0)
    assert estimate.between_share == pytest.approx(expected.var() / (expected.var() + within), abs=off)


def test_the_share_between_items_needs_two_samples_and_differences() -> None:
    assert math.isnan(measure(tallies_of([(1, 1), (1, 0)] * 5), FAST, seed=0).between_share)
    assert math.isnan(measure(tallies_of([(8, 8)] * 10), FAST, seed=0).between_share)
    assert math.isnan(measure(tallies_of([(8, 3)]), FAST, seed=0).between_share)
    # Each item is one thing or the other: no sample more would tell more.
    assert measure(tallies_of([(8, 8), (8, 0)] * 10), FAST, seed=0).between_share == pytest.approx(1)
    ragged = measure(tallies_of([(2, 1), (90_000, 30_000), (9, 9)] * 4), FAST, seed=0).between_share
    assert 0 <= ragged <= 1


# --- the k that is read ---


@pytest.mark.parametrize(
    ("chosen", "floor", "k", "said"),
    [
        ({}, 0.5, 8, "all samples of an item"),
        ({}, 0.8, 8, "all samples of an item"),
        ({"k": 3}, 0.25, 3, "as configured"),
        ({"k": 64}, 0.5, 8, "in place of the configured 64: items have only 8 samples"),
        ({"statistic": "pass"}, 0.5, 2, "the largest at which guessing misses 0.25"),
        ({"statistic": "pass"}, 0.25, 4, "the largest at which guessing misses 0.25"),
        ({"statistic": "pass"}, 0.0, 8, "all samples"),
        ({"statistic": "pass"}, 0.8, 1, "k = 1, although"),
        ({"statistic": "pass", "k": 8}, 0.5, 4, "in place of the configured 8: above it guessing misses"),
        ({"statistic": "pass", "k": 64}, 0.0, 8, "in place of the configured 64: items have only 8 samples"),
    ],
)
def test_the_k_that_is_read(chosen: dict, floor: float, k: int, said: str) -> None:
    estimate = measure(tallies_of([(8, 4)] * 12, floor), GateSettings(replicates=200, **chosen), seed=0)
    assert estimate.k == k
    assert said in estimate.k_note
    assert estimate.support is not None
    own = estimate.reached if estimate.statistic == "reached" else estimate.above_floor
    assert estimate.support == own.at(k - 1)


# --- corners ---


@pytest.mark.parametrize("tallies", [[], tallies_of([(0, 0)] * 5)])
def test_nothing_measured(tallies: list[Tally]) -> None:
    estimate = measure(tallies, FAST, seed=0)
    assert (estimate.items, estimate.ks, estimate.support, estimate.acc_at_1) == (0, (), None, None)
    assert (
        math.isnan(estimate.p_below)
        and math.isnan(estimate.between_share)
        and math.isnan(estimate.cover)
        and estimate.k90 is None
    )
    json.dumps(estimate.to_dict(), allow_nan=False)


@pytest.mark.parametrize("floor", [0.97, 1.0])
def test_a_floor_that_leaves_no_room_is_refused(floor: float) -> None:
    estimate = measure(tallies_of([(4, 4)] * 20, floor, greedy=True), FAST, seed=0)
    assert (estimate.k, estimate.informative_k, estimate.support) == (None, None, None)
    assert np.isnan(estimate.reached.value).all() and np.isnan(estimate.p_above)
    assert estimate.acc_at_1 is not None and estimate.p_done < 0.05
    json.dumps(estimate.to_dict(), allow_nan=False)


def test_the_same_seed_gives_the_same_numbers() -> None:
    tallies = tallies_of([(16, i % 17) for i in range(40)], greedy=True)
    assert measure(tallies, FAST, seed=1).to_dict() == measure(tallies, FAST, seed=1).to_dict()
    assert measure(tallies, FAST, seed=1).to_dict() != measure(tallies, FAST, seed=2).to_dict()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_tallies_give_numbers_that_json_can_hold(data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 6),
                st.floats(0, 1),
                st.sampled_from([0.0, 0.25, 0.5, 1.0]),
                st.sampled_from([None, True, False]),
                st.integers(0, 3),
            ),
            max_size=15,
        )
    )
    tallies = [
        Tally(f"item {i}", f"image {image}", floor, n, round(share * n), greedy_correct=greedy)
        for i, (n, share, floor, greedy, image) in enumerate(rows)
    ]
    chosen = GateSettings(replicates=100, statistic=data.draw(st.sampled_from(["reached", "pass"])))
    estimate = measure(tallies, chosen, seed=0)
    stored = json.loads(json.dumps(estimate.to_dict(), allow_nan=False))
    lengths = {len(stored[name]["low"]) for name in ("pass_at_k", "above_floor", "reached")}
    assert lengths | {len(stored["floor"]), len(stored["ks"])} == {len(estimate.ks)}
    if estimate.support is not None:
        assert estimate.support.low <= estimate.support.value <= estimate.support.high
        assert estimate.standard_error > 0
        assert min(estimate.p_below, estimate.p_above) > 0
        assert math.isnan(estimate.between_share) or 0 <= estimate.between_share <= 1
