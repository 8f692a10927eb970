"""The bootstrap of the curve: its generator, its draws, its sums, its intervals and what they cover."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from math import factorial, prod
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from medbridge import _native
from medbridge.support import mean_curve, pass_at_k
from medbridge.support.bootstrap import CurveIntervals, bootstrap_curve

CURVES = ("value", "standard_error", "percentile_low", "percentile_high", "bca_low", "bca_high")


def some_items(items: int, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return np.full(items, samples), generator.binomial(samples, generator.beta(0.4, 0.8, items))


def assert_same_bits(found: CurveIntervals, expected: CurveIntervals) -> None:
    for name in (*CURVES, "replicates"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


# The generator.


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [  # kat_vectors of Random123, philox4x32 with 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], block: list[int]) -> None:
    assert list(_native._philox_block(counter, *key)) == block


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (2**64 - 1, 2**64 - 1), (0x123456789ABCDEF0, 0xFEDCBA987)])
def test_a_stream_is_the_blocks_of_its_counters(seed: int, stream: int, portable: bool) -> None:
    words = _native._philox_words(seed, stream, 5 * 64, portable).reshape(5, 4, 16)
    for block in (0, 1, 15, 16, 79):
        counter = [block, 0, stream % 2**32, stream >> 32]
        expected = list(_native._philox_block(counter, seed % 2**32, seed >> 32))
        assert words[block // 16, :, block % 16].tolist() == expected


def test_normal_quantile() -> None:
    p = np.concatenate([np.logspace(-300, -1, 60), np.linspace(0.01, 0.99, 99), 1 - np.logspace(-15, -1, 30)])
    found = np.array([_native._normal_quantile(x) for x in p])
    np.testing.assert_allclose(found, special.ndtri(p), rtol=4e-15, atol=1e-16)
    assert _native._normal_quantile(0.5) == pytest.approx(0, abs=1e-16)


# The draws.


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of observed against expected counts; neighbouring cells are merged until each expects at least 8."""
    seen, mean = [0.0], [0.0]
    for a, b in zip(counts, expected, strict=True):
        seen[-1] += a
        mean[-1] += b
        if mean[-1] >= 8:
            seen.append(0.0)
            mean.append(0.0)
    if len(seen) > 2:
        seen[-2] += seen.pop()
        mean[-2] += mean.pop()
    return float(stats.chisquare(seen, np.array(mean) * sum(seen) / sum(mean)).pvalue)


