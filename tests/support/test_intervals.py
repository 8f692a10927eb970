"""The bootstrap: equal to known bounds where there are some, and honest about few or equal items."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta

from medbridge.support import Intervals, bootstrap_ratio


def mean_interval(values: object, clusters: list[str] | None = None, **options: object) -> Intervals:
    column = np.asarray(values, dtype=float)[:, None]
    names = clusters if clusters is not None else [str(i) for i in range(len(column))]
    arguments: dict = {"bounds": (0, 1), "alpha": 0.05, "replicates": 4000, "seed": 0, **options}
    return bootstrap_ratio(column, 1.0, clusters=names, **arguments)


@pytest.mark.parametrize(("hits", "items"), [(0, 8), (8, 8), (1, 10), (20, 40), (99, 100)])
def test_proportions_get_the_clopper_pearson_interval(hits: int, items: int) -> None:
    found = mean_interval([1] * hits + [0] * (items - hits))
    assert found.value[0] == hits / items
    assert found.low[0] == pytest.approx(beta.ppf(0.05, hits, items - hits + 1) if hits else 0, abs=0.02)
    assert found.high[0] == pytest.approx(beta.ppf(0.95, hits + 1, items - hits) if hits < items else 1, abs=0.02)


def test_equal_items_still_have_a_width() -> None:
    for value in (0.0, 0.3, 1.0):
        found = mean_interval([value] * 8)
        assert found.high[0] - found.low[0] > 0.2


def test_it_depends_on_the_seed_and_nothing_else() -> None:
    values = np.random.default_rng(1).random(30)
    first, again, other = (mean_interval(values, seed=seed) for seed in (3, 3, 4))
    assert first.low[0] == again.low[0]
    assert first.low[0] != other.low[0]


def test_chunks_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(30)
    whole = mean_interval(values)
    kinds = mean_interval(np.round(values))
    monkeypatch.setattr("medbridge.support.intervals._CHUNK_BYTES", 8 * 31 * 7)
    for found, expected in ((mean_interval(values), whole), (mean_interval(np.round(values)), kinds)):
        np.testing.assert_allclose(found.low, expected.low, rtol=1e-12)
        np.testing.assert_allclose(found.high, expected.high, rtol=1e-12)


def test_items_of_one_image_count_as_one_draw() -> None:
    generator = np.random.default_rng(2)
    per_image = generator.random(20).repeat(10)
    apart = mean_interval(per_image)
    together = mean_interval(per_image, [f"image {i // 10}" for i in range(200)])
    alone = mean_interval(per_image[::10])
    assert together.high[0] - together.low[0] > 2.5 * (apart.high[0] - apart.low[0])
    assert together.low[0] == pytest.approx(alone.low[0], abs=1e-12)
    assert together.high[0] == pytest.approx(alone.high[0], abs=1e-12)


def test_the_order_of_the_items_does_not_matter() -> None:
    generator = np.random.default_rng(4)
    names = [f"image {i % 12}" for i in range(40)]
    for values in (generator.random(40), generator.integers(0, 2, 40)):
        order = generator.permutation(40)
        found = mean_interval(values, names)
        again = mean_interval(values[order], [names[i] for i in order])
        np.testing.assert_allclose([again.low[0], again.high[0]], [found.low[0], found.high[0]], rtol=1e-12)


def test_equal_clusters_joined_give_the_same_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of m equal clusters add up to a gamma variate: the same interval, up to the replicates' noise."""
    values = np.repeat([0.0, 0.2, 0.9], [150, 30, 20])
    joined = mean_interval(values, replicates=40_000, against=0.17)
    monkeypatch.setattr("medbridge.support.intervals._GAMMA_PRICE", 10**9)
    apart = mean_interval(values, replicates=40_000, against=0.17)
    width = apart.high[0] - apart.low[0]
    assert joined.low[0] != apart.low[0]
    assert joined.low[0] == pytest.approx(apart.low[0], abs=0.02 * width)
    assert joined.high[0] == pytest.approx(apart.high[0], abs=0.02 * width)
    assert joined.p_below[0] == pytest.approx(apart.p_below[0], abs=0.01)
    assert joined.p_above[0] == pytest.approx(apart.p_above[0], abs=0.01)


def test_p_values_say_what_the_ends_say() -> None:
    values = np.random.default_rng(5).random(25)
    for against in np.linspace(0.2, 0.8, 25):
        for alpha in (0.01, 0.05, 0.2):
            found = mean_interval(values, alpha=alpha, replicates=199, against=against)
            assert (found.p_below[0] <= alpha) == (found.high[0] < against)
            assert (found.p_above[0] <= alpha) == (found.low[0] > against)
    assert np.isnan([mean_interval(values).p_below[0], mean_interval(values).p_above[0]]).all()
    assert mean_interval(values, replicates=199, against=-1).p_above[0] == 1 / 200


def test_too_few_replicates_exclude_nothing() -> None:
    found = mean_interval([0.5] * 50, alpha=0.004, replicates=199, against=0.99)
    assert (found.low[0], found.high[0], found.p_below[0]) == (0, 1, 1 / 200)


def test_columns_share_their_replicates() -> None:
    values = np.random.default_rng(3).random((25, 1))
    found = bootstrap_ratio(
        np.hstack([values, 2 * values]),
        np.array([1.0, 2.0]),
        bounds=(np.array([0, 0]), np.array([1, 2])),
        clusters=[str(i) for i in range(25)],
        alpha=0.1,
        replicates=500,
        seed=0,
    )
    np.testing.assert_allclose(found.low[0], found.low[1])
    np.testing.assert_allclose(found.high[0], found.high[1])


@pytest.mark.parametrize("items", [8, 20, 60])
@pytest.mark.parametrize("truth", ["rare", "common", "spread", "two points"])
def test_coverage(items: int, truth: str) -> None:
    """Each end is missed in at most alpha = 0.1 of the cases, up to the noise of 300 cases."""
    generator = np.random.default_rng(items)
    draw = {
        "rare": (lambda: generator.random(items) < 0.05, 0.05),
        "common": (lambda: generator.random(items) < 0.7, 0.7),
        "spread": (lambda: generator.beta(0.5, 1.0, items), 1 / 3),
        "two points": (lambda: np.where(generator.random(items) < 0.9, 0.2, 1.0), 0.28),
    }
    sample, mean = draw[truth]
    cases = 300
    missed_low = missed_high = 0
    for case in range(cases):
        found = mean_interval(sample(), alpha=0.1, replicates=400, seed=case)
        missed_low += int(found.low[0] > mean)
        missed_high += int(found.high[0] < mean)
    most = 0.1 * cases + 3 * (cases * 0.1 * 0.9) ** 0.5
    assert missed_low <= most
    assert missed_high <= most


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no items"):
        mean_interval([])
    with pytest.raises(ValueError, match="clusters has 1 values for 2 items"):
        mean_interval([0, 1], ["a"])