@pytest.mark.parametrize(
    "multiplicity",
    [
        [1, 1],  # each draw by itself
        [5, 2, 1],
        [1] * 40,
        [3] * 30,
        [30, 10],  # Poisson numbers, then the rest one by one
        [60, 3, 1],
        [1, 199],
        [997, 2, 1],
        [400, 350, 250, 12],
        [20] * 25,
        [9_000, 900, 99, 1],
        [40_000, 200_000],
    ],
)
def test_counts_are_binomial(multiplicity: list[int]) -> None:
    draws = sum(multiplicity)
    replicates = int(min(300_000, 1e7 / (len(multiplicity) + 2 * draws**0.5)))
    counts = _native._resample_counts(multiplicity, replicates, 1)
    assert (counts.sum(axis=1) == draws).all()
    for j in {0, len(multiplicity) // 2, len(multiplicity) - 1}:
        binomial = stats.binom(draws, multiplicity[j] / draws)
        low, high = (int(end) for end in binomial.ppf([1e-12, 1 - 1e-12]))
        assert low <= counts[:, j].min() and counts[:, j].max() <= high
        seen = np.bincount(counts[:, j] - low, minlength=high - low + 1)
        assert chi_square_p(seen, replicates * binomial.pmf(np.arange(low, high + 1))) > 1e-4


@pytest.mark.parametrize(("kinds", "multiplicity"), [(500, 3), (100, 20), (50, 1000)])
def test_moments_of_the_counts_of_many_equal_kinds(kinds: int, multiplicity: int) -> None:
    # All kinds together show errors of a Poisson table that no single one does: 3 % of its cuts are seen here.
    replicates, draws = 5_000_000 // kinds, kinds * multiplicity
    counts = _native._resample_counts([multiplicity] * kinds, replicates, 3)
    standard = (counts - float(multiplicity)) / (multiplicity * (1 - 1 / kinds)) ** 0.5
    skewness = (1 - 2 / kinds) / (draws / kinds * (1 - 1 / kinds)) ** 0.5
    excess = 1 / (multiplicity * (1 - 1 / kinds))
    assert abs((standard**2).mean() - 1) < 4 * ((2 + excess) / standard.size) ** 0.5
    assert abs((standard**3).mean() - skewness) < 4 * ((15 + 60 * excess) / standard.size) ** 0.5


@pytest.mark.parametrize("multiplicity", [[2, 1, 1], [3, 2], [20, 6, 2]])
def test_counts_are_jointly_multinomial(multiplicity: list[int]) -> None:
    replicates, draws = 50_000, sum(multiplicity)
    rows = Counter(map(tuple, _native._resample_counts(multiplicity, replicates, 2).tolist()))
    outcomes = [row for row in np.ndindex(*[draws + 1] * len(multiplicity)) if sum(row) == draws]
    probability = [
        factorial(draws) * prod((m / draws) ** x / factorial(x) for m, x in zip(multiplicity, row, strict=True))
        for row in outcomes
    ]
    assert sum(probability) == pytest.approx(1)
    order = np.argsort(probability)
    seen = np.array([rows[row] for row in outcomes])
    assert chi_square_p(seen[order], replicates * np.array(probability)[order]) > 1e-4


def test_streams_and_seeds_are_unrelated() -> None:
    one, two = (_native._resample_counts([300, 200, 100], 4000, seed) for seed in (0, 1))
    assert abs(np.corrcoef(one[:, 0], two[:, 0])[0, 1]) < 4 / 4000**0.5
    assert abs(np.corrcoef(one[1:, 0], one[:-1, 0])[0, 1]) < 4 / 4000**0.5


# Replicates.


def kinds_of(n: np.ndarray, c: np.ndarray, groups: np.ndarray) -> tuple[list[tuple[tuple[int, int], ...]], list[int]]:
    """Kinds of cluster as the extension orders them: tuples of (pair, times), with the number of each."""
    pairs = sorted(set(zip(n.tolist(), c.tolist(), strict=True)))
    pair_of = np.array([pairs.index(pair) for pair in zip(n.tolist(), c.tolist(), strict=True)])
    clusters = Counter(tuple(sorted(Counter(pair_of[groups == label].tolist()).items())) for label in np.unique(groups))
    return sorted(clusters), [clusters[kind] for kind in sorted(clusters)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_replicates_are_the_curves_of_the_drawn_clusters(data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    items = data.draw(st.integers(1, 40))
    n = generator.integers(3, data.draw(st.integers(4, 12)), items)
    c = generator.integers(0, n + 1)
    groups = generator.integers(0, data.draw(st.integers(1, items)), items) - 3
    ks = generator.integers(1, 4, data.draw(st.integers(1, 15)))
    replicates = data.draw(st.integers(1, 30))
    portable = data.draw(st.booleans())
    *_, found = _native.bootstrap_curve(n, c, ks, groups, replicates, 7, 0.9, portable)

    kinds, multiplicity = kinds_of(n, c, groups)
    pairs = np.array(sorted(set(zip(n.tolist(), c.tolist(), strict=True))))
    table = pass_at_k(pairs[:, 0], pairs[:, 1], ks)
    sums = np.array([sum(times * table[pair] for pair, times in kind) for kind in kinds])
    sizes = np.array([sum(times for _, times in kind) for kind in kinds])
    counts = _native._resample_counts(multiplicity, replicates, 7)
    np.testing.assert_allclose(found, counts @ sums / (counts @ sizes)[:, None], rtol=1e-13, atol=1e-15)


def test_value_is_the_mean_curve() -> None:
    n, c = some_items(500, 64)
    ks = np.arange(1, 65)
    np.testing.assert_allclose(bootstrap_curve(n, c, ks, replicates=2).value, mean_curve(n, c, ks), rtol=1e-14)


def test_moments_of_a_mean() -> None:
    n, c = some_items(300, 32)
    ks = [1, 2, 8, 32]
    found = bootstrap_curve(n, c, ks, replicates=20_000, keep_replicates=True)
    assert found.replicates is not None
    sigma = pass_at_k(n, c, ks).std(axis=0) / 300**0.5  # of a mean of draws with replacement, exactly
    assert np.all(np.abs(found.replicates.mean(axis=0) - found.value) < 4 * sigma / 20_000**0.5)
    np.testing.assert_allclose(found.standard_error, sigma, rtol=4 / (2 * 20_000) ** 0.5)


def test_standard_error_of_a_clustered_mean() -> None:
    n, c = some_items(400, 16)
    groups = np.arange(400) // 4
    c = c[groups * 4]  # the items of a cluster are alike: the error is that of 100 items
    found = bootstrap_curve(n, c, [1, 4], groups, replicates=20_000)
    clusters = pass_at_k(n, c, [1, 4]).reshape(100, 4, 2).mean(axis=1)
    np.testing.assert_allclose(found.standard_error, clusters.std(axis=0) / 10, rtol=4 / (2 * 20_000) ** 0.5)
    assert np.all(found.standard_error > 1.8 * bootstrap_curve(n, c, [1, 4]).standard_error)


# Intervals.


def bca_by_definition(table: np.ndarray, groups: np.ndarray, replicates: np.ndarray, confidence: float) -> np.ndarray:
    """Efron 1987 with an explicit jackknife, from kept replicates of one column."""
    value = table.mean()
    low, tied = np.mean(replicates < value - 1e-12), np.mean(np.abs(replicates - value) <= 1e-12)
    normal = NormalDist()
    z0 = normal.inv_cdf(float(low + tied / 2))
    left_out = np.array([table[groups != label].mean() for label in np.unique(groups)])
    d = left_out.mean() - left_out
    a = (d**3).sum() / (6 * (d**2).sum() ** 1.5)
    ends = [normal.inv_cdf((1 - confidence) / 2), normal.inv_cdf((1 + confidence) / 2)]
    return np.quantile(replicates, [normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in ends])


@pytest.mark.parametrize("replicates", [2, 7, 8, 9, 100, 1001])
@pytest.mark.parametrize("confidence", [0.02, 0.5, 0.95, 0.999])
def test_intervals_are_quantiles_of_the_replicates(replicates: int, confidence: float) -> None:
    n, c = some_items(50, 24, seed=3)
    groups = np.random.default_rng(1).integers(0, 20, 50)
    ks = [24, 1, 2, 5, 12, 12, 20]
    found = bootstrap_curve(n, c, ks, groups, replicates, confidence=confidence, keep_replicates=True)
    assert found.replicates is not None and found.replicates.shape == (replicates, len(ks))
    ends = np.quantile(found.replicates, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    np.testing.assert_allclose([found.percentile_low, found.percentile_high], ends, rtol=1e-13)
    np.testing.assert_allclose(found.standard_error, found.replicates.std(axis=0, ddof=1), rtol=1e-10)
    table = pass_at_k(n, c, ks)
    for j in range(len(ks)):
        column = found.replicates[:, j]
        if (column < found.value[j]).any() and (column > found.value[j]).any():
            expected = bca_by_definition(table[:, j], groups, column, confidence)
            np.testing.assert_allclose([found.bca_low[j], found.bca_high[j]], expected, rtol=1e-10)


def test_against_scipy() -> None:
    n, c = some_items(40, 16, seed=5)
    ks = [1, 4, 16]
    found = bootstrap_curve(n, c, ks, replicates=50_000)
    for j, k in enumerate(ks):
        values = pass_at_k(n, c, [k])[:, 0]
        peer = stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, method="BCa", batch=2_000, rng=np.random.default_rng(0)
        )
        # An end is a quantile at about 0.025: its standard error is some 2.7 standard errors / sqrt(replicates).
        tolerance = 4 * 2.7 * found.standard_error[j] * (1 / 20_000 + 1 / 50_000) ** 0.5
        assert abs(found.bca_low[j] - peer.confidence_interval.low) < tolerance
        assert abs(found.bca_high[j] - peer.confidence_interval.high) < tolerance
        assert found.standard_error[j] == pytest.approx(peer.standard_error, rel=0.03)


def test_bca_moves_with_the_skew() -> None:
    n, c = np.full(60, 1000), (999 * np.linspace(0, 1, 60) ** 12).astype(int)  # few strong items
    found = bootstrap_curve(n, c, [1])
    assert found.bca_low[0] > found.percentile_low[0] and found.bca_high[0] > found.percentile_high[0]


def beta_binomial(generator: np.random.Generator, clusters: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters whose items share a chance of success from Beta(0.8, 1.2), 8 samples an item."""
    chance = np.repeat(generator.beta(0.8, 1.2, clusters), size)
    return np.full(clusters * size, 8), generator.binomial(8, chance)


@pytest.mark.parametrize("size", [1, 3])
def test_coverage(size: int) -> None:
    ks, data_sets, clusters = np.array([1, 2, 6]), 400, 150
    truth = 1 - np.exp(special.betaln(0.8, 1.2 + ks) - special.betaln(0.8, 1.2))
    generator = np.random.default_rng(size)
    covered = {"percentile": np.zeros(3), "bca": np.zeros(3), "items": np.zeros(3)}
    for seed in range(data_sets):
        n, c = beta_binomial(generator, clusters, size)
        by_cluster = bootstrap_curve(n, c, ks, np.repeat(np.arange(clusters), size), 500, seed)
        by_item = bootstrap_curve(n, c, ks, None, 500, seed)
        covered["percentile"] += (by_cluster.percentile_low <= truth) & (truth <= by_cluster.percentile_high)
        covered["bca"] += (by_cluster.bca_low <= truth) & (truth <= by_cluster.bca_high)
        covered["items"] += (by_item.percentile_low <= truth) & (truth <= by_item.percentile_high)
    # Three binomial standard errors of the simulation, and one percent for the intervals' own error at 150 clusters.
    tolerance = 3 * (0.95 * 0.05 / data_sets) ** 0.5 + 0.01
    for method in ("percentile", "bca"):
        assert np.all(np.abs(covered[method] / data_sets - 0.95) < tolerance), covered
    if size > 1:  # items of a cluster are no independent evidence
        assert np.all(covered["items"] / data_sets < 0.9)


# What must not matter.


@pytest.mark.parametrize("portable", [False, True])
def test_any_number_of_threads_gives_the_same_bits(portable: bool) -> None:
    script = f"""
import hashlib, numpy as np
from medbridge import _native
generator = np.random.default_rng(0)
n = generator.integers(95, 99, 3000)
c = (n * generator.random(3000)).astype(int)
digest = hashlib.sha256()
for groups in (None, np.arange(3000) // 3, np.arange(3000) % 7):  # each loop has enough work to be shared out
    for curve in _native.bootstrap_curve(n, c, np.arange(1, 96), groups, 2803, 5, 0.9, {portable}):
        digest.update(np.ascontiguousarray(curve).tobytes())
print(digest.hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "OMP_NUM_THREADS": threads, "OMP_DYNAMIC": "false"},
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }  # fmt: skip
    assert len(found) == 1


def test_order_of_items_and_names_of_clusters() -> None:
    n, c = some_items(200, 12)
    c[::3] = c[1]
    groups = np.random.default_rng(4).integers(0, 60, 200)
    order = np.random.default_rng(5).permutation(200)
    options: dict[str, Any] = {"replicates": 100, "keep_replicates": True}
    expected = bootstrap_curve(n, c, [1, 5], groups, **options)
    assert_same_bits(bootstrap_curve(n[order], c[order], [1, 5], groups[order], **options), expected)
    for named in (
        -groups * 10**12,
        groups.astype(np.uint64) + 2**63,
        groups.astype(np.int8),
        np.char.add("image-", groups.astype(str)),
        groups.astype(bytes),
        [f"Bild {label}" for label in groups],
    ):
        assert_same_bits(bootstrap_curve(n, c, [1, 5], named, **options), expected)


def test_clusters_of_one_item_are_items() -> None:
    n, c = some_items(90, 12)
    options: dict[str, Any] = {"replicates": 50, "keep_replicates": True}
    assert_same_bits(
        bootstrap_curve(n, c, [3, 12], np.arange(90)[::-1], **options), bootstrap_curve(n, c, [3, 12], **options)
    )


def test_ks_in_any_order_strided_input_and_more_replicates() -> None:
    n, c = some_items(80, 30)
    ks = np.array([30, 1, 7, 7, 2, 29, 3, 11, 12, 13])
    options: dict[str, Any] = {"replicates": 21, "keep_replicates": True}
    together = bootstrap_curve(n, c, ks, **options)
    reversed_ks = bootstrap_curve(np.repeat(n, 2)[::2], np.repeat(c, 2)[::2], ks[::-1], **options)
    alone = [bootstrap_curve(n, c, [k], **options) for k in ks]
    for name in (*CURVES, "replicates"):
        for found in (getattr(reversed_ks, name)[..., ::-1], np.concatenate([getattr(one, name) for one in alone], -1)):
            np.testing.assert_allclose(getattr(together, name), found, rtol=1e-13, err_msg=name)
    more = bootstrap_curve(n, c, ks, replicates=40, keep_replicates=True)
    assert more.replicates is not None
    np.testing.assert_array_equal(more.replicates[:21], together.replicates)


def test_seeds_differ() -> None:
    n, c = some_items(80, 30)
    seeds = (0, 1, 2**32, 2**63, 2**64 - 1, np.int64(3), np.uint8(4))
    errors = {float(bootstrap_curve(n, c, [2], replicates=50, seed=seed).standard_error[0]) for seed in seeds}
    assert len(errors) == len(seeds)
    assert bootstrap_curve(n, c, [2], replicates=50).replicates is None


# Edges.


def all_curves(found: CurveIntervals) -> np.ndarray:
    return np.array([getattr(found, name) for name in CURVES])


def assert_no_width(found: CurveIntervals) -> None:
    assert np.all(found.standard_error == 0)
    for name in CURVES[2:]:
        np.testing.assert_array_equal(getattr(found, name), found.value)


@pytest.mark.parametrize("c", [0, 1, 3, 6, 7])
def test_items_that_are_all_alike_have_no_width(c: int) -> None:
    ks = np.arange(1, 8)
    for items in (1, 2, 30, 5000):
        found = bootstrap_curve(np.full(items, 7), np.full(items, c), ks, replicates=50)
        assert_no_width(found)
        np.testing.assert_allclose(found.value, pass_at_k([7], [c], ks)[0], rtol=1e-15)


def test_one_cluster_has_no_width() -> None:
    n, c = some_items(50, 9)
    assert_no_width(bootstrap_curve(n, c, [1, 4, 9], np.full(50, 7), replicates=40))


def test_k_where_every_item_is_certain() -> None:
    found = bootstrap_curve([8, 8, 8], [3, 5, 8], [5, 6, 8], replicates=100)
    assert found.value[0] < 1 and found.standard_error[0] > 0
    np.testing.assert_array_equal(all_curves(found)[:, 1:], np.array([1.0, 0, 1, 1, 1, 1])[:, None].repeat(2, axis=1))


def test_k_beyond_the_samples_is_not_a_number() -> None:
    found = bootstrap_curve([8, 3, 8], [3, 1, 8], [4, 3, 9, 1], replicates=20, keep_replicates=True)
    assert np.isnan(all_curves(found)[:, [0, 2]]).all() and np.isfinite(all_curves(found)[:, [1, 3]]).all()
    assert np.isnan(found.replicates[:, [0, 2]]).all() and np.isfinite(found.replicates[:, [1, 3]]).all()


@pytest.mark.parametrize("groups", [None, [], np.array([], dtype="U3")])
def test_empty_input(groups: Any) -> None:
    found = bootstrap_curve([], [], [1, 2], groups, replicates=3, keep_replicates=True)
    assert all_curves(found).shape == (6, 2) and np.isnan(all_curves(found)).all()
    assert found.replicates is not None and found.replicates.shape == (3, 2)
    assert all_curves(bootstrap_curve([3], [1], [], replicates=2)).shape == (6, 0)
    assert np.isnan(all_curves(bootstrap_curve([0, 4], [0, 1], [1], replicates=2))).all()


def test_one_replicate() -> None:
    n, c = some_items(30, 6)
    found = bootstrap_curve(n, c, [1, 3], replicates=1, keep_replicates=True)
    assert np.isnan(found.standard_error).all()
    for name in CURVES[2:]:
        np.testing.assert_array_equal(getattr(found, name), found.replicates[0])


def test_bca_falls_back_where_all_replicates_are_on_one_side() -> None:
    n, c = some_items(30, 6)
    for seed in range(40):
        found = bootstrap_curve(n, c, [1], replicates=3, seed=seed, keep_replicates=True)
        assert found.replicates is not None
        if abs(np.sign(found.replicates - found.value).sum()) == 3:
            assert found.bca_low == found.percentile_low and found.bca_high == found.percentile_high
            break
    else:
        pytest.fail("no seed had all replicates on one side")


def test_bca_falls_back_where_the_correction_has_no_meaning() -> None:
    n, c = np.full(400, 4), np.repeat([4, 0], [1, 399])  # the largest acceleration there is, 1/6
    usual, extreme = (bootstrap_curve(n, c, [1], confidence=confidence) for confidence in (0.95, 1 - 1e-12))
    assert usual.bca_high > usual.percentile_high
    assert extreme.bca_low == extreme.percentile_low and extreme.bca_high == extreme.percentile_high


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_numbers_stay_within_bounds(data: st.DataObject) -> None:
    n = np.array(data.draw(st.lists(st.integers(1, 2**31 - 1) | st.integers(1, 9), min_size=1, max_size=12)))
    c = np.array([data.draw(st.integers(0, int(most))) for most in n])
    groups = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), min_size=n.size, max_size=n.size))
    ks = data.draw(st.lists(st.integers(1, min(int(n.min()), 9)), min_size=1, max_size=8))
    replicates = data.draw(st.integers(2, 20))
    confidence = data.draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
    found = bootstrap_curve(n, c, ks, groups, replicates, data.draw(st.integers(0, 2**64 - 1)), confidence, True)
    assert found.replicates is not None
    assert np.all((found.replicates >= -1e-15) & (found.replicates <= 1 + 1e-15))
    assert np.isfinite(all_curves(found)).all()
    for low, high in ((found.percentile_low, found.percentile_high), (found.bca_low, found.bca_high)):
        assert np.all(low <= high + 1e-15)
        assert np.all(low >= found.replicates.min(axis=0)) and np.all(high <= found.replicates.max(axis=0))


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": [4, 4]}, r"n has shape \(2,\) and c has shape \(1,\)"),
        ({"c": [5]}, r"c\[0\] = 5 is above n\[0\] = 4"),
        ({"n": [-1]}, r"n\[0\] = -1 is negative"),
        ({"c": [0.5]}, r"c must hold integers, got dtype float64 with c\[0\] = 0.5"),
        ({"ks": [2, 0]}, r"ks\[1\] = 0 is below 1"),
        ({"n": [], "c": [], "ks": [0]}, r"ks\[0\] = 0 is below 1"),
        ({"ks": 1}, r"ks must have one dimension"),
        ({"groups": [1, 2]}, r"n has shape \(1,\) and groups has shape \(2,\)"),
        ({"groups": ["a", "b"]}, r"n has shape \(1,\) and groups has shape \(2,\)"),
        ({"groups": []}, r"n has shape \(1,\) and groups has shape \(0,\)"),
        ({"groups": [1.0]}, r"groups must hold integers or strings, got dtype float64 with groups\[0\] = 1.0"),
        ({"groups": [True]}, r"groups must hold integers or strings, got dtype bool"),
        ({"groups": [None]}, r"groups must hold integers or strings, got dtype object with groups\[0\] = None"),
        ({"groups": [["a"]]}, r"groups"),
        ({"groups": [[1]]}, r"groups must have one dimension, got shape \(1, 1\)"),
        ({"replicates": 0}, r"replicates = 0, must be from 1 to 2147483647"),
        ({"replicates": -(2**70)}, r"replicates = -1180591620717411303424, must be from 1"),
        ({"replicates": 2**31}, r"replicates = 2147483648, must be from 1"),
        ({"replicates": 10.0}, r"replicates = 10.0, must be an integer"),
        ({"seed": -1}, r"seed = -1, must be from 0 to 18446744073709551615"),
        ({"seed": 2**64}, r"seed = 18446744073709551616, must be from 0"),
        ({"seed": None}, r"seed = None, must be an integer"),
        ({"confidence": 0}, r"confidence = 0, must be above 0 and below 1"),
        ({"confidence": 1.0}, r"confidence = 1.0, must be above 0 and below 1"),
        ({"confidence": 95}, r"confidence = 95, must be above 0 and below 1"),
        ({"confidence": float("nan")}, r"confidence = nan"),
        ({"confidence": "0.9"}, r"confidence = '0.9'"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_curve(**{"n": [4], "c": [1], "ks": [1], "replicates": 2, **changes})


def test_refusals_name_the_first_bad_item_of_many() -> None:
    n, c = some_items(100, 6)
    c[37] = 7
    with pytest.raises(ValueError, match=r"c\[37\] = 7 is above n\[37\] = 6"):
        bootstrap_curve(n, c, [1], np.zeros(100, dtype=int))
